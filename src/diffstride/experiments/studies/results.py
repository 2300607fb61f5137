"""What a study has found: rows of runs, and tables made of them."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import yaml

from diffstride._files import atomic_write_text
from diffstride._text import csv_cell, one_line, printable
from diffstride.errors import UsageError
from diffstride.experiments.studies.study import PAPER, label_of, shown
from diffstride.experiments.training.documents import read_json, read_yaml
from diffstride.experiments.training.folders import check_name
from diffstride.experiments.training.runs import read_result
from diffstride.experiments.training.schema import check_kind

METHODS = {
    "conv": "strided convolution",
    "avg": "average pooling",
    "max": "max pooling",
    "blur": "blur pooling",
    "spectral": "spectral pooling",
    "diffstride": "DiffStride",
}
_IN_PAPER = {"conv": "strided", "spectral": "spectral", "diffstride": "diffstride"}  # as the paper's tables have them


MULTI = "Multi-task model"  # as the paper's Table 2 has it


class Row(NamedTuple):
    """A run of a study.

    Attributes:
        name: its folder in the study's.
        state: "done", "failed", "unfinished" (it has a checkpoint) or "open" (not started, or not far).
        axes: what the study varies, as in its YAML file.
        result: `result.json` when done.
        error: one line, when failed.
    """

    name: str
    state: str
    axes: dict[str, Any]
    result: Mapping[str, Any] | None = None
    error: str | None = None


def row_of(folder: Path, name: str, axes: dict[str, Any]) -> Row:
    """A run as its folder has it."""
    result = read_result(folder / name)
    if result is not None:
        return Row(name, "done", axes, result)
    try:
        return Row(name, "failed", axes, error=str(read_json(folder / name / "failed.json")["error"]))
    except (OSError, ValueError, KeyError, TypeError):
        started = (folder / name / "checkpoints" / "last.ckpt").exists()
        return Row(name, "unfinished" if started else "open", axes)


def is_study(folder: Path) -> bool:
    """Whether a folder is that of a study."""
    return (folder / "study.yaml").is_file()


def read_study(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """A study's definition as it was last run, and its runs in order.

    Raises:
        UsageError: a folder that is not a study's.
    """
    try:
        kept: dict[str, Any] = read_yaml(folder / "study.yaml")
        check_kind(kept, _Kept)
        runs = {check_name("the name of a run", name): axes for name, axes in kept["runs"].items()}
        kept |= {"tables": [_asked(**table) for table in kept.get("tables") or []]}
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder} is not the folder of a study: study.yaml cannot be read ({one_line(error)}); "
            "`diffstride study` writes it anew"
        ) from error
    return kept, [row_of(folder, name, axes) for name, axes in runs.items()]


class _TableAskedFor(TypedDict, total=False):
    title: str
    rows: str
    columns: str
    value: str
    paper: str
    where: dict[str, Any]


class _RunsOfAStudy(TypedDict):
    runs: dict[str, dict[str, Any]]


class _Kept(_RunsOfAStudy, total=False):
    name: str | None
    question: str | None
    notes: str | None
    tables: list[_TableAskedFor] | None


def _asked(*, rows: str, columns: str = "", value: str = "accuracy", **more: Any) -> dict[str, Any]:
    """A table as a study asks for it; raises where it is damaged."""
    if more.get("paper", "table1") not in _KEYS:
        raise ValueError(f"the paper has no table {more['paper']!r:.50}")
    if value != "cutoffs" and (value not in _VALUES or not columns):
        raise ValueError(f"a table of {value} needs columns" if value in _VALUES else f"no table has the value {value}")
    return {"rows": rows, "value": value, **({"columns": columns} if columns else {}), **more}


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by label, those together that differ in the seed alone."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(label_of(row.axes), []).append(row)
    return found


def striding_factor(result: Mapping[str, Any], key: str = "strides") -> float | None:
    """The product of all learned strides, over layers and axes: how many times fewer samples the last map has."""
    layers = result[key].values()
    return math.prod((math.prod(layer, start=1.0) for layer in layers), start=1.0) if layers else None


class Statistic(NamedTuple):
    """Mean and standard deviation (n - 1; None for one value) of some runs."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic | None:
        """None for no values."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def statistic(rows: Iterable[Row], value: Callable[[Mapping[str, Any]], float | None]) -> Statistic | None:
    """Of a figure in the results of those rows that are done and have it."""
    found = [value(row.result) for row in rows if row.result is not None]
    return Statistic.of([v for v in found if v is not None and math.isfinite(v)])


# Tables


class Table(NamedTuple):
    """Text in columns; the first one is of names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return the table as Markdown, in which text stays text."""
        lines = [self.columns, ("---", *("--:" for _ in self.columns[1:])), *self.rows]
        table = "".join(f"| {' | '.join(map(_markdown, line))} |\n" for line in lines)
        return f"**{_markdown(self.title)}**\n\n{table}"


def printable_lines(text: str) -> str:
    """Return text of several lines with an escape for each character that is not printable."""
    return "\n".join(map(printable, text.replace("\r\n", "\n").split("\n")))


def _markdown(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


# What a table can show: from a result to a number, how to write mean and deviation, and the unit.
_VALUES: dict[str, tuple[Callable[[Mapping[str, Any]], float | None], str, float, str]] = {
    "accuracy": (lambda result: result["accuracy"], ".1f", 100, "accuracy in %"),
    "macs": (lambda result: result["macs"], ".3g", 1e-6, "million MACs an image"),
}


def tables(definition: Mapping[str, Any], rows: Sequence[Row], latency: Mapping[str, Any] | None = None) -> list[Table]:
    """The tables that a study asks for, then one with a line for every group of runs."""
    wanted = definition.get("tables") or []
    made = [(cutoffs if table.get("value") == "cutoffs" else pivot)(rows, table) for table in wanted]
    return [*made, overview(rows, latency)]


def by_task(rows: Iterable[Row]) -> list[Row]:
    """Rows, in which a run of several tasks at once becomes one for each, with the axis `task` and its accuracy."""
    found = []
    for row in rows:
        each = (row.result or {}).get("accuracies") or {}
        if "task" in row.axes or not each:
            found.append(row)
        for task, accuracy in each.items() if "task" not in row.axes else ():
            result = {**(row.result or {}), "accuracy": accuracy}
            found.append(row._replace(axes=row.axes | {"task": task}, result=result))
    return found


def pivot(rows: Sequence[Row], table: Mapping[str, Any]) -> Table:
    """One axis down, another one across, mean and deviation over everything else, laid out as the paper's tables.

    The last line has the mean over the lines above and their deviation: what the choice of the first axis does.

    Args:
        rows: of the study.
        table: `rows` and `columns`, names of axes; `value`, "accuracy" (the default) or "macs"; `paper`, the name of
            one of the paper's tables, whose figures then stand beside; `where`, values of other axes that a run must
            have to count; `title`.
    """
    where = table.get("where", {})
    rows = _that_count(by_task(rows), where)
    down, across = table["rows"], table["columns"]
    get, form, scale, unit = _VALUES[table.get("value", "accuracy")]
    lines = _distinct(row.axes[down] for row in rows if down in row.axes)
    columns = _distinct(row.axes[across] for row in rows if across in row.axes)
    published = _published(table["paper"]) if "paper" in table else {}
    # What a study without the axis is about.
    part = str(where.get("setting", "single") if table.get("paper") == "table1" else where.get("dataset", "cifar10"))
    body, means = [], [[] for _ in range(2 * len(columns))]  # type: ignore[var-annotated]
    for line in lines:
        cells = []
        for i, column in enumerate(columns):
            cell = [row for row in rows if row.axes.get(down) == line and row.axes.get(across) == column]
            own = statistic(cell, get)
            there = published.get((_bracketed(line), part, _IN_PAPER.get(str(column), str(column))))
            cells += [_cell(own, form, scale), "" if there is None else _cell(there, ".1f", 1)]
            for place, found, factor in (2 * i, own, 1.0), (2 * i + 1, there, 1 / scale):
                if found is not None:
                    means[place].append(factor * found.mean)
        body.append([_bracketed(line) if down == "strides" else shown(down, line), *cells])
    body.append(["mean", *(_cell(Statistic.of(values), form, scale) for values in means)])
    header = [down if down != "strides" else "initial strides"]
    for column in columns:
        header += [METHODS.get(str(column), str(column)) if across == "method" else shown(across, column), "paper"]
    keep = [i for i, name in enumerate(header) if name != "paper" or published]
    return Table(
        table.get("title") or f"{unit[0].upper()}{unit[1:]}: mean and deviation over {seeds_of(rows)}",
        tuple(header[i] for i in keep),
        tuple(tuple(line[i] for i in keep) for line in body),
    )


def cutoffs(rows: Sequence[Row], table: Mapping[str, Any]) -> Table:
    """The first layer's learned strides and what they mean as frequencies, laid out as the paper's Table 2.

    A frequency is told twice: exactly, and in whole bins, as the paper has it (see `cutoff_frequencies`).

    Args:
        rows: of the study; those without cut-off frequencies do not count.
        table: as for :func:`pivot`, without `columns`; a run without the axis `rows` is of all its values at once.
    """
    down = table["rows"]
    rows = [row for row in _that_count(rows, table.get("where", {})) if (row.result or {}).get("cutoffs")]
    axes = [(row.result or {})["axes"] for row in rows]
    units: dict[str, str] = axes[0] if axes else {}
    rows = [row for row, own in zip(rows, axes, strict=True) if own == units]  # not of waveforms and spectrograms
    # Table 2 writes some tasks with other capitals than Table 1.
    paper = {key[0].lower(): line for key, line in _read_csv("table2").items()} if "paper" in table else {}
    header = [down]
    for axis in units:
        header += [f"stride, {axis}", *(["paper"] if paper else [])]
    for axis, unit in units.items():
        header += [f"cut-off, {axis}, {unit}", "in whole bins", *(["paper"] if paper else [])]
    body = []
    for line in _distinct(line_of(row, down) for row in rows):
        cell = [row for row in rows if line_of(row, down) == line]
        figures = paper.get(str(line).lower(), [])
        printed = [" ± ".join(figures[i : i + 2]) or "–" for i in range(0, 8, 2)] if paper else []
        cells = []
        for i in range(len(units)):
            cells += [_cell(statistic(cell, partial(_first_stride, i)), ".2f", 1), *printed[i : i + 1]]
        for i, unit in enumerate(units.values()):
            form = ".2f" if unit == "Hz" else ".4f"
            found = (statistic(cell, partial(first_cutoff, kind, i)) for kind in ("exact", "whole_bins"))
            cells += [*(_cell(each, form, 1) for each in found), *printed[2 + i : 3 + i]]
        body.append((shown(down, line), *cells))
    title = (
        table.get("title") or f"First layer's strides and cut-off frequencies: mean and deviation over {seeds_of(rows)}"
    )
    return Table(title, tuple(header), tuple(body))


def _that_count(rows: Iterable[Row], where: Mapping[str, Any]) -> list[Row]:
    """Those with the values that a table asks for."""
    return [row for row in rows if all(row.axes.get(axis) == value for axis, value in where.items())]


def line_of(row: Row, axis: str) -> Any:
    """What a table of an axis calls a run: its value there; a run of several tasks has no task of its own."""
    several = (row.result or {}).get("accuracies")
    return row.axes.get(axis, MULTI if several and axis == "task" else label_of(row.axes))


def _first_stride(axis: int, result: Mapping[str, Any]) -> float:
    return float(result["strides"][next(iter(result["cutoffs"]["exact"]))][axis])


def first_cutoff(kind: str, axis: int, result: Mapping[str, Any]) -> float:
    """Of the first layer, along an axis, read as "exact" or as "whole_bins"."""
    return float(next(iter(result["cutoffs"][kind].values()))[axis])


def overview(rows: Sequence[Row], latency: Mapping[str, Any] | None = None) -> Table:
    """A line for every group of runs: how good, how expensive, what was learned."""
    header = ["runs", "n", "accuracy in %", "million MACs", "of them resampling", "striding factor", "ms a step"]
    if latency:
        header[5:5] = ["ms a batch, frozen"]
    lines = []
    for label, group in groups(rows).items():
        cells = [
            label,
            f"{sum(row.result is not None for row in group)}/{len(group)}",
            _cell(statistic(group, lambda r: r["accuracy"]), ".1f", 100),
            _cell(statistic(group, lambda r: r["macs"] + r["resampling_macs"]), ".3g", 1e-6),
            _cell(statistic(group, lambda r: r["resampling_macs"]), ".2g", 1e-6),
            _cell(statistic(group, striding_factor), ".4g", 1),
            _cell(statistic(group, lambda r: r["step_time_ms"]), ".0f", 1),
        ]
        if latency:
            cells[5:5] = [f"{latency[label]['ms']:.3g}" if label in latency else "–"]
        lines.append(tuple(cells))
    return Table("All runs", tuple(header), tuple(lines))


def _cell(found: Statistic | None, form: str, scale: float) -> str:
    if found is None:
        return "–"
    mean = format(scale * found.mean, form)
    exact = not found.sd and form != ".1f"  # costs that do not depend on the seed
    return mean if found.sd is None or exact else f"{mean} ± {_deviation(scale * found.sd, form)}"


def _deviation(value: float, form: str) -> str:
    """Two digits, and never a power of ten."""
    if form.endswith("f"):
        return format(value, form)
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _bracketed(value: Any) -> str:
    if not isinstance(value, list) or not _flat(value):
        return str(value)
    return f"({','.join(f'{s:g}' if isinstance(s, int | float) else str(s) for s in value)})"


def _flat(value: list[Any]) -> bool:
    return not any(isinstance(v, list) for v in value)


def seeds_of(rows: Sequence[Row]) -> str:
    seeds = len(_distinct(row.axes.get("seed") for row in rows))
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


_KEYS = {  # of the paper's tables: the columns that say what a line is of
    "table1": ("task", "setting", "method"),
    "table2": ("task",),
    "table3": ("init_strides", "dataset", "method"),
    "release": ("init_strides", "dataset", "method"),
}


def _published(table: str) -> dict[tuple[str, ...], Statistic]:
    return {key: Statistic(float(mean), float(sd), 3) for key, (mean, sd, *_) in _read_csv(table).items()}


def _read_csv(table: str) -> dict[tuple[str, ...], list[str]]:
    """One of the paper's tables: by what a line is of, its figures as printed."""
    text = (PAPER / f"{table}.csv").read_text().splitlines()
    header, *lines = csv.reader(line for line in text if not line.startswith("#"))
    places = [header.index(key) for key in _KEYS[table]]
    return {
        tuple(line[i] for i in places): [value for i, value in enumerate(line) if i not in places] for line in lines
    }


