"""A run or a study as a page of HTML: its numbers in tables, its pictures as SVG."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from diffstride._files import read_text
from diffstride._text import one_line
from diffstride.cost import count_macs, cutoff_frequencies, stride_cost
from diffstride.errors import UsageError
from diffstride.experiments.figures.style import inline_svg
from diffstride.experiments.history import read_dicts, read_rows
from diffstride.experiments.models.downsample import METHODS
from diffstride.experiments.studies import pictures
from diffstride.experiments.studies.results import (
    Row,
    Table,
    is_study,
    printable_lines,
    read_latency,
    read_study,
    row_of,
    tables,
)
from diffstride.experiments.studies.study import shown
from diffstride.experiments.training.documents import load_yaml, read_json
from diffstride.nn import learnable_layers

DASH = "–"  # for what is missing or not finite


class Report(NamedTuple):
    """Content of a page on a run, or on a study as a whole. The first remark is a summary."""

    name: str
    remarks: list[str]
    tables: list[Table]
    pictures: list[Markup]
    provenance: list[Table]
    config: str


def render(folder: Path, say: Callable[[str], None]) -> str:
    """Return the page of a run or of a study.

    Args:
        folder: folder of the run or of the study.
        say: called with what is being worked on.

    Raises:
        UsageError: a folder that is neither.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    if is_study(folder):
        definition, rows = read_study(folder)
        runs = []
        for i, row in enumerate(started := [row for row in rows if (folder / row.name / "config.yaml").is_file()]):
            say(f"run {i + 1} of {len(started)}: {row.name}")
            runs.append(_report_run(folder, row))
        say("the study")
        report = _report_study(folder, definition, rows)
        return template.render(question=definition.get("question"), report=report, runs=runs, listed=_list(rows))
    if not (folder / "config.yaml").is_file():
        problem = "is not the folder of a run or of a study" if folder.is_dir() else "is not there"
        raise UsageError(f"the folder {folder} {problem}: give one that `diffstride fit` or `diffstride study` made")
    study, name = folder.absolute().parent, folder.absolute().name
    say(name)
    report = _report_run(study, row_of(study, name, {}))
    return template.render(question=None, report=report, runs=[], listed=None)


def _printable(value: Any) -> Any:
    return printable_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _draw(name: str, figures: Mapping[str, Callable[[], Figure | str]], remarks: list[str]) -> list[Markup]:
    """Return pictures. A remark names those whose files are lost or damaged."""
    drawn: list[Markup] = []
    missing: dict[str, list[str]] = {}
    for title, draw in figures.items():
        try:
            figure = draw()
        except (UsageError, RuntimeError, ValueError) as error:  # also of data or layers that have changed
            missing.setdefault(one_line(error), []).append(title)
        else:
            if not isinstance(figure, str):
                drawn.append(Markup(inline_svg(figure, f"{title}, {name}", f"{name} {title}")))
    remarks += [f"Not drawn: {', '.join(titles)} ({reason})." for reason, titles in missing.items()]
    return drawn


# A run


def _report_run(study: Path, row: Row) -> Report:
    """Return the report of a run in the folder `study`, whether it has ended or not."""
    folder = study / row.name
    result: Mapping[str, Any] = row.result or {}
    text = read_text(folder / "config.yaml")
    remarks = [_summary(text, result), *_state(row, folder)]
    figures = {
        "Training": lambda: pictures.run_training(folder),
        "Strides while training": lambda: pictures.run_strides(folder),
        "Windows": lambda: pictures.run_windows(folder),
        "Resolution": lambda: pictures.run_resolutions({"": folder}, row.name),
    }
    if result and not result["strides"]:
        remarks.append("This run has no learned strides: its downsampling is fixed.")
        figures = {"Training": figures["Training"]}
    drawn = _draw(row.name, figures, remarks)
    start, cutoffs = _probe(folder)
    return Report(
        name=row.name,
        remarks=remarks,
        tables=[*_result(result, start), *_strides(folder, result, cutoffs)],
        pictures=drawn,
        provenance=list(_provenance(result)),
        config=text,
    )


