"""The work on a study: its runs, their progress, then tables, latencies and figures; and an estimate of its cost."""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentError
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffstride._files import atomic_write_text
from diffstride._text import one_line
from diffstride.cost import count_macs
from diffstride.errors import InterruptedRunError, RunError, UsageError
from diffstride.experiments.benchmark.measure import Candidate, alternate, cpu_threads
from diffstride.experiments.console import PlainConsole, make_table
from diffstride.experiments.history import read_dicts
from diffstride.experiments.provenance import provenance
from diffstride.experiments.studies.executors import Executor
from diffstride.experiments.studies.pictures import draw, look_into, shared_data
from diffstride.experiments.studies.results import Row, groups, read_latency, row_of, write_tables
from diffstride.experiments.studies.study import Study, label_of
from diffstride.experiments.studies.worker import read_request, write_request
from diffstride.experiments.training.callbacks import in_one_line
from diffstride.experiments.training.documents import read_yaml
from diffstride.experiments.training.fit import parse, quiet
from diffstride.experiments.training.runs import build_classifier
from diffstride.export import freeze
from diffstride.nn import learnable_layers


def run_study(plan: Study, folder: Path, executor: Executor, console: PlainConsole) -> None:
    """Do all runs that are not done, then write and print the tables, measure latencies and draw the figures.

    This process must have locked the folder of the study.

    Raises:
        RunError: Some runs failed; the others are done.
        InterruptedRunError: The user interrupted the study; the tables of the finished runs are written.
    """
    kept = plan.definition | {"name": plan.name, "runs": {run.name: run.axes for run in plan.runs}}
    atomic_write_text(folder / "study.yaml", yaml.safe_dump(kept, sort_keys=False))
    before = _rows(plan, folder)
    if failed := [row.name for row in before if row.state == "failed"]:
        console.say(f"Trying again the runs that failed: {', '.join(failed)}.")
    todo = [run for run, row in zip(plan.runs, before, strict=True) if row.state != "done"]
    for run in todo:
        write_request(folder / run.name, run.request)
    try:
        with _progress(plan, folder, console):
            if todo:
                executor([folder / run.name for run in todo])
    except (KeyboardInterrupt, InterruptedRunError) as stop:
        number = sum(row.state == "done" for row in _rows(plan, folder))
        raise InterruptedRunError(
            f"interrupted: {number} of {len(plan.runs)} runs are done; the same command continues the study"
        ) from stop
    finally:
        write_tables(folder)
        rows = _rows(plan, folder)
        seconds = sum(row.result["train_seconds"] or 0.0 for row in rows if row.result is not None)
        facts = provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        facts["seconds"] = round(seconds, 1)
        atomic_write_text(folder / "provenance.json", json.dumps(facts, indent=1) + "\n")
    if batch := plan.definition.get("latency"):
        done = [row for row in rows if row.state == "done"]
        first = {label: folder / group[0].name for label, group in groups(done).items()}
        with console.status("measuring the latency of the frozen networks"), quiet():
            _measure_latency(folder, first, batch, plan.definition["cpus"])
    for table in write_tables(folder):
        printed = make_table(table.title, *table.columns)
        for line in table.rows:
            printed.add_row(*line)
        console.print(printed)
    with console.status("drawing"), quiet():
        missing = draw(folder, plan.definition["figures"])
    for name, why in missing.items():
        console.say(f"No figure {name}: {why}.")
    console.say(f"{folder}: results.csv, table.md and the figures; `diffstride report {folder}` makes a page of it.")
    if lost := [row for row in rows if row.state != "done"]:
        raise RunError(
            f"{len(lost)} of {len(rows)} runs failed (the same command tries them again), the first of them "
            f"{folder / lost[0].name}: {lost[0].error or 'it left no result'}"
        )


REPEATS = 30  # of a batch, for its latency


def _measure_latency(folder: Path, runs: Mapping[str, Path], batch: int, cpus: int) -> None:
    """Time a batch through the network of each finished run with fixed strides, in turns; write `latency.json`.

    Nothing is done where that file holds these runs with their present results, and this batch.
    """
    digests = {
        label: hashlib.sha256((run / "result.json").read_bytes()).hexdigest()[:16] for label, run in runs.items()
    }
    before = read_latency(folder)
    timed = {label: entry.get("result") for label, entry in before["latency"].items()}
    if not runs or (before["batch"], timed) == (batch, digests):
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with cpu_threads(cpus):
        candidates = {label: _candidate(run, batch, device) for label, run in runs.items()}
        with torch.inference_mode():
            seconds = alternate(candidates, REPEATS, random.Random(0), device=device)
        facts = provenance(device)
    latency = {}
    for label, times in seconds.items():
        low, middle, high = (1e3 * q for q in statistics.quantiles(times, n=4, method="inclusive"))
        latency[label] = {"ms": middle, "low": low, "high": high, "run": runs[label].name, "result": digests[label]}
    table = {"batch": batch, "repeats": REPEATS, "latency": latency, **facts}
    atomic_write_text(folder / "latency.json", json.dumps(table, indent=1) + "\n")