# Files

_COLUMNS = (
    "accuracy", "accuracies", "loss", "macs", "resampling_macs", "stride_cost", "parameters", "steps", "epochs",
    "step_time_ms", "train_seconds", "peak_memory_mb", "strides_initial", "strides", "axes", "cutoffs",
    "data_fingerprint", "commit", "hardware",
)  # fmt: skip


def write_tables(folder: Path) -> list[Table]:
    """Write `results.csv`, a line per run, and `table.md`; returns the tables."""
    definition, rows = read_study(folder)
    axes = _distinct(axis for row in rows for axis in row.axes)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["run", "state", *axes, *("strides_learned" if c == "strides" else c for c in _COLUMNS), "error"]
    writer.writerow(map(csv_cell, columns))
    for row in rows:
        values = [row.axes.get(axis) for axis in axes]
        found = [(row.result or {}).get(column) for column in _COLUMNS]
        writer.writerow(map(csv_cell, [row.name, row.state, *map(_field, (*values, *found)), row.error]))
    made = tables(definition, rows, read_latency(folder))
    atomic_write_text(folder / "results.csv", text.getvalue())
    notes = "\n\n".join(filter(None, (definition.get("question"), definition.get("notes"))))
    atomic_write_text(
        folder / "table.md", f"{printable_lines(notes)}\n\n" + "\n".join(table.markdown() for table in made)
    )
    return made


def read_latency(folder: Path) -> dict[str, Any]:
    """Measured latencies by label; none where none were measured."""
    found = latency_file(folder)
    return {} if found is None else dict(found["latency"])


class Timed(TypedDict):
    """Milliseconds of a batch: median and quartiles."""

    ms: float
    low: float
    high: float


class LatencyFile(TypedDict):
    """The content of a study's `latency.json`."""

    batch: int
    hardware: str
    latency: dict[str, Timed]


def latency_file(folder: Path) -> LatencyFile | None:
    """Return what was timed; None where nothing was, or where the file is damaged."""
    try:
        found: LatencyFile = read_json(folder / "latency.json")
        check_kind(found, LatencyFile)
    except (OSError, ValueError):
        return None
    in_order = all(0 < one["low"] <= one["ms"] <= one["high"] < math.inf for one in found["latency"].values())
    return found if in_order else None


def _field(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value
