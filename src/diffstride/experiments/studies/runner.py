"""The work on a study: its runs, their progress, then tables, latencies and figures; and an estimate of its cost."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentError
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from diffstride._files import atomic_write_text
from diffstride._text import one_line
from diffstride.cost import count_macs
from diffstride.errors import InterruptedRunError, RunError, UsageError
from diffstride.experiments.console import PlainConsole
from diffstride.experiments.history import read_dicts
from diffstride.experiments.provenance import provenance
from diffstride.experiments.studies.executors import Executor
from diffstride.experiments.studies.latency import is_timed, measure
from diffstride.experiments.studies.pictures import draw
from diffstride.experiments.studies.results import Row, groups, row_of, write_tables
from diffstride.experiments.studies.study import Study, label_of
from diffstride.experiments.studies.worker import read_request, write_request
from diffstride.experiments.training.documents import read_yaml
from diffstride.experiments.training.fit import parse, quiet
from diffstride.experiments.training.runs import build_classifier, build_data


def run_study(plan: Study, folder: Path, executor: Executor, console: PlainConsole) -> None:
    """Do all runs that are not done, then write and print the tables, measure latencies and draw the figures.

    Args:
        plan: The study.
        folder: Its folder, locked by this process.
        executor: Where to do the runs.
        console: Where to print.

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
        with _Progress(plan, folder, console):
            if todo:
                executor([folder / run.name for run in todo], cpus=plan.cpus, gpus=plan.gpus)
    except (KeyboardInterrupt, InterruptedRunError) as stop:
        done = sum(row.state == "done" for row in _rows(plan, folder))
        raise InterruptedRunError(
            f"interrupted: {done} of {len(plan.runs)} runs are done; the same command continues the study"
        ) from stop
    finally:
        write_tables(folder)
        _write_provenance(folder, plan)
    rows = _rows(plan, folder)
    if plan.latency:
        done_groups = groups(row for row in rows if row.state == "done")
        chosen = {label: folder / group[0].name for label, group in done_groups.items()}
        if chosen and not is_timed(folder, chosen, plan.latency):
            with console.status("measuring the latency of the frozen networks"), quiet():
                measure(folder, chosen, plan.latency, plan.cpus)
    for table in write_tables(folder):
        printed = RichTable(title=table.title)
        for i, column in enumerate(table.columns):
            printed.add_column(column, justify="right" if i else "left")
        for line in table.rows:
            printed.add_row(*line)
        console.print(printed)
    with console.status("drawing"), quiet():
        missing = draw(folder, plan.figures)
    for name, why in missing.items():
        console.say(f"No figure {name}: {why}.")
    console.say(f"{folder}: results.csv, table.md and the figures; `diffstride report {folder}` makes a page of it.")
    if lost := [row for row in rows if row.state != "done"]:
        raise RunError(
            f"{len(lost)} of {len(rows)} runs failed (the same command tries them again), the first of them "
            f"{folder / lost[0].name}: {lost[0].error or 'it left no result'}"
        )


def check_same(plan: Study, folder: Path) -> None:
    """Check that runs with a result or a checkpoint have the settings that the study asks for now."""
    for run in plan.runs:
        before = read_request(folder / run.name)
        kept = ("result.json", "checkpoints/last.ckpt")
        if before is None or not any((folder / run.name / file).exists() for file in kept):
            continue
        if different := run.request.differences(before):
            raise UsageError(
                f"{folder / run.name} was run with other settings ({different[0]}): give another --name, or remove it"
            )


def _rows(plan: Study, folder: Path) -> list[Row]:
    return [row_of(folder, run.name, run.axes) for run in plan.runs]


def _write_provenance(folder: Path, plan: Study) -> None:
    """Write the provenance of tables and figures, with the sum of the seconds of all runs."""
    seconds = sum(row.result["train_seconds"] or 0.0 for row in _rows(plan, folder) if row.result is not None)
    facts = provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    atomic_write_text(folder / "provenance.json", json.dumps(facts | {"seconds": round(seconds, 1)}, indent=1) + "\n")


