"""A run or a study as a page of HTML: its numbers in tables, its pictures as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from diffstride._files import read_text
from diffstride._text import one_line
from diffstride.cost import count_macs
from diffstride.errors import UsageError
from diffstride.experiments.figures.style import inline_svg
from diffstride.experiments.history import read_dicts, read_rows
from diffstride.experiments.models.downsample import METHODS
from diffstride.experiments.studies import pictures, results
from diffstride.experiments.studies.results import DASH, Row, Table
from diffstride.experiments.studies.study import shown
from diffstride.experiments.training.documents import load_yaml, read_json
from diffstride.experiments.training.schema import total_macs
from diffstride.nn import learnable_layers


class Report(NamedTuple):
    """Content of a page on a run, or on a study as a whole. The first remark is a summary."""

    name: str
    remarks: list[str]
    tables: list[Table]
    pictures: list[Markup]
    provenance: Table
    config: str


def render(folder: Path, say: Callable[[str], None]) -> str:
    """Return the page of a run or of a study. `say` is called with what is being worked on.

    Raises:
        UsageError: The folder is neither of a run nor of a study.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    if (folder / "config.yaml").is_file():
        study, name = folder.absolute().parent, folder.absolute().name
        say(name)
        report = _report_run(study, results.row_of(study, name, {}))
        return template.render(question=None, report=report, runs=[], listed=None)
    definition, rows = results.read_study(folder)
    runs = []
    for i, row in enumerate(started := [row for row in rows if (folder / row.name / "config.yaml").is_file()]):
        say(f"run {i + 1} of {len(started)}: {row.name}")
        runs.append(_report_run(folder, row))
    say("the study")
    report = _report_study(folder, definition, rows)
    return template.render(question=definition.get("question"), report=report, runs=runs, listed=_list(rows))


def _printable(value: Any) -> Any:
    return results.printable_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _draw(name: str, figures: Mapping[str, Callable[[], Figure]], remarks: list[str]) -> list[Markup]:
    """Return pictures. A remark names those whose files are lost or damaged."""
    drawn: list[Markup] = []
    missing: dict[str, list[str]] = {}
    for title, draw in figures.items():
        try:
            drawn.append(Markup(inline_svg(draw(), f"{title}, {name}", f"{name} {title}")))
        except pictures.NothingToDrawError:
            continue
        except Exception as error:  # most often of data, layers or checkpoints that have changed
            missing.setdefault(one_line(error), []).append(title)
    remarks += [f"Not drawn: {', '.join(titles)} ({reason})." for reason, titles in missing.items()]
    return drawn


def _report_run(study: Path, row: Row) -> Report:
    """Return the report of a run in the folder `study`, whether it has ended or not."""
    folder = study / row.name
    result: Mapping[str, Any] = row.result or {}
    text = read_text(folder / "config.yaml")
    remarks = [_summary(load_yaml(text))]
    if row.state == "failed":
        remarks.append(f"This run failed: {row.error}. The page shows what it left.")
    elif row.state != "done":
        logged = [int(line["step"]) + 1 for line in read_dicts(folder / "metrics.csv") if line.get("step")]
        remarks.append(f"This run has not ended: it has logged up to step {max(logged, default=0)}.")
    figures = {
        "Training": partial(pictures.run_training, folder),
        "Strides while training": partial(pictures.run_strides, folder),
        "Windows": partial(pictures.run_windows, folder),
        "Resolution": partial(pictures.run_resolutions, {"": folder}, row.name),
    }
    if result and not result["strides"]:
        remarks.append("This run has no learned strides: its downsampling is fixed.")
        figures = {"Training": figures["Training"]}
    drawn = _draw(row.name, figures, remarks)
    made = [*([_result(folder, result)] if result else []), *_strides(folder, result)]
    return Report(row.name, remarks, made, drawn, _provenance(result), text)


def _summary(config: Mapping[str, Any]) -> str:
    """Return one sentence on what was trained on what."""
    network, data = config["model"]["network"], config["data"]
    options, path = network.get("init_args", {}), data.get("init_args", {}).get("path")
    names = [part["class_path"].rsplit(".", 1)[-1] for part in (network, data)]
    depth = f"-{options['depth']}" if "depth" in options else ""
    method = METHODS.get(str(options.get("downsample")), "its own downsampling")
    return f"{names[0]}{depth} with {method}, trained on {Path(path).name if path else names[1]}."