def _probe(folder: Path) -> tuple[dict[str, float], Mapping[str, Sequence[float]]]:
    """Return the cost at the initial strides, and the cut-off frequencies in cycles per sample of the input."""
    try:
        network, data = pictures.look_into(folder)
        example = torch.zeros(1, *data.sample_shape)
        cutoffs = cutoff_frequencies(network, 1, example)
        for _, layer in learnable_layers(network):
            layer.reset_strides()
        macs, cost = count_macs(network, example), stride_cost(network).item()
    except (UsageError, RuntimeError, ValueError):  # no learned strides, or a remark on the pictures names the reason
        return {}, {}
    return {"macs": sum(macs), "resampling_macs": macs.resampling, "stride_cost": cost}, cutoffs


def _summary(text: str, result: Mapping[str, Any]) -> str:
    """Return one sentence on what was trained on what."""
    try:
        model, data = (load_yaml(text)[key] for key in ("model", "data"))
        options, path = model["network"]["init_args"], data["init_args"].get("path")
        network, source = (part["class_path"].rsplit(".", 1)[-1] for part in (model["network"], data))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return "A network."
    depth = f"-{options['depth']}" if "depth" in options else ""
    method = METHODS.get(str(options.get("downsample")), "its own downsampling")
    length = f" for {result['steps']:,} steps" if result.get("steps") else ""
    return f"{network}{depth} with {method}, trained on {Path(path).name if path else source}{length}."


def _state(row: Row, folder: Path) -> Iterator[str]:
    if row.state == "failed":
        yield f"This run failed: {row.error}. The page shows what it left."
    elif row.state != "done":
        logged = [int(line["step"]) + 1 for line in read_dicts(folder / "metrics.csv") if line.get("step")]
        yield f"This run has not ended: it has logged up to step {max(logged, default=0)}."


def _result(result: Mapping[str, Any], start: Mapping[str, float]) -> Iterator[Table]:
    """Return accuracy, cost and time of a run that has ended; `start` has the cost at the initial strides."""
    if not result:
        return
    total = result["macs"] + result["resampling_macs"]
    tasks = (result["accuracies"] or {}).items()
    yield Table("Result", (), (
        ("accuracy on the test split", _number(result["accuracy"], ".2f", 100, " %")),
        *((f"accuracy, {task}", _number(accuracy, ".2f", 100, " %")) for task, accuracy in tasks),
        ("parameters", _number(result["parameters"], ",")),
        ("time of a step, median, data included", _number(result["step_time_ms"], ".3g", unit=" ms")),
        ("time of training", _duration(result["train_seconds"])),
        ("peak memory", _number(result["peak_memory_mb"], ",", unit=" MB")),
    ))  # fmt: skip
    costs = (
        ("MACs an image, resampling included", _millions(start.get("macs")), _millions(total)),
        ("resampling alone", _millions(start.get("resampling_macs")), _millions(result["resampling_macs"])),
        ("budget", DASH, _millions(result["macs_budget"])),
        ("cost of strides, Eq. 6", _number(start.get("stride_cost")), _number(result["stride_cost"])),
    )
    yield Table("Cost", ("", "initial strides", "at the end"), tuple(line for line in costs if line[-1] != DASH))