def _candidate(run: Path, batch: int, device: torch.device) -> Candidate:
    network, data = look_into(run)
    example = torch.randn(batch, *data.sample_shape)
    frozen = freeze(network, example) if any(learnable_layers(network)) else network
    model, x = frozen.to(device), example.to(device)
    return Candidate(lambda: model(x))


def check_same(plan: Study, folder: Path) -> None:
    """Check that runs with a result or a checkpoint have the settings that the study asks for now."""
    for run in plan.runs:
        before = read_request(folder / run.name)
        kept = any((folder / run.name / file).exists() for file in ("result.json", "checkpoints/last.ckpt"))
        if before is not None and kept and (different := run.request.differences(before)):
            raise UsageError(
                f"{folder / run.name} was run with other settings ({different[0]}): give another --name, or remove it"
            )


def _rows(plan: Study, folder: Path) -> list[Row]:
    return [row_of(folder, run.name, run.axes) for run in plan.runs]


@contextmanager
def _progress(plan: Study, folder: Path, console: PlainConsole) -> Iterator[None]:
    """Show the progress, which is read from the folders alone: it does not matter where the runs are done."""
    left = {row.name: row.axes for row in _rows(plan, folder) if row.state != "done"}
    total, ended = len(left), threading.Event()
    states = Counter(done=len(plan.runs) - total)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("to go"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=24 * 3600)
    task = progress.add_task("", total=total)

    def update() -> None:
        for name, axes in list(left.items()):
            row = row_of(folder, name, axes)
            if row.state in ("done", "failed"):
                del left[name]
                states[row.state] += 1
                outcome = f"failed: {row.error}" if row.result is None else in_one_line(row.result)
                console.say(f"{name}: {outcome}")
        text = f"{states['done']} runs done, {len(left)} left"
        text += f", {states['failed']} failed" if states["failed"] else ""
        completed = total - len(left) + sum(fraction_done(folder / name) for name in left)
        progress.update(task, completed=completed, description=text)

    def follow() -> None:
        while not ended.wait(1.0):
            update()

    thread = threading.Thread(target=follow, daemon=True)
    update()
    with progress:
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            update()


def fraction_done(folder: Path) -> float:
    """Return the part of a run that is done, from its log."""
    try:
        limits = read_yaml(folder / "config.yaml")["trainer"]
        unit = "step" if (limits["max_steps"] or -1) > 0 else "epoch"
        done = [row[unit] for row in read_dicts(folder / "metrics.csv") if row[unit]]  # rates are logged without epochs
        return min(1.0, int(done[-1]) / int(limits[f"max_{unit}s"]))
    except (OSError, yaml.YAMLError, IndexError, KeyError, TypeError, ValueError):
        return 0.0  # it has only begun, or a file is being written


class Cost(NamedTuple):
    """Multiply-accumulates of one image forward at the start, and of the training (three forward passes a step)."""

    image: float
    training: float


def estimate_costs(plan: Study) -> dict[str, Cost]:
    """Return the cost of a run by label, from networks and data that are built but not trained."""
    costs: dict[str, Cost] = {}
    for run in plan.runs:
        if (label := label_of(run.axes)) not in costs:
            config = parse(run.request.arguments()).as_dict()
            try:
                costs[label] = _cost(config, shared_data(config))
            except (ValueError, ArgumentError) as error:  # from the network, about its arguments
                raise UsageError(f"run {run.name}: {one_line(error)}") from error
    return costs


def _cost(config: Mapping[str, Any], data: Any) -> Cost:
    macs = count_macs(build_classifier(config["model"]).network, torch.zeros(1, *data.sample_shape))
    image = macs.model + macs.resampling
    trainer, batch = config["trainer"], data.batch_size
    steps = len(data.train_set[1] if isinstance(data.train_set, tuple) else data.train_set) // batch
    limits = [(trainer["max_epochs"] or -1) * steps, trainer["max_steps"] or -1]  # negative ones do not count
    return Cost(image, 3 * image * batch * min((limit for limit in limits if limit >= 0), default=math.inf))
