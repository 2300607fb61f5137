"""Where the runs of a study are done: in this process, in several of this machine, or on a Ray cluster.

An executor takes the folders of runs that have been asked for (`work.write_request`) and returns when all are done or
have failed. What came of them is in the folders.
"""

from __future__ import annotations

import io
import json
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from diffstride.errors import UsageError
from diffstride.experiments.studies.study import Request
from diffstride.experiments.studies.worker import failed, read_request, work, write_request
from diffstride.experiments.training.fit import has_several_processes, parse


class Executor(Protocol):
    """Does the runs in some folders."""

    def __call__(self, folders: Sequence[Path], *, cpus: int, gpus: float) -> None:
        """Return when all are done or have failed."""


def in_process(folders: Sequence[Path], *, cpus: int, gpus: float) -> None:
    """One after another, here; those of several devices in a process of their own."""
    for folder in folders:
        _work(folder)


def _work(folder: Path) -> None:
    """Do a run here if it has one process, else in a process of its own."""
    request = read_request(folder)
    assert request is not None, folder
    try:
        several = has_several_processes(parse(request.arguments()).trainer)
    except UsageError:  # `work` writes it down
        several = False
    if several:
        Processes(1)([folder], cpus=request.cpus, gpus=0)
    else:
        work(folder)


class Processes:
    """Several at a time, each in a process of its own on this machine; where there are GPUs, they take turns.

    Args:
        number: of processes.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, folders: Sequence[Path], *, cpus: int, gpus: float) -> None:
        """Return when all are done or have failed; on an interruption the processes end, and can be gone on from."""
        children: dict[Path, subprocess.Popen[bytes]] = {}
        stopped, lock, places = threading.Event(), threading.Lock(), list(range(self.number))
        alive, held = os.pipe()  # closed with this process, however it ends; the runs end with it

        def run(folder: Path) -> None:
            with lock:
                if stopped.is_set():
                    return
                place = places.pop()
                children[folder] = child = subprocess.Popen(
                    [sys.executable, "-m", "diffstride.experiments.studies.worker", str(folder)],
                    env=os.environ | _share(place, self.number, cpus),
                    stdin=alive,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is ours to handle
                )
            _, said = child.communicate()
            with lock:
                places.append(place)
            if child.returncode and not stopped.is_set():
                how = _how_it_ended(child.returncode)
                failed(folder, f"the process of the run {how}", said.decode(errors="replace"))

        with ThreadPoolExecutor(self.number) as pool:
            try:
                for future in [pool.submit(run, folder) for folder in folders]:
                    future.result()
            finally:
                with lock:
                    stopped.set()
                for child in children.values():
                    if child.poll() is None:
                        child.kill()  # its checkpoints are whole, and nothing else is needed to go on
                os.close(held)
                os.close(alive)


def _share(place: int, number: int, cpus: int) -> dict[str, str]:
    """Return what one of `number` processes gets of the machine; a single one gets all GPUs."""
    environment = {"OMP_NUM_THREADS": str(cpus)}
    if number > 1 and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = visible.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    return environment


def _how_it_ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


class Ray:
    """As tasks of a Ray cluster, which places them by the CPUs and GPUs that a run takes and repeats those it loses.

    A run whose worker is lost goes on from its last checkpoint. Machines that do not see the study's folder work in
    a folder of their own, and send back what the run has left.

    Args:
        address: of the cluster, `host:port`; `auto` finds the one that this machine is part of, `local` starts one on
            this machine for this study alone.
    """

    RETRIES = 5  # of a run whose worker was lost

    def __init__(self, address: str) -> None:
        self.address = address

    def connect(self, *, cpus: int, gpus: float) -> None:
        """Find the cluster, and see whether it is large enough for a run, before anything is written."""
        try:
            import ray
        except ModuleNotFoundError as error:
            raise UsageError("--ray needs the package ray: pip install 'diffstride[cluster]'") from error
        try:
            if ":" in self.address.removeprefix("ray://"):  # Ray itself asks for minutes before it gives up
                host, _, port = self.address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"--ray {self.address}: no cluster answers: start one with `ray start --head`, give its address, or "
                "give `local`"
            ) from error
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        for name, asked in ("CPU", cpus), ("GPU", gpus):
            if asked > resources.get(name, 0):
                ray.shutdown()
                raise UsageError(f"the cluster has {resources.get(name, 0):g} {name}s, but a run takes {asked:g}")

    def __call__(self, folders: Sequence[Path], *, cpus: int, gpus: float) -> None:
        """Return when all are done or have failed."""
        import ray

        try:
            _on_ray(ray, folders, cpus, gpus)
        finally:
            ray.shutdown()


def _on_ray(ray: Any, folders: Sequence[Path], cpus: int, gpus: float) -> None:
    token = uuid.uuid4().hex
    mark = folders[0].parent / f".{token}"
    mark.touch()
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=Ray.RETRIES)(_remote_work)
    try:
        here = os.getcwd()
        pending = {task.remote(here, folder.absolute(), _request_text(folder), token): folder for folder in folders}
        while pending:
            (ready,), _ = ray.wait([*pending], num_returns=1)
            folder = pending.pop(ready)
            try:
                left = ray.get(ready)
            except ray.exceptions.RayError as error:
                failed(folder, f"Ray could not do the run: {str(error).strip().splitlines()[0]}", str(error))
                continue
            if left is not None:
                with tarfile.open(fileobj=io.BytesIO(left)) as archive:
                    archive.extractall(folder, filter="data")
    finally:
        mark.unlink(missing_ok=True)


def _remote_work(cwd: str, folder: Path, request: str, token: str) -> bytes | None:
    """A run on some machine: in the study's folder where it is to be seen, else in a folder that is sent back."""
    if os.path.isdir(cwd):
        os.chdir(cwd)  # relative paths of data mean what they mean to the user
    if (folder.parent / f".{token}").exists():
        _work(folder)
        return None
    own = Path(tempfile.gettempdir()) / f"diffstride-{token}" / folder.name
    write_request(own, Request(**json.loads(request)))
    _work(own)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(own, arcname=".")
    return archive.getvalue()


def _request_text(folder: Path) -> str:
    request = read_request(folder)
    assert request is not None, folder
    return json.dumps(request._asdict())
