"""Results of a study: rows of runs, statistics over them, and tables."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from diffstride._files import atomic_write_text
from diffstride._text import csv_cell, one_line, printable
from diffstride.errors import UsageError
from diffstride.experiments.models.downsample import METHODS
from diffstride.experiments.studies.study import OptionalKeys, label_of, shown
from diffstride.experiments.training.documents import read_json, read_yaml
from diffstride.experiments.training.folders import check_name
from diffstride.experiments.training.runs import read_result
from diffstride.experiments.training.schema import check_kind, total_macs

PAPER = Path(__file__).parent / "paper"  # the published tables
DASH = "–"  # for a value that is missing or not finite


class Row(NamedTuple):
    """A run of a study, with its values of the study's axes as in the YAML file."""

    name: str  # of its folder in the study's
    state: str  # "done", "failed", "unfinished" (it has a checkpoint) or "open" (it has none)
    axes: dict[str, Any]
    result: Any = None  # content of `result.json` when done
    error: str | None = None  # one line, when failed


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


class _Kept(OptionalKeys):
    runs: dict[str, dict[str, Any]]


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
            f"{folder} is not the folder of a run or of a study: study.yaml cannot be read ({one_line(error)})"
        ) from error
    return kept, [row_of(folder, name, kept["runs"][name]) for name in names]


def groups(rows: Iterable[Row], name: Callable[[Row], str] = lambda row: label_of(row.axes)) -> dict[str, list[Row]]:
    """Return rows by a name of their group: by default by label, so that only the seed differs within a group."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return found


def striding_factor(strides: Mapping[str, Sequence[float]]) -> float | None:
    """Return the product of strides over layers and axes; None without strides."""
    return math.prod(itertools.chain.from_iterable(strides.values()), start=1.0) if strides else None


class Statistic(NamedTuple):
    """The mean and the standard deviation (with n - 1; None for one value) of some runs."""

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic | None:
        """Return the statistic of some values; None where there are none."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None) if values else None


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


def tables(definition: Mapping[str, Any], rows: Sequence[Row], latency: Mapping[str, Any]) -> list[Table]:
    """Return the tables in a study's definition, then one with a line for every group of runs."""
    wanted = definition.get("tables") or []
    made = [(cutoffs if table.get("value") == "cutoffs" else pivot)(rows, table) for table in wanted]
    return [*made, overview(rows, latency, definition.get("compare"))]


def _of_columns(title: str, columns: Iterable[Sequence[str]]) -> Table:
    """Return a table from its columns, each with its heading."""
    heading, *lines = zip(*columns, strict=True)
    return Table(title, heading, tuple(lines))


def by_task(rows: Iterable[Row]) -> list[Row]:
    """Return rows in which a run of several tasks is replaced by one per task, with the axis `task`."""
    found = []
    for row in rows:
        each = {} if "task" in row.axes or row.result is None else row.result.get("accuracies") or {}
        found += [
            row._replace(axes=row.axes | {"task": task}, result={**row.result, "accuracy": accuracy})
            for task, accuracy in each.items()
        ] or [row]
    return found


