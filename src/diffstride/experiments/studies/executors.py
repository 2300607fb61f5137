"""Places where the runs of a study are done: this process, several processes of this machine, or a Ray cluster.

An executor takes the folders of requested runs (see `worker.write_request`) and returns when each is done or has
failed. The folders hold the results.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from diffstride._text import one_line
from diffstride.errors import UsageError
from diffstride.experiments.studies.study import Request
from diffstride.experiments.studies.worker import requested, work, write_failure, write_request
from diffstride.experiments.training.fit import has_several_processes, parse

Executor = Callable[[Sequence[Path]], None]


def in_process(folders: Sequence[Path]) -> None:
    """Do runs one after another in this process; those on several devices in a process of their own."""
    for folder in folders:
        request = requested(folder)
        try:
            several = has_several_processes(parse(request.arguments()).trainer)
        except UsageError:  # `work` records it
            several = False
        if several:
            Processes(1)([folder])
        else:
            work(folder)


class Processes:
    """Several runs at a time, each in a process of its own on this machine; GPUs are given out in turns."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, folders: Sequence[Path]) -> None:
        """Return when all runs are done or have failed; an interruption ends the processes."""
        children: list[subprocess.Popen[bytes]] = []
        stopped, lock, slots = threading.Event(), threading.Lock(), list(range(self.number))

        def run(folder: Path) -> None:
            with lock:
                if stopped.is_set():
                    return
                slot = slots.pop()
                child = subprocess.Popen(
                    [sys.executable, "-m", "diffstride.experiments.studies.worker", str(folder)],
                    env=os.environ | _environment(slot, self.number, requested(folder).cpus),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C reaches this process alone
                )
                children.append(child)
            _, stderr = child.communicate()
            with lock:
                slots.append(slot)
            if (status := child.returncode) and not stopped.is_set():
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                write_failure(folder, f"the process of the run {how}", stderr.decode(errors="replace"))

        with ThreadPoolExecutor(self.number) as pool:
            try:
                list(pool.map(run, folders))
            finally:
                with lock:
                    stopped.set()
                for child in children:
                    if child.poll() is None:
                        child.kill()  # its checkpoints are complete, and nothing else is needed to resume


def _environment(slot: int, number: int, cpus: int) -> dict[str, str]:
    """Return the environment of one of `number` processes; a single one gets all GPUs."""
    environment = {"OMP_NUM_THREADS": str(cpus)}
    if number > 1 and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = visible.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return environment


class Ray:
    """Runs as tasks of a Ray cluster, which places them by their CPUs and GPUs and repeats those that it loses.

    A run whose worker is lost resumes from its last checkpoint. Machines that do not see the study's folder work in a
    folder of their own, and send back its content.

    It connects when it is made, and checks that the cluster is large enough for a run, before anything is written.

    Args:
        address: Address of the cluster, `host:port`. `auto` finds the cluster that this machine belongs to, `local`
            starts one on this machine for this study alone.
        cpus: CPUs of a run.
        gpus: GPUs of a run.
    """

    def __init__(self, address: str, cpus: int, gpus: float) -> None:
        try:
            import ray

            if ":" in address.removeprefix("ray://"):  # Ray itself tries for minutes before it gives up
                host, _, port = address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"--ray {address}: no cluster answers ({one_line(error)}): start one with `ray start --head`, or give "
                "`local`; Ray comes with pip install 'diffstride[cluster]'"
            ) from error
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        for name, needed in ("CPU", cpus), ("GPU", gpus):
            if needed > (there := resources.get(name, 0)):  # Ray would wait for ever
                ray.shutdown()
                raise UsageError(f"--ray {address}: it has {there:g} {name}s, but a run takes {needed:g}")
        self._task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=5)(_remote_work)

    def __call__(self, folders: Sequence[Path]) -> None:
        """Return when all runs are done or have failed."""
        import ray

        token = uuid.uuid4().hex
        mark = folders[0].parent / f".{token}"
        mark.touch()
        try:
            here = os.getcwd()
            pending = {self._task.remote(here, path.absolute(), requested(path), token): path for path in folders}
            while pending:
                (ready,), _ = ray.wait([*pending], num_returns=1)
                folder = pending.pop(ready)
                try:
                    archive = ray.get(ready)
                except ray.exceptions.RayError as error:
                    write_failure(folder, f"Ray could not do the run: {one_line(error)}", str(error))
                    continue
                if archive is not None:
                    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                        tar.extractall(folder, filter="data")
        finally:
            mark.unlink(missing_ok=True)
            ray.shutdown()


def _remote_work(cwd: str, folder: Path, request: Request, token: str) -> bytes | None:
    """Do a run in the study's folder where this machine sees it, else in a temporary folder that is returned."""
    if os.path.isdir(cwd):
        os.chdir(cwd)  # so that relative paths of data are those of the user
    if (folder.parent / f".{token}").exists():
        in_process([folder])
        return None
    own = Path(tempfile.gettempdir()) / f"diffstride-{token}" / folder.name
    write_request(own, request)
    in_process([own])
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(own, arcname=".")
    return archive.getvalue()