def _strides(folder: Path, result: Mapping[str, Any], cutoffs: Mapping[str, Sequence[float]]) -> Iterator[Table]:
    """Return strides and sizes of the maps at the start and at the end, and the learned cut-off frequencies."""
    try:
        rows = read_rows(folder / "strides.csv")
    except UsageError:  # a remark on the pictures names the reason
        return
    unit = "cycles per sample of the input"
    if result.get("cutoffs"):
        cutoffs, unit = result["cutoffs"]["exact"], ", ".join(result["axes"].values())
    start = {(row.layer, row.axis): row for row in reversed(rows)}
    end = {(row.layer, row.axis): row for row in rows}
    remaining = {layer: iter(found) for layer, found in cutoffs.items()}
    lines = []
    for (layer, axis), last in end.items():
        first, cutoff = start[layer, axis], _number(next(remaining.get(layer, iter(())), None), ".3g")
        strides = _number(first.stride), _number(last.stride)
        lines.append((layer, axis, *strides, str(first.size), str(last.size), cutoff))
    if lines:
        heading = ("layer", "axis", "start", "end", "map at the start", "map at the end", f"cut-off ({unit})")
        yield Table("Strides", heading, tuple(lines))


def _provenance(facts: Mapping[str, Any]) -> Iterator[Table]:
    names = ("commit", "hardware", "seed", "data", "data_fingerprint", "time_of_all_runs")
    lines = [(name.replace("_", " "), facts.get(name)) for name in names]
    lines += (facts.get("versions") or {}).items()
    known = tuple((name, str(value)) for name, value in lines if value is not None)
    if known:
        yield Table("Provenance", (), known)


# A study


def _report_study(folder: Path, definition: Mapping[str, Any], rows: Sequence[Row]) -> Report:
    """Return the report of a study as a whole."""
    counts = {state: sum(row.state == state for row in rows) for state in ("done", "failed", "unfinished", "open")}
    remarks = [f"{len(rows)} runs: {', '.join(f'{n} {state}' for state, n in counts.items() if n)}."]
    remarks += [str(definition["notes"])] if definition.get("notes") else []
    remarks += [f"{row.name} failed: {row.error}." for row in rows if row.state == "failed"]
    done = [row for row in rows if row.result is not None]
    figures = {name.capitalize(): functools.partial(draw, folder, done) for name, draw in pictures.FIGURES.items()}
    name = str(definition.get("name") or folder.absolute().name)
    drawn = _draw(name, figures, remarks)
    try:
        provenance: dict[str, Any] = read_json(folder / "provenance.json")
    except (OSError, ValueError):  # no run has ended yet
        provenance = {}
    provenance["time_of_all_runs"] = _duration(provenance.get("seconds"))
    shown_keys = {key: value for key, value in definition.items() if key != "runs"}
    return Report(
        name=name,
        remarks=remarks,
        tables=tables(definition, rows, read_latency(folder)),
        pictures=drawn,
        provenance=list(_provenance(provenance)),
        config=yaml.safe_dump(shown_keys, sort_keys=False),
    )


def _list(rows: Sequence[Row]) -> Table:
    """Return a table with a line for each run."""
    axes = list(dict.fromkeys(axis for row in rows for axis in row.axes))
    lines = []
    for row in rows:
        result: Mapping[str, Any] = row.result or {}
        strides = (result.get("strides") or {}).values()
        lines.append((
            row.name,
            *(shown(axis, row.axes[axis]).removeprefix(axis) if axis in row.axes else DASH for axis in axes),
            row.state,
            _number(result.get("accuracy"), ".2f", 100),
            _millions(result["macs"] + result["resampling_macs"] if result else None),
            ", ".join("×".join(_number(s, ".2f") for s in layer) for layer in strides) or DASH,
            _duration(result.get("train_seconds")),
        ))  # fmt: skip
    heading = ("run", *axes, "state", "accuracy in %", "MACs an image", "learned strides", "training")
    return Table("Runs", heading, tuple(lines))


# Numbers


def _number(value: float | None, form: str = ".4g", scale: float = 1, unit: str = "") -> str:
    if value is None or not math.isfinite(value):
        return DASH
    return f"{scale * value if scale != 1 else value:{form}}{unit}"


def _millions(value: float | None) -> str:
    return _number(value, ".4g", 1e-6, " M")


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 600:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