def pivot(rows: Sequence[Row], table: Mapping[str, Any]) -> Table:
    """Return a table of one axis down and another across, with mean and deviation over all else, as in the paper.

    The last line has the mean and the deviation of the lines above, which shows the effect of the first axis.

    Args:
        rows: Rows of the study.
        table: `rows` and `columns`, names of axes; `value`, "accuracy" (the default) or "macs"; `paper`, the name of
            one of the paper's tables, whose values are shown beside ours; `over`, a value of `columns`: cells are mean
            differences to that column, over runs that agree in all other axes, with their standard error, and the last
            line has those of the lines' means; `where`, values of other axes that select runs; `title`.
    """
    where = table.get("where", {})
    rows = _selected(by_task(rows), where)
    down, across = table["rows"], table["columns"]
    value = table.get("value", "accuracy")
    get: Callable[[Mapping[str, Any]], float | None] = total_macs if value == "macs" else itemgetter(value)
    units = {"accuracy": (".1f", 100, "Accuracy in %"), "macs": (".3g", 1e-6, "Million MACs, resampling included")}
    form, scale, unit = units[value]
    left, top = ([row.axes[axis] for row in rows if axis in row.axes] for axis in (down, across))
    lines = {_bracketed(value) if down == "strides" else shown(down, value): value for value in left}
    columns = {
        METHODS.get(str(value), str(value)) if across == "method" else shown(across, value): value for value in top
    }
    published = {key: Statistic(*map(float, pair)) for key, (pair,) in _read_paper(table, 3).items()}
    # A study without this axis has its usual value.
    part = str(where.get("setting", "single") if table.get("paper") == "table1" else where.get("dataset", "cifar10"))
    made = [["initial strides" if down == "strides" else down, *lines, "mean"]]
    if "over" in table:
        by_column = {heading: _selected(rows, {across: column}) for heading, column in columns.items()}
        others = _selected(rows, {across: table["over"]})
        for heading, own in by_column.items():
            parts = [_differences(_selected(own, {down: line}), others, {across}) for line in lines.values()]
            means = [statistics.fmean(part) for part in parts if part]
            made.append([heading, *(DASH if own == others else _paired(found) for found in [*parts, means])])
        title = table.get("title") or f"Points over {table['over']}: mean differences and their standard errors"
        return _of_columns(title, made)
    for heading, column in columns.items():
        cells = [statistic(_selected(rows, {down: line, across: column}), get) for line in lines.values()]
        made.append([heading, *(_cell(found, form, scale) for found in [*cells, _mean(cells)])])
        if published:
            method = "strided" if column == "conv" else str(column)
            theirs = [published.get((_bracketed(line), part, method)) for line in lines.values()]
            made.append(["paper", *(_cell(found, ".1f", 1) if found else "" for found in [*theirs, _mean(theirs)])])
    title = table.get("title") or f"{unit}: mean and deviation over {_averaged(rows, (down, across))}"
    return _of_columns(title, made)


def _mean(cells: Iterable[Statistic | None]) -> Statistic | None:
    """Return the statistic of the means of some cells."""
    return Statistic.of([cell.mean for cell in cells if cell is not None])


def cutoffs(rows: Sequence[Row], table: Mapping[str, Any]) -> Table:
    """Return a table of the first layer's learned strides and their cut-off frequencies, as the paper's Table 2.

    A frequency is given exactly, and in whole bins as in the paper (see `cutoff_frequencies`).

    Args:
        rows: Rows of the study; those without cut-off frequencies, or with those of other axes, are left out.
        table: Options of `pivot`, without `columns`. A run without the axis `rows` belongs to all its values.
    """
    down = table["rows"]
    rows = [row for row in _selected(rows, table.get("where", {})) if (row.result or {}).get("cutoffs")]
    units: dict[str, str] = rows[0].result["axes"] if rows else {}
    rows = [row for row in rows if row.result["axes"] == units]  # waveforms and spectrograms do not mix
    # Table 2 writes some tasks with other capitals than Table 1.
    paper = {name.lower(): iter(map(" ± ".join, pairs)) for (name,), pairs in _read_paper(table, 1).items()}
    columns = [(f"stride, {axis}", ".2f", partial(_first, "strides", i)) for i, axis in enumerate(units)]
    for i, (axis, unit) in enumerate(units.items()):
        form = ".2f" if unit == "Hz" else ".4f"
        columns.append((f"cut-off, {axis}, {unit}", form, partial(_first, "exact", i)))
        columns.append(("in whole bins", form, partial(_first, "whole_bins", i)))

    def name(row: Row) -> str:
        several = row.result.get("accuracies") and down == "task"
        return shown(down, row.axes.get(down, "Multi-task model" if several else label_of(row.axes)))

    lines = groups(rows, name)
    made = [[down, *lines]]
    for heading, form, get in columns:
        made.append([heading, *(_cell(statistic(group, get), form, 1) for group in lines.values())])
        if paper and not heading.startswith("cut-off"):  # the paper has frequencies in whole bins
            made.append(["paper", *(next(paper.get(line.lower(), iter(())), DASH) for line in lines)])
    default = f"First layer's strides and cut-off frequencies: mean and deviation over {seeds_of(rows)}"
    return _of_columns(table.get("title") or default, made)


