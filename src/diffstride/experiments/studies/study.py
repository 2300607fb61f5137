"""A study: a YAML file that stands for a list of runs. It is read and checked before any run starts."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, get_type_hints

import yaml

from diffstride._text import did_you_mean, one_line
from diffstride.errors import UsageError
from diffstride.experiments.models.downsample import METHODS
from diffstride.experiments.training.documents import flatten, read_yaml
from diffstride.experiments.training.fit import parse
from diffstride.experiments.training.folders import as_name
from diffstride.experiments.training.schema import check_kind

# Names of axes, and the arguments of `diffstride fit` that they set. Any other argument of `fit` can be an axis under
# its own name.
AXES = {
    "method": "model.network.downsample",
    "strides": "model.network.strides",
    "seed": "seed_everything",
    "dataset": "data.path",
    "width": "model.network.width",
    "cost_weight": "model.cost_weight",
    "budget": "model.budget",
    "exploration": "model.exploration",
    "stride_lr": "model.stride_lr",
    "smoothness": "model.network.downsample_options.smoothness",
    "window": "model.network.downsample_options.window",
    "basis": "model.network.downsample_options.basis",
}
# What stands before values in the names of runs; before a value of another axis, the name of its axis does.
_PREFIXES = {
    **dict.fromkeys(("setting", "task", "method", "strides", "dataset", "window", "basis", "exploration"), ""),
    "smoothness": "R", "cost_weight": "cost", "stride_lr": "lr",
}  # fmt: skip
PAPER_TABLES = {"accuracy": ("release", "table1", "table3"), "cutoffs": ("table2",)}  # by the value that they show


class TableDefinition(TypedDict, total=False):
    """A table in a study's file; see `diffstride.experiments.studies.results.pivot`."""

    title: str
    rows: str
    columns: str
    value: str
    paper: str
    over: Any
    where: dict[str, Any]


class OptionalKeys(TypedDict, total=False):
    """The keys that a study's file may have; see `load_study`."""

    name: str
    question: str
    notes: str
    settings: dict[str, Any]
    tables: list[TableDefinition]
    figures: list[str]
    compare: str
    latency: int
    cpus: int
    gpus: float


class Definition(OptionalKeys):
    """The keys of a study's file."""

    base: str
    axes: dict[str, Any] | list[dict[str, Any]]


class Request(NamedTuple):
    """A request for a run: a configuration of `fit`, arguments that override it, and the number of CPUs."""

    config: dict[str, Any]
    settings: dict[str, Any]
    cpus: int

    def arguments(self) -> list[str]:
        """Return the arguments for `diffstride fit`."""
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.settings.items()}
        pairs = [(f"--{key}", text) for key, text in texts.items()]
        return ["--config", json.dumps(self.config), *itertools.chain.from_iterable(pairs)]

    def differences(self, other: Request) -> list[str]:
        """Return a text for each setting in which another request differs; CPUs do not count."""
        mine, its = (dict(flatten(request.config)) | request.settings for request in (self, other))
        return [
            f"{key} {json.dumps(its.get(key))}, now {json.dumps(mine.get(key))}"
            for key in {**its, **mine}
            if mine.get(key) != its.get(key)
        ]


class StudyRun(NamedTuple):
    """One run of a study, with the name of its folder and its values of the axes."""

    name: str
    axes: dict[str, Any]
    request: Request


class Study(NamedTuple):
    """A study: its name, its runs in the order in which they are done, and its file's content with defaults."""

    name: str
    runs: list[StudyRun]
    definition: dict[str, Any]


def load_study(file: Path, settings: Mapping[str, Any] | None = None, figures: Sequence[str] = ()) -> Study:
    """Read a study's file, and check all its runs as far as is possible without running them.

    The file has these keys:

    - `question` and `notes`: texts that stand above the tables;
    - `base`: a configuration of `diffstride fit`, by its path from the file;
    - `settings`: arguments for all runs;
    - `axes`: a mapping from an axis to its values, or a list of such mappings. Each mapping stands for all combinations
      of its values. An axis is one of `AXES`, or an argument of `fit` by its dotted name. Its values are a value, a
      list of them, or a mapping from labels to settings, where a value takes several arguments;
    - `tables`: see `results.pivot` and `results.cutoffs`;
    - `figures`: names of figures to draw, of those in the argument `figures`;
    - `compare`: the name of the runs (all values of the axes but the seed) with which the others are compared by seed;
    - `latency`: samples in the batch on which frozen networks are timed; none are by default;
    - `cpus`: threads of a run, 1 by default;
    - `gpus`: GPUs of a run, a fraction if several share one, 0 by default. Only Ray uses it.

    The argument `settings` overrides that of the file.

    Raises:
        UsageError: The file has a mistake. The message is one line that names the file and the place in it.
    """
    try:
        return _load(file, settings or {}, figures)
    except (yaml.YAMLError, ValueError) as error:
        problem = "it or its base is not YAML: " if isinstance(error, yaml.YAMLError) else ""
        raise UsageError(f"{file}: {problem}{one_line(error)}") from error


