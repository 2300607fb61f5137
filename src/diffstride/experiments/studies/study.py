"""A study: a YAML file that stands for a list of runs. It is read and checked before any run starts."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import yaml

from diffstride._files import describe_os_error
from diffstride._text import did_you_mean, one_line
from diffstride.errors import UsageError
from diffstride.experiments.models.downsample import METHODS
from diffstride.experiments.training.documents import flatten, read_yaml
from diffstride.experiments.training.fit import parse
from diffstride.experiments.training.folders import as_name, check_name
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
# Forms of values in the names of runs; a value of another axis follows the name of its axis.
_FORMS = {
    "setting": "{}", "task": "{}", "method": "{}", "strides": "{}", "dataset": "{}",
    "window": "{}", "basis": "{}", "exploration": "{}",
    "smoothness": "R{}", "cost_weight": "cost{}", "stride_lr": "lr{}",
}  # fmt: skip
PAPER_TABLES = {"accuracy": ("release", "table1", "table3"), "cutoffs": ("table2",)}  # by the value that they show


class TableDefinition(TypedDict, total=False):
    """A table in a study's file; see `diffstride.experiments.studies.results.pivot`."""

    title: str
    rows: str
    columns: str
    value: str
    paper: str
    where: dict[str, Any]


class Definition(TypedDict, total=False):
    """The keys of a study's file; see `load_study`."""

    name: str
    question: str
    notes: str
    base: str
    settings: dict[str, Any] | None
    axes: dict[str, Any] | list[dict[str, Any]] | None
    tables: list[TableDefinition] | None
    figures: list[str] | None
    latency: int | None
    cpus: int
    gpus: float


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
    """One run of a study."""

    name: str
    axes: dict[str, Any]
    request: Request


@dataclass(frozen=True)
class Study:
    """A list of runs, with the tables and figures to make of them.

    Attributes:
        name: Name of its folder.
        runs: Runs in the order in which they are done.
        figures: Names of figures to draw.
        latency: Samples in the batch on which frozen networks are timed; None to time none.
        cpus: Threads of a run.
        gpus: GPUs of a run, a fraction if several share one. Only Ray uses it.
        definition: Content of the file, as it is kept with the results.
    """

    name: str
    runs: tuple[StudyRun, ...]
    figures: tuple[str, ...] = ()
    latency: int | None = None
    cpus: int = 1
    gpus: float = 0
    definition: dict[str, Any] = field(default_factory=dict)


def load_study(file: Path, settings: Mapping[str, Any] | None = None, figures: Sequence[str] = ()) -> Study:
    """Read a study's file, and check all its runs as far as is possible without running them.

    The file has these keys:

    - `question` and `notes`: texts that stand above the tables;
    - `base`: a configuration of `diffstride fit`, by its path from the file;
    - `settings`: arguments for all runs;
    - `axes`: a mapping from an axis to its values, or a list of such mappings. Each mapping stands for all combinations
      of its values. An axis is one of `AXES`, or an argument of `fit` by its dotted name. Its values are a value, a
      list of them, or a mapping from labels to settings, where a value takes several arguments;
    - `tables`, `figures`, `latency`, `cpus`, `gpus`: see `Study`.

    Args:
        file: The YAML file.
        settings: Arguments that override those of the file, for all runs.
        figures: Names of the figures that can be drawn.

    Raises:
        UsageError: The file has a mistake. The message is one line that names the file and the place in it.
    """
    definition = _read_yaml(file)
    for key in definition:
        _one_of(f"{file}: key", key, [*Definition.__annotations__])
    _check(definition, Definition, str(file))
    for key in ("base", "axes"):
        if not definition.get(key):
            raise UsageError(f"{file}: the key {key!r} is missing")
    config = _read_yaml(file.parent / definition["base"], f" (the base of {file})")
    for key in ("name", "runs", "ckpt_path"):
        config.pop(key, None)
    common = (definition.get("settings") or {}) | dict(settings or {})
    cpus = definition.get("cpus", 1)
    grids = definition["axes"] if isinstance(definition["axes"], list) else [definition["axes"]]
    runs = [
        StudyRun(run_name(axes), axes, Request(config, {**common, **chosen}, cpus))
        for grid in grids
        for axes, chosen in _combinations(file, grid, settings or {})
    ]
    names = Counter(run.name.casefold() for run in runs)  # some file systems do not distinguish cases
    for run in runs:
        check_name(f"{file}: axes: the name of a run, made of its values,", run.name)
        if names[run.name.casefold()] > 1:
            raise UsageError(
                f"{file}: axes: the run {run.name} is there twice: values must differ, in more than capitals and signs "
                "(a mapping gives them labels of their own), and one value of strides is a list"
            )
    for figure in definition.get("figures") or ():
        _one_of(f"{file}: figures", figure, figures)
    for table in definition.get("tables") or ():
        _check_table(file, table, runs)
    checked: set[str] = set()
    for run in runs:
        values = {f"{axis} {value}" for axis, value in run.axes.items()}
        if values <= checked:  # parsing is slow: each value of each axis is parsed once, not every combination
            continue
        checked |= values
        try:
            parse(run.request.arguments())
        except UsageError as error:
            raise UsageError(f"{file}: run {run.name}: {error}") from error
    return Study(
        name=str(definition.get("name") or file.stem),
        runs=tuple(runs),
        figures=tuple(definition.get("figures") or ()),
        latency=definition.get("latency"),
        cpus=cpus,
        gpus=definition.get("gpus", 0),
        definition=definition | {"config": config, "settings": common},
    )