def _first(quantity: str, axis: int, result: Mapping[str, Any]) -> float:
    """Return the stride or the cut-off frequency ("exact" or "whole_bins") of the first layer along an axis."""
    layer = next(iter(result["cutoffs"]["exact"]))
    return float((result["strides"] if quantity == "strides" else result["cutoffs"][quantity])[layer][axis])


def _selected(rows: Iterable[Row], where: Mapping[str, Any]) -> list[Row]:
    """Return the rows that have these values of their axes."""
    return [row for row in rows if all(row.axes.get(axis) == value for axis, value in where.items())]


def overview(rows: Sequence[Row], latency: Mapping[str, Any], compare: str | None = None) -> Table:
    """Return a table with a line for every group of runs: accuracy, cost, product of strides.

    Args:
        rows: Rows of the study.
        latency: Median latencies by label.
        compare: A label. Others have the mean difference to it over equal seeds, with its standard error.
    """
    by_label = groups(rows)

    def column(heading: str, value: Callable[[Mapping[str, Any]], float | None], form: str, scale: float) -> list[str]:
        return [heading, *(_cell(statistic(group, value), form, scale) for group in by_label.values())]

    columns = [
        ["runs", *by_label],
        ["n", *(f"{sum(row.result is not None for row in group)}/{len(group)}" for group in by_label.values())],
        column("accuracy in %", itemgetter("accuracy"), ".1f", 100),
    ]
    if compare is not None:
        but_seed = {axis for row in rows for axis in row.axes} - {"seed"}
        others = by_label[compare]
        found = (_paired(_differences(group, others, but_seed), len(group)) for group in by_label.values())
        cells = [DASH if label == compare else text for label, text in zip(by_label, found, strict=True)]
        columns.append([f"points over {compare}", *cells])
    columns.append(column("million MACs", total_macs, ".3g", 1e-6))
    columns.append(column("of them resampling", itemgetter("resampling_macs"), ".2g", 1e-6))
    if latency:
        timed = (f"{latency[label]['ms']:.3g}" if label in latency else DASH for label in by_label)
        columns.append(["ms a batch, frozen", *timed])
    columns.append(column("product of strides", lambda result: striding_factor(result["strides"]), ".4g", 1))
    columns.append(column("ms a step", itemgetter("step_time_ms"), ".0f", 1))
    return _of_columns("All runs", columns)


def _differences(rows: Sequence[Row], others: Sequence[Row], apart: Container[str]) -> list[float]:
    """Return the differences in points of accuracies to other rows, those with equal values of all axes not `apart`."""

    def accuracies(given: Sequence[Row]) -> dict[str, float]:
        return {
            json.dumps([[axis, value] for axis, value in row.axes.items() if axis not in apart]): found.mean
            for row in given
            if (found := statistic([row], itemgetter("accuracy")))
        }

    own, its = accuracies(rows), accuracies(others)
    return [100 * (own[key] - its[key]) for key in own if key in its]


def _paired(differences: Sequence[float], of: int = 0) -> str:
    """Return the mean of some differences with its standard error; a remark if there are fewer than `of`."""
    found = Statistic.of(differences)
    if found is None:
        return DASH
    error = "" if found.sd is None else f" ± {found.sd / math.sqrt(len(differences)):.1f}"
    return f"{found.mean:+.1f}{error}" + (f" ({len(differences)} of {of})" if len(differences) < of else "")


