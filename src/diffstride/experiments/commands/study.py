"""`diffstride study`: the runs of a study, then its tables and figures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from diffstride.errors import UsageError
from diffstride.experiments.console import PlainConsole, make_table
from diffstride.experiments.parser import CommandParser, at_least
from diffstride.experiments.studies.executors import Executor, Processes, Ray, in_process
from diffstride.experiments.studies.pictures import FIGURES
from diffstride.experiments.studies.results import row_of
from diffstride.experiments.studies.runner import check_same, estimate_costs, run_study
from diffstride.experiments.studies.study import Study, label_of, load_study
from diffstride.experiments.training.documents import load_yaml
from diffstride.experiments.training.fit import quiet
from diffstride.experiments.training.folders import STUDY, check_name, locked

DESCRIPTION = """Do the runs of a study, then make its tables and figures; everything is in RUNS/NAME.

  diffstride study configs/studies/table3-small.yaml --dry-run       (list the runs and their cost)
  diffstride study configs/studies/table3-small.yaml --processes 2
  diffstride study configs/studies/table3.yaml --ray auto            (on the Ray cluster of this machine)
  diffstride study configs/studies/table3-small.yaml --data.path cifar10

A finished run is never repeated. After an interruption, the same command continues the study: unfinished runs resume
from their last checkpoint, failed runs are tried again. Any argument of `diffstride fit` applies to all runs, unless an
axis of the study sets it."""


def study(arguments: Sequence[str]) -> None:
    """Do the study and print the tables."""
    options, settings = _options(arguments)
    plan = load_study(options.file, settings, tuple(FIGURES))
    source = f"{options.file}: the name of the study" if options.name is None else "--name"
    folder = Path(options.runs).expanduser() / check_name(source, plan.name if options.name is None else options.name)
    check_same(plan, folder)
    console = PlainConsole(width=100)
    if options.dry_run:
        _list(plan, folder, console)
        return
    executor: Executor = in_process
    if options.processes:
        executor = Processes(options.processes)
    elif options.ray and any(row_of(folder, run.name, run.axes).state != "done" for run in plan.runs):
        executor = Ray(options.ray, plan.definition["cpus"], plan.definition["gpus"])
    with locked(folder, STUDY):
        run_study(plan, folder, executor, console)


def _list(plan: Study, folder: Path, console: PlainConsole) -> None:
    with console.status("building the networks"), quiet():
        costs = estimate_costs(plan)
    headings = "run", "state", "million MACs per sample, at the start", "training, in 10¹² MACs"
    table = make_table(f"{plan.name}: {len(plan.runs)} runs in {folder}", *headings)
    left = 0.0
    for run in plan.runs:
        state, cost = row_of(folder, run.name, run.axes).state, costs[label_of(run.axes)]
        left += cost.training * (state != "done")
        table.add_row(run.name, state, f"{cost.image / 1e6:.3g}", f"{cost.training / 1e12:.3g}")
    console.print(table)
    console.say(f"Left to do: {left / 1e12:.4g} · 10¹² MACs, if the strides do not change.")


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = CommandParser(
        prog="diffstride study",
        usage="diffstride study FILE.yaml [--dry-run] [--processes N | --ray ADDRESS] [--ARGUMENT VALUE ...]",
        description=DESCRIPTION,
    )
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="file of the study")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--name", help="folder of the study inside RUNS (default: the study's name)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs with their state and cost, and stop")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--processes", type=at_least(1), metavar="N", help="do N runs at a time, each in its own process"
    )
    where.add_argument("--ray", metavar="ADDRESS", help="do the runs on a Ray cluster: auto, local, or host:port")
    options, rest = parser.parse_known_args(arguments)
    return options, dict(_settings(rest, parser))


def _settings(arguments: Sequence[str], parser: CommandParser) -> Iterator[tuple[str, Any]]:
    """Yield the arguments for the runs, given as `--key value` or `--key=value`."""
    left = list(arguments)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if "." not in name and (near := parser.nearest(name)):
            raise UsageError(f"unknown option {name}{near}")
        if not name.startswith("--") or not (equals or left):
            raise UsageError(f"cannot read the argument {name!r}: arguments for the runs are given as --NAME VALUE")
        value = value if equals else left.pop(0)
        try:
            parsed = load_yaml(value)
        except yaml.YAMLError as error:
            raise UsageError(f"{name} is not YAML: {value!r}") from error
        except ValueError:  # of a date that does not exist
            parsed = value
        yield name[2:], value if isinstance(parsed, date) else parsed  # no setting is a date
