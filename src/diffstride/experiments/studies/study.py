"""A study: a YAML file that stands for a list of runs. Reading it, naming the runs, checking them before any starts."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from diffstride._files import describe_os_error
from diffstride._text import did_you_mean, one_line
from diffstride.errors import UsageError
from diffstride.experiments.models.downsample import METHODS
from diffstride.experiments.training.config_errors import flatten
from diffstride.experiments.training.documents import read_yaml
from diffstride.experiments.training.fit import parse
from diffstride.experiments.training.folders import as_name, check_name

# What an axis of a study is called, and the argument of `diffstride fit` that it sets. Any other argument of `fit` can
# be an axis under its own name.
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
# A value that a number alone would not explain, in the names of runs.
_SHOWN = {
    "setting": "{}", "task": "{}", "method": "{}", "strides": "{}", "dataset": "{}",
    "window": "{}", "basis": "{}", "exploration": "{}",
    "smoothness": "R{}", "cost_weight": "cost{}", "stride_lr": "lr{}",
}  # fmt: skip


FILES = "study.yaml", "results.csv", "table.md", "provenance.json", "latency.json", "report.html"  # beside the runs


class Request(NamedTuple):
    """What a run is asked to do: a configuration of `fit`, arguments that go over it, and CPUs to run on."""

    config: dict[str, Any]
    settings: dict[str, Any]
    cpus: int

    def arguments(self) -> list[str]:
        """As `diffstride fit` takes them."""
        pairs = [(f"--{key}", _argument(value)) for key, value in self.settings.items()]
        return ["--config", json.dumps(self.config), *itertools.chain.from_iterable(pairs)]

    def differences(self, other: Request) -> list[str]:
        """The settings in which another request differs, in words; CPUs make no difference to what is learned."""
        mine, its = self._flat(), other._flat()
        return [
            f"{key} {json.dumps(its.get(key))}, now {json.dumps(mine.get(key))}"
            for key in {**its, **mine}
            if mine.get(key) != its.get(key)
        ]

    def _flat(self) -> dict[str, Any]:
        return dict(flatten(self.config)) | self.settings


class StudyRun(NamedTuple):
    """One run of a study."""

    name: str
    axes: dict[str, Any]
    request: Request


@dataclass(frozen=True)
class Study:
    """A list of runs, and what to make of them.

    Attributes:
        name: of its folder.
        question: that it answers, in one sentence.
        runs: in the order in which they are done.
        tables: see :func:`diffstride.experiments.studies.results.pivot`.
        figures: names of figures to draw.
        latency: samples in the batch on which frozen networks are timed; None: they are not.
        notes: what a reader must know to judge the result.
        cpus: threads of a run.
        gpus: that a run takes, a fraction if several share one. Ray reads it.
        definition: the file's content, as it is kept with the results.
    """

    name: str
    question: str
    runs: tuple[StudyRun, ...]
    tables: tuple[dict[str, Any], ...] = ()
    figures: tuple[str, ...] = ()
    latency: int | None = None
    notes: str = ""
    cpus: int = 1
    gpus: float = 0
    definition: dict[str, Any] = field(default_factory=dict)


_KEYS = (
    "name", "question", "notes", "base", "settings", "axes", "tables", "figures", "latency", "cpus", "gpus",
)  # fmt: skip


def load_study(file: Path, settings: Mapping[str, Any] | None = None, figures: Sequence[str] = ()) -> Study:
    """Read a study's file, and check all its runs as far as can be without running them.

    The file has these keys: ``question``; ``base``, a configuration of ``diffstride fit``, by its path from the file;
    ``settings``, arguments for all runs; ``axes``, a mapping from an axis to its values, or a list of such mappings,
    each of which stands for all combinations of its values; ``tables``, ``figures``, ``latency``, ``notes``, ``cpus``
    and ``gpus`` (see :class:`Study`). An axis is one of :data:`AXES` or an argument of ``fit`` by its dotted name. Its
    values are a value, a list of them, or a mapping from labels to settings, where a value takes several arguments.

    Args:
        file: the YAML file.
        settings: arguments over those of the file, for all runs.
        figures: names of the figures that can be drawn.

    Raises:
        UsageError: whatever is wrong, in one line that names the file and the place in it.
    """
    definition = _read_yaml(file)
    _known(f"{file}:", "key", definition, _KEYS)
    for key in ("base", "axes"):
        if not definition.get(key):
            raise UsageError(f"{file}: the key {key!r} is missing")
    for key in ("name", "question", "notes", "base"):
        if not isinstance(definition.get(key, ""), str):
            raise UsageError(f"{file}: {key} must be a text, got {json.dumps(definition[key])}")
    config = _read_yaml(file.parent / str(definition["base"]), f" (the base of {file})")
    for key in ("name", "runs", "ckpt_path"):
        config.pop(key, None)
    common = _mapping(file, "settings", definition.get("settings") or {}) | dict(settings or {})
    cpus, gpus, latency = definition.get("cpus", 1), definition.get("gpus", 0), definition.get("latency")
    for key, value, least, kinds in (
        ("cpus", cpus, 1, int),
        ("gpus", gpus, 0, (int, float)),
        ("latency", latency, 1, int),
    ):
        if (value is not None or key != "latency") and (not isinstance(value, kinds) or value < least):
            raise UsageError(f"{file}: {key} must be a number >= {least}, got {value!r}")
    grids = definition["axes"] if isinstance(definition["axes"], list) else [definition["axes"]]
    runs = [
        StudyRun(run_name(axes), axes, Request(config, {**common, **chosen}, cpus))
        for grid in grids
        for axes, chosen in _combinations(file, _mapping(file, "axes", grid), settings or {})
    ]
    own = {*FILES, *(f"{figure}.{suffix}" for figure in figures for suffix in ("png", "svg"))}
    for run in runs:
        check_name(f"{file}: axes: the name of a run, made of its values,", run.name)
        if run.name.casefold() in own:
            raise UsageError(
                f"{file}: axes: the name of a run must not be that of a file of the study, got {run.name} (a mapping "
                "gives values labels of their own)"
            )
    names = Counter(run.name.casefold() for run in runs)  # some file systems take capitals for small letters
    if twice := [run.name for run in runs if names[run.name.casefold()] > 1]:
        raise UsageError(
            f"{file}: axes: the run {twice[0]} is there twice: values must differ, in more than capitals and signs (a "
            "mapping gives them labels of their own), and one value of strides is a list"
        )
    wanted = {key: definition.get(key) or [] for key in ("tables", "figures")}
    for key, value in wanted.items():
        if not isinstance(value, list):
            raise UsageError(f"{file}: {key} must be a list, got {json.dumps(value, default=str)}")
    study = Study(
        name=str(definition.get("name") or file.stem),
        question=str(definition.get("question", "")),
        runs=tuple(runs),
        tables=tuple(_tables(file, wanted["tables"], runs)),
        figures=tuple(_one_of(f"{file}: figures", name, figures) for name in wanted["figures"]),
        latency=latency,
        notes=str(definition.get("notes", "")),
        cpus=cpus,
        gpus=gpus,
        definition=definition | {"config": config, "settings": common},
    )
    tried: set[str] = set()
    for run in study.runs:
        values = {f"{axis} {value}" for axis, value in run.axes.items()}
        if values <= tried:  # parsing takes a moment: each value of each axis once, not every combination
            continue
        tried |= values
        try:
            parse(run.request.arguments())
        except UsageError as error:
            raise UsageError(f"{file}: run {run.name}: {error}") from error
    return study


def _combinations(
    file: Path, grid: Mapping[str, Any], fixed: Mapping[str, Any]
) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """All combinations of a grid: the labels of the axes, and the settings of `fit` that they stand for."""
    axes: list[list[tuple[str, Any, dict[str, Any]]]] = []
    for axis, values in grid.items():
        if axis not in AXES and "." not in axis and not isinstance(values, Mapping):
            _one_of(f"{file}: axes", axis, [*AXES], " or an argument of fit by its dotted name")
        if isinstance(values, Mapping):
            choices = [(axis, label, _mapping(file, f"axes: {axis}", chosen)) for label, chosen in values.items()]
        else:
            values = values if isinstance(values, list) else [values]
            choices = [(axis, value, {AXES.get(axis, axis): value}) for value in values]
        if not choices:
            raise UsageError(f"{file}: axes: {axis} has no values")
        for _, value, chosen in choices:
            if axis == "method":
                _one_of(f"{file}: axes: method", value, METHODS)
            if overridden := sorted(set(chosen) & set(fixed)):
                raise UsageError(f"--{overridden[0]} cannot be given: the axis {axis} of {file} sets it")
        axes.append(choices)
    for combination in itertools.product(*axes):
        settings: dict[str, Any] = {}
        for _, _, chosen in combination:
            settings |= chosen
        yield {axis: value for axis, value, _ in combination}, settings


def run_name(axes: Mapping[str, Any]) -> str:
    """The folder of the run with these values of the study's axes, such as `diffstride-2-2-2-seed0`."""
    return as_name("-".join(shown(axis, value) for axis, value in axes.items()))