def _load(file: Path, overrides: Mapping[str, Any], figures: Sequence[str]) -> Study:
    content = read_yaml(file)
    check_kind(content, Definition, "a study")
    definition = {"figures": [], "tables": [], "cpus": 1, "gpus": 0, **content}
    for key in definition:
        _one_of("key", key, [*get_type_hints(Definition)])
    config = read_yaml(file.parent / definition["base"])
    check_kind(config, dict[str, Any], f"the base {definition['base']}")
    for key in ("name", "runs", "ckpt_path"):
        config.pop(key, None)
    common = definition.get("settings", {}) | dict(overrides)
    grids = definition["axes"] if isinstance(definition["axes"], list) else [definition["axes"]]
    runs = [
        StudyRun(run_name(axes), axes, Request(config, common | chosen, definition["cpus"]))
        for grid in grids
        for axes, chosen in _combinations(grid, overrides)
    ]
    names = Counter(run.name.casefold() for run in runs)  # some file systems do not distinguish cases
    if twice := [run.name for run in runs if names[run.name.casefold()] > 1]:
        raise UsageError(
            f"axes: the run {twice[0]} is there twice: values must differ, in more than capitals and signs "
            "(a mapping gives them labels of their own), and one value of strides is a list"
        )
    for figure in definition["figures"]:
        _one_of("figures", figure, figures)
    for table in definition["tables"]:
        _check_table(table, runs)
    if "compare" in definition:
        _one_of("compare", definition["compare"], [*dict.fromkeys(label_of(run.axes) for run in runs)])
    checked: set[str] = set()
    for run in runs:
        values = {f"{axis} {value}" for axis, value in run.axes.items()}
        if not values <= checked:  # parsing is slow: each value of each axis is parsed once, not every combination
            checked |= values
            parse(run.request.arguments())
    return Study(definition.get("name") or file.stem, runs, definition | {"config": config, "settings": common})


def _combinations(grid: Mapping[str, Any], fixed: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the labels of each combination of a grid's values, and the settings of `fit` for it."""
    axes: list[list[tuple[Any, dict[str, Any]]]] = []
    for axis, values in grid.items():
        if isinstance(values, dict):
            check_kind(values, dict[str, dict[str, Any]], f"axes: {axis}")
            choices = list(values.items())
        else:
            if "." not in axis:
                _one_of("axes", axis, [*AXES], " or an argument of fit by its dotted name")
            key = AXES.get(axis, axis)
            choices = [(value, {key: value}) for value in (values if isinstance(values, list) else [values])]
        for value, chosen in choices:
            if axis == "method":
                _one_of("axes: method", value, [*METHODS])
            if overridden := sorted(set(chosen) & set(fixed)):
                raise UsageError(f"--{overridden[0]} cannot be given: the axis {axis} of the study sets it")
        axes.append(choices)
    for combination in itertools.product(*axes):
        labels = {axis: value for axis, (value, _) in zip(grid, combination, strict=True)}
        yield labels, {key: value for _, chosen in combination for key, value in chosen.items()}


def run_name(axes: Mapping[str, Any]) -> str:
    """Return the folder of the run with these values of the study's axes, such as `diffstride-2-2-2-seed0`."""
    return as_name("-".join(shown(axis, value) for axis, value in axes.items()))


def label_of(axes: Mapping[str, Any]) -> str:
    """Return the common name of runs that differ in the seed alone, such as `diffstride 2-2-2`."""
    return " ".join(shown(axis, value) for axis, value in axes.items() if axis != "seed") or "all runs"


def shown(axis: str, value: Any) -> str:
    """Return the value of an axis as it stands in the names of runs."""
    if axis == "strides" and isinstance(value, list):
        return "-".join("x".join(map(_number, v)) if isinstance(v, list) else _number(v) for v in value)
    text = Path(str(value)).name if axis == "dataset" else _number(value)
    return _PREFIXES.get(axis, axis.rsplit(".", 1)[-1]) + text


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_table(table: TableDefinition, runs: Sequence[StudyRun]) -> None:
    """Check a table, so that a mistake is found before the runs and not after them."""
    axes = sorted({axis for run in runs for axis in run.axes})
    for key in table:
        _one_of("tables: key", key, [*TableDefinition.__annotations__])
    value = table.get("value", "accuracy")
    _one_of("tables: value", value, ("accuracy", "macs", "cutoffs"))
    for key in ("rows",) if value == "cutoffs" else ("rows", "columns"):
        _one_of(f"tables: {key}", table.get(key), axes)
    for axis, wanted in table.get("where", {}).items():
        _one_of(f"tables: where: {axis}", wanted, [run.axes.get(axis) for run in runs])
    if "over" in table:
        _one_of("tables: value beside over", value, ("accuracy",))
        _one_of("tables: over", table["over"], [run.axes.get(table["columns"]) for run in runs])
    if "paper" in table:
        _one_of("tables: paper", table["paper"], PAPER_TABLES.get(value, ()))


def _one_of(place: str, given: Any, known: Sequence[Any], more: str = "") -> None:
    if given not in known:
        names = [*dict.fromkeys(map(str, known))]
        raise UsageError(f"{place} must be one of {', '.join(names)}{more}, got {given!r}{did_you_mean(given, names)}")
