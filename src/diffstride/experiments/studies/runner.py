"""`diffstride study`: all runs of a study, then its tables and figures."""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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
from diffstride.experiments.history import read_dicts, whole_number
from diffstride.experiments.parser import CommandParser
from diffstride.experiments.provenance import provenance
from diffstride.experiments.studies import results
from diffstride.experiments.studies.executors import Executor, Processes, Ray, in_process
from diffstride.experiments.studies.latency import is_timed, measure
from diffstride.experiments.studies.pictures import FIGURES, draw
from diffstride.experiments.studies.results import Row, row_of
from diffstride.experiments.studies.study import Study, label_of, load_study
from diffstride.experiments.studies.worker import read_request, write_request
from diffstride.experiments.training.documents import load_yaml, read_yaml
from diffstride.experiments.training.fit import parse, quiet
from diffstride.experiments.training.folders import STUDY, check_name, held, runs_folder
from diffstride.experiments.training.runs import build_classifier, build_data

DESCRIPTION = """Do the runs of a study, then make its tables and figures; everything is in RUNS/NAME.

  diffstride study configs/studies/table3-small.yaml --dry-run       (what would run, and what it costs)
  diffstride study configs/studies/table3-small.yaml --processes 2
  diffstride study configs/studies/table3.yaml --ray auto            (on the Ray cluster of this machine)
  diffstride study configs/studies/table3-small.yaml --data.path cifar10

A run that is done is never done again. The same command goes on where the last one stopped, however it stopped: runs
that were cut off go on from their last checkpoint, those that failed are tried again. Any argument of `diffstride fit`
goes to all runs, unless an axis of the study sets it."""


def study(arguments: Sequence[str]) -> None:
    """Do the study, print the tables."""
    options, settings = _options(arguments)
    plan = load_study(options.file, settings, tuple(FIGURES))
    named = f"{options.file}: the name of the study" if options.name is None else "--name"
    folder = runs_folder(options.runs) / check_name(named, plan.name if options.name is None else options.name)
    _check_same(plan, folder)
    console = PlainConsole(width=100)
    if options.dry_run:
        _list(plan, folder, console)
        return
    executor: Executor = in_process
    if options.processes:
        executor = Processes(options.processes)
    elif options.ray:
        executor = Ray(options.ray)
        if any(row_of(folder, run.name, run.axes).state != "done" for run in plan.runs):
            executor.connect(cpus=plan.cpus, gpus=plan.gpus)
    with held(folder, STUDY, adopt=_has_been_done(folder)):
        _do(plan, folder, executor, console)


def _do(plan: Study, folder: Path, executor: Executor, console: PlainConsole) -> None:
    kept = plan.definition | {"name": plan.name, "runs": {run.name: run.axes for run in plan.runs}}
    atomic_write_text(folder / "study.yaml", yaml.safe_dump(kept, sort_keys=False))
    states = [row_of(folder, run.name, run.axes).state for run in plan.runs]
    todo = [run for run, state in zip(plan.runs, states, strict=True) if state != "done"]
    if failed := [run.name for run, state in zip(plan.runs, states, strict=True) if state == "failed"]:
        console.say(f"Trying again what failed: {', '.join(failed)}.")
    for run in todo:
        write_request(folder / run.name, run.request)
    try:
        with _Watch(plan, folder, console):
            if todo:
                executor([folder / run.name for run in todo], cpus=plan.cpus, gpus=plan.gpus)
    except (KeyboardInterrupt, InterruptedRunError) as stop:
        done = sum(row_of(folder, run.name, run.axes).state == "done" for run in plan.runs)
        raise InterruptedRunError(
            f"interrupted: {done} of {len(plan.runs)} runs are done; the same command goes on"
        ) from stop
    finally:
        results.write_tables(folder)
        _provenance(folder, plan)
    rows = [row_of(folder, run.name, run.axes) for run in plan.runs]
    if plan.latency and (timed := _to_time(folder, rows, plan.latency)):
        with console.status("measuring the latency of the frozen networks"), quiet():
            measure(folder, timed, plan.latency, plan.cpus)
    for table in results.write_tables(folder):
        console.print(_rich(table))
    with console.status("drawing"), quiet():
        missing = draw(folder, plan.figures)
    for name, why in missing.items():
        console.say(f"No figure {name}: {why}.")
    console.say(f"{folder}: results.csv, table.md and the figures; `diffstride report {folder}` makes a page of it.")
    if lost := [row for row in rows if row.state != "done"]:
        first = lost[0]
        raise RunError(
            f"{len(lost)} of {len(rows)} runs failed (the same command tries them again), the first of them "
            f"{folder / first.name}: {first.error or 'it left no result'}"
        )