def _combinations(
    file: Path, grid: Mapping[str, Any], fixed: Mapping[str, Any]
) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the labels of each combination of a grid's values, and the settings of `fit` for it."""
    axes: list[list[tuple[str, Any, dict[str, Any]]]] = []
    for axis, values in grid.items():
        if isinstance(values, dict):
            _check(values, dict[str, dict[str, Any]], f"{file}: axes: {axis}")
            choices = [(axis, label, chosen) for label, chosen in values.items()]
        else:
            if "." not in axis:
                _one_of(f"{file}: axes", axis, [*AXES], " or an argument of fit by its dotted name")
            values = values if isinstance(values, list) else [values]
            choices = [(axis, value, {AXES.get(axis, axis): value}) for value in values]
        if not choices:
            raise UsageError(f"{file}: axes: {axis} has no values")
        for _, value, chosen in choices:
            if axis == "method":
                _one_of(f"{file}: axes: method", value, [*METHODS])
            if overridden := sorted(set(chosen) & set(fixed)):
                raise UsageError(f"--{overridden[0]} cannot be given: the axis {axis} of {file} sets it")
        axes.append(choices)
    for combination in itertools.product(*axes):
        settings: dict[str, Any] = {}
        for _, _, chosen in combination:
            settings |= chosen
        yield {axis: value for axis, value, _ in combination}, settings


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
    text = _number(value)
    if axis == "dataset":
        text = Path(text).name
    return _FORMS.get(axis, axis.rsplit(".", 1)[-1] + "{}").format(text)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_table(file: Path, table: TableDefinition, runs: Sequence[StudyRun]) -> None:
    """Check a table, so that a mistake is found before the runs and not after them."""
    axes = sorted({axis for run in runs for axis in run.axes})
    for key in table:
        _one_of(f"{file}: tables: key", key, [*TableDefinition.__annotations__])
    value = _one_of(f"{file}: tables: value", table.get("value", "accuracy"), ("accuracy", "macs", "cutoffs"))
    for key in ("rows",) if value == "cutoffs" else ("rows", "columns"):
        _one_of(f"{file}: tables: {key}", table.get(key), axes)
    for axis, wanted in table.get("where", {}).items():
        if all(run.axes.get(axis) != wanted for run in runs):
            raise UsageError(f"{file}: tables: where: no run has {axis} {wanted!r}")
    if "paper" in table:
        _one_of(f"{file}: tables: paper", table["paper"], PAPER_TABLES.get(value, ()))


def _read_yaml(file: Path, role: str = "") -> dict[str, Any]:
    try:
        content = read_yaml(file)
    except OSError as error:
        raise UsageError(f"{describe_os_error(error, f'{file}{role}')}; it must be a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{file}{role} is not YAML: {one_line(error)}") from error
    _check(content, dict[str, Any], str(file))
    return dict(content)


def _check(value: Any, kind: Any, place: str) -> None:
    try:
        check_kind(value, kind, place)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _one_of(place: str, name: Any, names: Sequence[str], more: str = "") -> Any:
    if name not in names:
        raise UsageError(f"{place} must be one of {', '.join(names)}{more}, got {name!r}{did_you_mean(name, names)}")
    return name
