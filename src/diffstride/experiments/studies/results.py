"""Results of a study: rows of runs, statistics over them, and tables."""

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
from diffstride.experiments.models.downsample import METHODS
from diffstride.experiments.studies.study import Definition, label_of, shown
from diffstride.experiments.training.documents import read_json, read_yaml
from diffstride.experiments.training.folders import check_name
from diffstride.experiments.training.runs import read_result
from diffstride.experiments.training.schema import check_kind

PAPER = Path(__file__).parent / "paper"  # the published tables
_IN_PAPER = {"conv": "strided"}  # the paper's names of methods where they differ from ours
MULTI = "Multi-task model"  # name of the line in the paper's Table 2


class Row(NamedTuple):
    """A run of a study.

    Attributes:
        name: Name of its folder in the study's.
        state: "done", "failed", "unfinished" (it has a checkpoint) or "open" (it has none).
        axes: Values of the axes of the study, as in its YAML file.
        result: Content of `result.json` when done.
        error: One line, when failed.
    """

    name: str
    state: str
    axes: dict[str, Any]
    result: Mapping[str, Any] | None = None
    error: str | None = None


def row_of(folder: Path, name: str, axes: dict[str, Any]) -> Row:
    """Return the row of a run from its folder."""
    result = read_result(folder / name)
    if result is not None:
        return Row(name, "done", axes, result=result)
    try:
        return Row(name, "failed", axes, error=str(read_json(folder / name / "failed.json")["error"]))
    except (OSError, ValueError, KeyError, TypeError):
        started = (folder / name / "checkpoints" / "last.ckpt").exists()
        return Row(name, "unfinished" if started else "open", axes)


def is_study(folder: Path) -> bool:
    """Return whether a folder is that of a study."""
    return (folder / "study.yaml").is_file()


class _Runs(TypedDict):
    runs: dict[str, dict[str, Any]]


class _Kept(_Runs, Definition):
    pass


def read_study(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """Return a study's definition as it was last run, and its runs in order.

    Raises:
        UsageError: The folder is not that of a study.
    """
    try:
        kept: dict[str, Any] = read_yaml(folder / "study.yaml")
        check_kind(kept, _Kept)
        names = [check_name("the name of a run", name) for name in kept["runs"]]
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"{folder} is not the folder of a study: study.yaml cannot be read ({one_line(error)}); "
            "`diffstride study` writes it again"
        ) from error
    return kept, [row_of(folder, name, kept["runs"][name]) for name in names]


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return rows by label, so that those that differ in the seed alone are together."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(label_of(row.axes), []).append(row)
    return found


def striding_factor(result: Mapping[str, Any], key: str = "strides") -> float | None:
    """Return the product of all learned strides over layers and axes; None without strides."""
    layers = result[key].values()
    return math.prod((math.prod(layer, start=1.0) for layer in layers), start=1.0) if layers else None


class Statistic(NamedTuple):
    """The mean and the standard deviation (with n - 1; None for one value) of some runs."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic | None:
        """Return the statistic of some values; None where there are none."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def statistic(rows: Iterable[Row], value: Callable[[Mapping[str, Any]], float | None]) -> Statistic | None:
    """Return the statistic of a value in the results of finished runs; None where no run has it."""
    found = [value(row.result) for row in rows if row.result is not None]
    return Statistic.of([v for v in found if v is not None and math.isfinite(v)])


# Tables


class Table(NamedTuple):
    """Text in columns, the first of which has names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return the table as Markdown, with special characters escaped."""
        lines = [self.columns, ("---", *("--:" for _ in self.columns[1:])), *self.rows]
        table = "".join(f"| {' | '.join(map(_markdown, line))} |\n" for line in lines)
        return f"**{_markdown(self.title)}**\n\n{table}"


def printable_lines(text: str) -> str:
    """Return text of several lines with an escape for each character that is not printable."""
    return "\n".join(map(printable, text.replace("\r\n", "\n").split("\n")))