def label_of(axes: Mapping[str, Any]) -> str:
    """What runs that differ in the seed alone have in common, such as `diffstride 2-2-2`."""
    return " ".join(shown(axis, value) for axis, value in axes.items() if axis != "seed") or "all runs"


def shown(axis: str, value: Any) -> str:
    """The value of an axis, in the names of runs."""
    if axis == "strides" and isinstance(value, list):
        return "-".join("x".join(map(_number, v)) if isinstance(v, list) else _number(v) for v in value)
    text = _number(value)
    if axis == "dataset":
        text = Path(text).name
    return _SHOWN.get(axis, axis.rsplit(".", 1)[-1] + "{}").format(text)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _tables(file: Path, tables: Any, runs: Sequence[StudyRun]) -> Iterable[dict[str, Any]]:
    axes = {axis for run in runs for axis in run.axes}
    for given in tables:
        table = _mapping(file, "tables", given)
        _known(f"{file}: tables:", "key", table, ("title", "rows", "columns", "value", "paper", "where"))
        value = _one_of(
            f"{file}: tables: value", table.setdefault("value", "accuracy"), ("accuracy", "macs", "cutoffs")
        )
        for key in ("rows", "columns"):
            if key == "rows" or value != "cutoffs":
                _one_of(f"{file}: tables: {key}", table.get(key), sorted(axes))
            elif key in table:
                raise UsageError(f"{file}: tables: columns cannot be given for the value cutoffs, which has its own")
        for axis, wanted in _mapping(file, "tables: where", table.setdefault("where", {})).items():
            _one_of(f"{file}: tables: where", axis, sorted(axes))
            if all(run.axes.get(axis) != wanted for run in runs):
                raise UsageError(f"{file}: tables: where: no run has {axis} {wanted!r}")
        if "paper" in table:
            published = ["table2"] if value == "cutoffs" else ["release", "table1", "table3"]
            _one_of(f"{file}: tables: paper", table["paper"], published)
        yield table


PAPER = Path(__file__).parent / "paper"  # the published tables


def _read_yaml(file: Path, what: str = "") -> dict[str, Any]:
    try:
        content = read_yaml(file)
    except OSError as error:
        raise UsageError(f"{describe_os_error(error, f'{file}{what}')}; it must be a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{file}{what} is not YAML: {one_line(error)}") from error
    try:
        json.dumps(content)
    except TypeError as error:  # YAML has dates, which no argument of `fit` is
        raise UsageError(f"{file}{what} has a value that is no text, number, list or mapping: {error}") from error
    return _mapping(file, "the file", content)


def _mapping(file: Path, place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(
            f"{file}: {place} must be a mapping from names to values, got {json.dumps(value, default=str)}"
        )
    return value


def _known(place: str, what: str, given: Iterable[str], names: Sequence[str]) -> None:
    for name in given:
        _one_of(f"{place} {what}", name, names)


def _one_of(place: str, name: Any, names: Sequence[str], more: str = "") -> Any:
    if name not in names:
        near = did_you_mean(name, names)
        raise UsageError(f"{place} must be one of {', '.join(names)}{more}, got {name!r}{near}")
    return name


def _argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