def _check_same(plan: Study, folder: Path) -> None:
    """A run that is done or on its way must be the one that is asked for now."""
    for run in plan.runs:
        before = read_request(folder / run.name)
        kept = ("result.json", "checkpoints/last.ckpt")
        if before is None or not any((folder / run.name / file).exists() for file in kept):
            continue
        if different := run.request.differences(before):
            raise UsageError(
                f"{folder / run.name} was run with other settings ({different[0]}): give another --name, or remove it"
            )


def _has_been_done(folder: Path) -> bool:
    """Return whether a study has left its list of runs in the folder, which a file that a user writes never has."""
    try:
        results.read_study(folder)
    except UsageError:
        return False
    return True


def _provenance(folder: Path, plan: Study) -> None:
    """Of the tables and figures; each run has its own in `result.json`. The time is that of all runs, one by one."""
    rows = [row_of(folder, run.name, run.axes) for run in plan.runs]
    known = [row.result["train_seconds"] or 0.0 for row in rows if row.result is not None]
    seconds = sum(each for each in known if math.isfinite(each))
    facts = provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    atomic_write_text(folder / "provenance.json", json.dumps(facts | {"seconds": round(seconds, 1)}, indent=1) + "\n")


def _to_time(folder: Path, rows: Sequence[Row], batch: int) -> dict[str, Path]:
    """A run of each group, where any of these has not been timed like that."""
    done = {label: [row for row in group if row.state == "done"] for label, group in results.groups(rows).items()}
    chosen = {label: folder / group[0].name for label, group in done.items() if group}
    return {} if is_timed(folder, chosen, batch) else chosen


# The display