def _markdown(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


# Values that a table can show: the value in a result, the format of mean and deviation, the scale, the unit.
_VALUES: dict[str, tuple[Callable[[Mapping[str, Any]], float | None], str, float, str]] = {
    "accuracy": (lambda result: result["accuracy"], ".1f", 100, "accuracy in %"),
    "macs": (lambda result: result["macs"], ".3g", 1e-6, "million MACs an image"),
}


def tables(definition: Mapping[str, Any], rows: Sequence[Row], timed: LatencyFile | None = None) -> list[Table]:
    """Return the tables in a study's definition, then one with a line for every group of runs."""
    wanted = definition.get("tables") or []
    made = [(cutoffs if table.get("value") == "cutoffs" else pivot)(rows, table) for table in wanted]
    return [*made, overview(rows, {} if timed is None else timed["latency"])]


def by_task(rows: Iterable[Row]) -> list[Row]:
    """Return rows in which a run of several tasks is replaced by one per task, with the axis `task`."""
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
    """Return a table of one axis down and another across, with mean and deviation over all else, as in the paper.

    The last line has the mean and the deviation of the lines above, which shows the effect of the first axis.

    Args:
        rows: Rows of the study.
        table: `rows` and `columns`, names of axes; `value`, "accuracy" (the default) or "macs"; `paper`, the name of
            one of the paper's tables, whose values are shown beside ours; `where`, values of other axes that select
            runs; `title`.
    """
    where = table.get("where", {})
    rows = _selected(by_task(rows), where)
    down, across = table["rows"], table["columns"]
    get, form, scale, unit = _VALUES[table.get("value", "accuracy")]
    lines = _distinct(row.axes[down] for row in rows if down in row.axes)
    columns = _distinct(row.axes[across] for row in rows if across in row.axes)
    published = _published(table["paper"]) if "paper" in table else {}
    # A study without this axis has its usual value.
    part = str(where.get("setting", "single") if table.get("paper") == "table1" else where.get("dataset", "cifar10"))

    def cells(own: Statistic | None, printed: Statistic | None) -> list[str]:
        paper = [] if not published else [""] if printed is None else [_cell(printed, ".1f", 1)]
        return [_cell(own, form, scale), *paper]

    body: list[tuple[str, ...]] = []
    ours: list[list[Statistic | None]] = [[] for _ in columns]
    theirs: list[list[Statistic | None]] = [[] for _ in columns]
    for line in lines:
        texts = [_bracketed(line) if down == "strides" else shown(down, line)]
        for i, column in enumerate(columns):
            ours[i].append(statistic(_selected(rows, {down: line, across: column}), get))
            theirs[i].append(published.get((_bracketed(line), part, _IN_PAPER.get(str(column), str(column)))))
            texts += cells(ours[i][-1], theirs[i][-1])
        body.append(tuple(texts))
    last = ["mean"]
    for own, printed in zip(ours, theirs, strict=True):
        last += cells(_over_lines(own), _over_lines(printed))
    header = [down if down != "strides" else "initial strides"]
    for column in columns:
        header.append(METHODS.get(str(column), str(column)) if across == "method" else shown(across, column))
        header += ["paper"] if published else []
    title = table.get("title") or f"{unit[0].upper()}{unit[1:]}: mean and deviation over {seeds_of(rows)}"
    return Table(title, tuple(header), (*body, tuple(last)))


def _over_lines(lines: Iterable[Statistic | None]) -> Statistic | None:
    return Statistic.of([line.mean for line in lines if line is not None])


def cutoffs(rows: Sequence[Row], table: Mapping[str, Any]) -> Table:
    """Return a table of the first layer's learned strides and their cut-off frequencies, as the paper's Table 2.

    A frequency is given exactly, and in whole bins as in the paper (see `cutoff_frequencies`).

    Args:
        rows: Rows of the study; those without cut-off frequencies are left out.
        table: Options of `pivot`, without `columns`. A run without the axis `rows` belongs to all its values.
    """
    down = table["rows"]
    rows = [row for row in _selected(rows, table.get("where", {})) if (row.result or {}).get("cutoffs")]
    axes = [(row.result or {})["axes"] for row in rows]
    units: dict[str, str] = axes[0] if axes else {}
    rows = [row for row, own in zip(rows, axes, strict=True) if own == units]  # waveforms and spectrograms do not mix
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


def _selected(rows: Iterable[Row], where: Mapping[str, Any]) -> list[Row]:
    """Return the rows that have these values of their axes."""
    return [row for row in rows if all(row.axes.get(axis) == value for axis, value in where.items())]


def line_of(row: Row, axis: str) -> Any:
    """Return the name of the line of a run in a table with an axis down: its value there, or that of several tasks."""
    several = (row.result or {}).get("accuracies")
    return row.axes.get(axis, MULTI if several and axis == "task" else label_of(row.axes))


def _first_stride(axis: int, result: Mapping[str, Any]) -> float:
    return float(result["strides"][next(iter(result["cutoffs"]["exact"]))][axis])


def first_cutoff(kind: str, axis: int, result: Mapping[str, Any]) -> float:
    """Return the cut-off frequency of the first layer along an axis; `kind` is "exact" or "whole_bins"."""
    return float(next(iter(result["cutoffs"][kind].values()))[axis])


def overview(rows: Sequence[Row], latency: Mapping[str, Timed]) -> Table:
    """Return a table with a line for every group of runs: accuracy, cost, striding factor."""
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
    """Return a deviation with two digits, and without a power of ten."""
    if form.endswith("f"):
        return format(value, form)
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _bracketed(value: Any) -> str:
    if not isinstance(value, list) or any(isinstance(v, list) for v in value):
        return str(value)
    return f"({','.join(f'{s:g}' for s in value)})"


def seeds_of(rows: Sequence[Row]) -> str:
    """Return the number of seeds as text."""
    seeds = len(_distinct(row.axes.get("seed") for row in rows))
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


_KEYS = {  # columns of the paper's tables that identify a line
    "table1": ("task", "setting", "method"),
    "table2": ("task",),
    "table3": ("init_strides", "dataset", "method"),
    "release": ("init_strides", "dataset", "method"),
}


def _published(table: str) -> dict[tuple[str, ...], Statistic]:
    return {key: Statistic(float(mean), float(sd), 3) for key, (mean, sd, *_) in _read_csv(table).items()}


def _read_csv(table: str) -> dict[tuple[str, ...], list[str]]:
    """Return one of the paper's tables: the printed values by the columns that identify a line."""
    text = (PAPER / f"{table}.csv").read_text().splitlines()
    header, *lines = csv.reader(line for line in text if not line.startswith("#"))
    places = [header.index(key) for key in _KEYS[table]]
    return {tuple(line[i] for i in places): [v for i, v in enumerate(line) if i not in places] for line in lines}


# Files

_COLUMNS = (
    "accuracy", "accuracies", "loss", "macs", "resampling_macs", "stride_cost", "parameters", "steps", "epochs",
    "step_time_ms", "train_seconds", "peak_memory_mb", "strides_initial", "strides", "axes", "cutoffs",
    "data_fingerprint", "commit", "hardware",
)  # fmt: skip


def write_tables(folder: Path) -> list[Table]:
    """Write `results.csv`, with a line per run, and `table.md`; return the tables."""
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


class Timed(TypedDict):
    """The median and the quartiles of the milliseconds of a batch."""

    ms: float
    low: float
    high: float


class LatencyFile(TypedDict):
    """The content of a study's `latency.json`."""

    batch: int
    hardware: str
    latency: dict[str, Timed]


def read_latency(folder: Path) -> LatencyFile | None:
    """Return the content of `latency.json`; None where there is none, or a damaged one."""
    try:
        content: LatencyFile = read_json(folder / "latency.json")
        check_kind(content, LatencyFile)
    except (OSError, ValueError):
        return None
    return content


def _field(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value