class _Progress:
    """A display of progress that reads the folders alone, so that it does not matter where the runs are done."""

    EVERY = 1.0  # seconds

    def __init__(self, plan: Study, folder: Path, console: PlainConsole) -> None:
        self._folder, self._console, self._start = folder, console, time.time()
        self._rows = {row.name: row for row in _rows(plan, folder)}
        self._todo = [name for name, row in self._rows.items() if row.state != "done"]
        self._ended = threading.Event()
        times = (TimeElapsedColumn(), TextColumn("to go"), TimeRemainingColumn())
        columns = (TextColumn("{task.description}"), BarColumn(), *times)
        self._progress = Progress(*columns, console=console, speed_estimate_period=24 * 3600)
        self._task = self._progress.add_task("", total=len(self._todo))
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._update()
        self._progress.start()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._update()
        self._progress.stop()

    def _follow(self) -> None:
        while not self._ended.wait(self.EVERY):
            self._update()

    def _update(self) -> None:
        for name in self._todo:
            row = self._rows[name]
            if row.state not in ("done", "failed"):
                self._rows[name] = row = row_of(self._folder, name, row.axes)
                if row.state in ("done", "failed"):
                    self._console.say(f"{name}: {_outcome(row)}")
        states = [row.state for row in self._rows.values()]
        done, failed = states.count("done"), states.count("failed")
        active = [name for name in self._todo if self._rows[name].state not in ("done", "failed")]
        running = [name for name in active if self._is_running(name)]
        text = f"{done} runs done, {len(running)} running, {len(active) - len(running)} left"
        completed = len(self._todo) - len(active) + sum(fraction_done(self._folder / name) for name in running)
        self._progress.update(
            self._task, completed=completed, description=text + (f", {failed} failed" if failed else "")
        )

    def _is_running(self, name: str) -> bool:
        config = self._folder / name / "config.yaml"  # written anew by a run that resumes
        return config.exists() and config.stat().st_mtime >= self._start - 1


def _outcome(row: Row) -> str:
    if row.result is None:
        return f"failed: {row.error}"
    accuracy, macs = row.result["accuracy"], row.result["macs"] / 1e6
    return f"accuracy {'–' if accuracy is None else f'{accuracy:.4f}'}, {macs:.2f} million MACs per image"


def fraction_done(folder: Path) -> float:
    """Return the part of a run that is done, from its log."""
    try:
        limits = read_yaml(folder / "config.yaml")["trainer"]
        last = read_dicts(folder / "metrics.csv")[-1]
        unit = "step" if (limits["max_steps"] or -1) > 0 else "epoch"
        return min(1.0, int(last[unit]) / int(limits[f"max_{unit}s"]))
    except (OSError, yaml.YAMLError, IndexError, KeyError, TypeError, ValueError):
        return 0.0  # it has only begun, or a file is being written


class Cost(NamedTuple):
    """Multiply-accumulates of one image forward at the start, and of the training (three forward passes a step)."""

    image: float
    training: float


def estimate_costs(plan: Study) -> dict[str, Cost]:
    """Return the cost of a run by label, from networks and data that are built but not trained."""
    data: dict[str, Any] = {}
    costs: dict[str, Cost] = {}
    for run in plan.runs:
        label = label_of(run.axes)
        if label not in costs:
            config = parse(run.request.arguments()).as_dict()
            key = json.dumps(config["data"], default=str)
            if key not in data:
                data[key] = build_data(config["data"])
            try:
                costs[label] = _cost(config, data[key])
            except (ValueError, ArgumentError) as error:  # from the network, about its arguments
                raise UsageError(f"run {run.name}: {one_line(error)}") from error
    return costs


def _cost(config: Mapping[str, Any], data: Any) -> Cost:
    macs = count_macs(build_classifier(config["model"]).network, torch.zeros(1, *data.sample_shape))
    image = macs.model + macs.resampling
    trainer, batch = config["trainer"], data.batch_size
    steps = len(data.train_set[1] if isinstance(data.train_set, tuple) else data.train_set) // batch
    epochs, most = trainer["max_epochs"], trainer["max_steps"] or -1
    if epochs is None and most < 0:
        epochs = 1000  # Lightning's default where neither limit is given
    limits = [steps * epochs if (epochs or -1) >= 0 else math.inf, most if most >= 0 else math.inf]
    return Cost(image, 3 * image * batch * min(limits))