class _Watch:
    """Shows from the folders alone how far the runs are, so that it does not matter who does them.

    Args:
        plan: the study.
        folder: of the study.
        console: to write to.
    """

    EVERY = 1.0  # seconds

    def __init__(self, plan: Study, folder: Path, console: PlainConsole) -> None:
        self.plan, self.folder, self.console = plan, folder, console
        self._states = {run.name: row_of(folder, run.name, run.axes).state for run in plan.runs}
        self._fresh = {run.name for run in plan.runs if self._states[run.name] != "done"}
        self._start = time.time()
        self._ended = threading.Event()
        times = (TimeElapsedColumn(), TextColumn("to go"), TimeRemainingColumn())
        columns = (TextColumn("{task.description}"), BarColumn(), *times)
        self._progress = Progress(*columns, console=console, speed_estimate_period=24 * 3600)
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> _Watch:
        """Start showing."""
        self._task = self._progress.add_task(self._words(), total=len(self._fresh))
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Show the end."""
        self._ended.set()
        self._thread.join()
        self._look()
        self._progress.stop()

    def _follow(self) -> None:
        while not self._ended.wait(self.EVERY):
            self._look()

    def _look(self) -> None:
        going = 0.0
        running = 0
        for run in self.plan.runs:
            if run.name not in self._fresh or self._states[run.name] == "ended":
                continue
            row = row_of(self.folder, run.name, run.axes)
            if row.state == "done" or (row.state == "failed" and self._touched(run.name, "failed.json")):
                self._states[run.name] = "ended"
                self._say(row)
            elif self._touched(run.name, "config.yaml"):
                running += 1
                going += _share_done(self.folder / run.name)
        ended = sum(state == "ended" for state in self._states.values())
        self._progress.update(self._task, completed=ended + going, description=self._words(running))

    def _words(self, running: int = 0) -> str:
        rows = [row_of(self.folder, run.name, run.axes) for run in self.plan.runs]
        done = sum(row.state == "done" for row in rows)
        failed = sum(row.state == "failed" for row in rows)
        left = len(rows) - done - failed - running
        return f"{done} runs done, {running} running, {left} left" + (f", {failed} failed" if failed else "")

    def _touched(self, name: str, file: str) -> bool:
        try:
            return (self.folder / name / file).stat().st_mtime >= self._start - 1
        except FileNotFoundError:
            return False

    def _say(self, row: Row) -> None:
        if row.result is None:
            words = f"failed: {row.error}"
        else:
            accuracy, macs = row.result["accuracy"], row.result["macs"] / 1e6
            words = f"accuracy {'–' if accuracy is None else f'{accuracy:.4f}'}, {macs:.2f} million MACs an image"
        self.console.say(f"{row.name}: {words}")


def _share_done(folder: Path) -> float:
    """How much of a run is done, by what it has logged."""
    try:
        limits = read_yaml(folder / "config.yaml")["trainer"]
        last = read_dicts(folder / "metrics.csv")[-1]
        if (limits["max_steps"] or -1) > 0:
            return min(1.0, whole_number(last["step"]) / int(limits["max_steps"]))
        return min(1.0, whole_number(last["epoch"]) / int(limits["max_epochs"]))
    except (OSError, yaml.YAMLError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0.0  # it has only begun, or its file is being written


def _rich(table: results.Table) -> RichTable:
    shown = RichTable(title=table.title)
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if i else "left")
    for line in table.rows:
        shown.add_row(*line)
    return shown


# Dry runs


class _Cost(NamedTuple):
    """MACs: of one image forward at the start, and of the training, where a backward pass takes two forward ones."""

    image: float
    training: float


def _list(plan: Study, folder: Path, console: PlainConsole) -> None:
    """The runs, their states and costs."""
    with console.status("building the networks"), quiet():
        costs = _costs(plan)
    table = RichTable(title=f"{plan.name}: {len(plan.runs)} runs in {folder}")
    for heading in ("run", "state", "million MACs an image, at the start", "training, in 10¹² MACs"):
        table.add_column(heading, justify="left" if heading in ("run", "state") else "right")
    left = 0.0
    for run in plan.runs:
        state, cost = row_of(folder, run.name, run.axes).state, costs[label_of(run.axes)]
        left += cost.training * (state != "done")
        table.add_row(run.name, state, f"{cost.image / 1e6:.3g}", f"{cost.training / 1e12:.3g}")
    console.print(table)
    console.say(f"Left to do: {left / 1e12:.4g} · 10¹² MACs, if the strides stay what they are at the start.")


def _costs(plan: Study) -> dict[str, _Cost]:
    data: dict[str, Any] = {}
    found: dict[str, _Cost] = {}
    for run in plan.runs:
        label = label_of(run.axes)
        if label not in found:
            config = parse(run.request.arguments()).as_dict()
            key = json.dumps(config["data"], default=str)
            if key not in data:
                data[key] = build_data(config["data"])
            try:
                found[label] = _cost(config, data[key])
            except (ValueError, ArgumentError) as error:  # what a network says of its arguments
                raise UsageError(f"run {run.name}: {one_line(error)}") from error
    return found


def _cost(config: Mapping[str, Any], data: Any) -> _Cost:
    macs = count_macs(build_classifier(config["model"]).network, torch.zeros(1, *data.sample_shape))
    trainer, batch = config["trainer"], data.batch_size
    steps = len(data.train_set[1] if isinstance(data.train_set, tuple) else data.train_set) // batch
    epochs, most = trainer["max_epochs"], trainer["max_steps"] or -1
    if epochs is None and most < 0:
        epochs = 1000  # Lightning's default where neither limit is given
    limits = [steps * epochs if (epochs or -1) >= 0 else math.inf, most if most >= 0 else math.inf]
    steps = min(limits)
    image = macs.model + macs.resampling
    return _Cost(image, 3 * image * batch * steps)


# The command line


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = CommandParser(
        prog="diffstride study",
        usage="diffstride study FILE.yaml [--dry-run] [--processes N | --ray ADDRESS] [--ARGUMENT VALUE ...]",
        description=DESCRIPTION,
    )
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="the study")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--name", help="folder of the study inside RUNS (default: the study's name)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs with their state and cost, do none")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--processes", type=int, metavar="N", help="do N runs at a time, each in a process of its own")
    where.add_argument("--ray", metavar="ADDRESS", help="do the runs on a Ray cluster: auto, local, or host:port")
    options, rest = parser.parse_known_args(arguments)
    if options.processes is not None and options.processes < 1:
        raise UsageError(f"--processes must be at least 1, got {options.processes}")
    return options, dict(_settings(rest, parser))


def _settings(arguments: Sequence[str], parser: CommandParser) -> Iterator[tuple[str, Any]]:
    """`--key value` and `--key=value`; not what is nearly one of our own options."""
    left = list(arguments)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if "." not in name and (near := parser.nearest(name)):
            raise UsageError(f"unknown option {name}{near}")
        if not name.startswith("--") or not (equals or left):
            raise UsageError(f"cannot read the argument {name!r}: arguments for the runs are given as --NAME VALUE")
        value = value if equals else left.pop(0)
        try:
            yield name[2:], load_yaml(value)
        except yaml.YAMLError as error:
            raise UsageError(f"{name} is not YAML: {value!r}") from error