def _result(folder: Path, result: Mapping[str, Any]) -> Table:
    """Return accuracy, cost and time of a run that has ended."""
    lines = [
        ("accuracy on the test split", _number(result["accuracy"], ".2f", 100, " %")),
        *(
            (f"accuracy, {task}", _number(found, ".2f", 100, " %"))
            for task, found in (result["accuracies"] or {}).items()
        ),
        ("MACs a sample, resampling included", _millions(total_macs(result))),
        ("of them resampling", _millions(result["resampling_macs"])),
        ("MACs a sample with the initial strides", _millions(_initial_macs(folder))),
        ("budget of MACs", _millions(result["macs_budget"])),
        ("cost of strides, Eq. 6", _number(result["stride_cost"])),
        ("parameters", _number(result["parameters"], ",")),
        ("steps", _number(result["steps"], ",")),
        ("time of a step, median, data included", _number(result["step_time_ms"], ".3g", unit=" ms")),
        ("time of training", _duration(result["train_seconds"])),
        ("peak memory", _number(result["peak_memory_mb"], ",", unit=" MB")),
    ]
    return Table("Result", (), tuple(lines))


def _initial_macs(folder: Path) -> float | None:
    try:
        network, data = pictures.look_into(folder)
        for _, layer in learnable_layers(network):
            layer.reset_strides()
        return sum(count_macs(network, torch.zeros(1, *data.sample_shape)))
    except Exception:  # a remark on the pictures names the reason
        return None


def _strides(folder: Path, result: Mapping[str, Any]) -> Iterator[Table]:
    """Return strides and sizes of the maps at the start and at the end, and the cut-off frequencies of sounds."""
    try:
        rows = read_rows(folder / "strides.csv")
    except UsageError:  # a remark on the pictures names the reason
        return
    start, end = ({(row.layer, row.axis): row for row in ordered} for ordered in (reversed(rows), rows))
    cutoffs = result.get("cutoffs") or {"exact": {}}
    remaining = {layer: iter(found) for layer, found in cutoffs["exact"].items()}
    heading = ["layer", "axis", "start", "end", "map at the start", "map at the end"]
    heading += [f"cut-off ({', '.join(result['axes'].values())})"] if remaining else []
    lines = []
    for (layer, axis), last in end.items():
        first = start[layer, axis]
        line = [layer, axis, _number(first.stride), _number(last.stride), str(first.size), str(last.size)]
        line += [_number(next(remaining[layer]), ".3g")] if remaining else []
        lines.append(tuple(line))
    if lines:
        yield Table("Strides", tuple(heading), tuple(lines))


def _provenance(facts: Mapping[str, Any]) -> Table:
    names = ("commit", "hardware", "seed", "data", "data_fingerprint", "time_of_all_runs")
    lines = [(name.replace("_", " "), facts.get(name)) for name in names]
    lines += (facts.get("versions") or {}).items()
    return Table("Provenance", (), tuple((name, str(value)) for name, value in lines if value is not None))


def _report_study(folder: Path, definition: Mapping[str, Any], rows: Sequence[Row]) -> Report:
    """Return the report of a study as a whole."""
    counts = {state: sum(row.state == state for row in rows) for state in ("done", "failed", "unfinished", "open")}
    remarks = [f"{len(rows)} runs: {', '.join(f'{n} {state}' for state, n in counts.items() if n)}."]
    remarks += [str(definition["notes"])] if definition.get("notes") else []
    remarks += [f"{row.name} failed: {row.error}." for row in rows if row.state == "failed"]
    done = [row for row in rows if row.result is not None]
    name = str(definition.get("name") or folder.absolute().name)
    figures = {title.capitalize(): partial(draw, folder, done) for title, draw in pictures.FIGURES.items()}
    drawn = _draw(name, figures, remarks)
    try:
        facts: dict[str, Any] = read_json(folder / "provenance.json")
    except (OSError, ValueError):  # no run has ended yet
        facts = {}
    facts["time_of_all_runs"] = _duration(facts.get("seconds"))
    config = yaml.safe_dump({key: value for key, value in definition.items() if key != "runs"}, sort_keys=False)
    made = results.tables(definition, rows, results.read_latency(folder)["latency"])
    return Report(name, remarks, made, drawn, _provenance(facts), config)


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
            _millions(total_macs(result) if result else None),
            ", ".join("×".join(_number(s, ".2f") for s in layer) for layer in strides) or DASH,
            _duration(result.get("train_seconds")),
        ))  # fmt: skip
    heading = ("run", *axes, "state", "accuracy in %", "MACs a sample", "learned strides", "training")
    return Table("Runs", heading, tuple(lines))


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