def _cell(found: Statistic | None, form: str, scale: float) -> str:
    """Return mean and deviation. In a format of significant digits, the deviation has two and no power of ten."""
    if found is None:
        return DASH
    mean = format(scale * found.mean, form)
    if found.sd is None or (not found.sd and form != ".1f"):  # costs that do not depend on the seed
        return mean
    sd = scale * found.sd
    return f"{mean} ± {sd:{form if form.endswith('f') else '.2g' if sd < 100 else '.0f'}}"


def _bracketed(value: Any) -> str:
    if not isinstance(value, list) or any(isinstance(v, list) for v in value):
        return str(value)
    return f"({','.join(f'{s:g}' for s in value)})"


def seeds_of(rows: Sequence[Row]) -> str:
    """Return the number of seeds as text."""
    seeds = len({row.axes.get("seed") for row in rows})
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def _averaged(rows: Iterable[Row], apart: Sequence[str]) -> str:
    """Return what a mean is over, as text: seeds, and axes along which rows differ that agree in those `apart`."""
    rows = [row for row in rows if row.result is not None]
    cells = groups(rows, lambda row: json.dumps([row.axes.get(axis) for axis in apart])).values()
    axes = dict.fromkeys(axis for row in rows for axis in row.axes if axis not in (*apart, "seed"))
    others = [axis for axis in axes if any(_values(cell, axis) > 1 for cell in cells)]
    parts = [] if "seed" in apart else [seeds_of(rows)]
    parts += [f"{max(_values(cell, axis) for cell in cells)} values of {axis}" for axis in others]
    return " and ".join(parts) or "one run"


def _values(rows: Iterable[Row], axis: str) -> int:
    return len({json.dumps(row.axes.get(axis)) for row in rows})


def _read_paper(table: Mapping[str, Any], keys: int) -> dict[tuple[str, ...], list[tuple[str, str]]]:
    """Return means and deviations of the paper's table that is asked for, by the first columns; nothing without one."""
    if "paper" not in table:
        return {}
    text = (PAPER / f"{table['paper']}.csv").read_text().splitlines()
    _, *lines = csv.reader(line for line in text if not line.startswith("#"))
    return {tuple(line[:keys]): list(zip(line[keys::2], line[keys + 1 :: 2], strict=True)) for line in lines}


# Files

_COLUMNS = (
    "accuracy", "accuracies", "loss", "macs", "resampling_macs", "stride_cost", "parameters", "steps", "epochs",
    "step_time_ms", "train_seconds", "peak_memory_mb", "strides_initial", "strides", "axes", "cutoffs",
    "data_fingerprint", "commit", "hardware",
)  # fmt: skip


def write_tables(folder: Path) -> list[Table]:
    """Write `results.csv`, with a line per run, and `table.md`; return the tables."""
    definition, rows = read_study(folder)
    axes = list(dict.fromkeys(axis for row in rows for axis in row.axes))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["run", "state", *axes, *("strides_learned" if c == "strides" else c for c in _COLUMNS), "error"]
    writer.writerow(map(csv_cell, columns))
    for row in rows:
        values = [*(row.axes.get(axis) for axis in axes), *((row.result or {}).get(column) for column in _COLUMNS)]
        fields = (json.dumps(value) if isinstance(value, dict | list) else value for value in values)
        writer.writerow(map(csv_cell, [row.name, row.state, *fields, row.error]))
    made = tables(definition, rows, read_latency(folder)["latency"])
    atomic_write_text(folder / "results.csv", text.getvalue())
    notes = printable_lines("\n\n".join(filter(None, (definition.get("question"), definition.get("notes")))))
    atomic_write_text(folder / "table.md", f"{notes}\n\n" + "\n".join(table.markdown() for table in made))
    return made


def read_latency(folder: Path) -> Any:
    """Return the content of `latency.json`: under `latency`, by label, median and quartiles; none without a file."""
    file = folder / "latency.json"
    return read_json(file) if file.is_file() else {"batch": None, "latency": {}}
