"""`diffstride report`: a run or a study as one page of HTML that needs nothing beside it.

A study's page holds its runs' reports too, fused_axes: one file can be sent and kept, links in it cannot break, and
plotly's five megabytes are there once and not for every run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
import yaml
from torch import Tensor, nn

from diffstride._files import atomic_write_text, describe_os_error, read_text
from diffstride._text import one_line
from diffstride.cost import Macs, count_macs, cutoff_frequencies, stride_cost
from diffstride.errors import UsageError
from diffstride.experiments.console import PlainConsole, plain
from diffstride.experiments.figures.plots import COLOURS
from diffstride.experiments.history import History, axis_names, read_dicts, read_history, whole_number
from diffstride.experiments.parser import CommandParser, check_file
from diffstride.experiments.studies.probes import AxisWindow, Resolution, input_windows, resolutions, sample_inputs
from diffstride.experiments.studies.results import (
    METHODS,
    Row,
    Statistic,
    Table,
    groups,
    is_study,
    printable_lines,
    read_latency,
    read_study,
    row_of,
    statistic,
    striding_factor,
    tables,
)
from diffstride.experiments.studies.study import shown
from diffstride.experiments.training.documents import load_yaml, read_json
from diffstride.experiments.training.fit import quiet
from diffstride.experiments.training.runs import build_data, load_run
from diffstride.experiments.training.schema import check_kind
from diffstride.nn import learnable_layers

DESCRIPTION = """Make one HTML page of a run or of a study, with interactive figures; it opens without a network.

  diffstride report runs/NAME
  diffstride report runs/STUDY --out study.html

A study's page has the reports of all its runs fused_axes in it. What has not ended is shown as far as it has come."""

PALETTE = (*COLOURS[:6], "#808080")  # black would vanish on a dark page
GREY = PALETTE[-1]
DASHES = {"height": "solid", "width": "dash", "depth": "dot", "length": "solid", "time": "solid", "frequency": "dash"}
SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "x": "✕", "star": "★"}
POINTS = 400  # that a line of a figure has at most
DASH = "–"  # stands for what is missing or not finite

Spec = dict[str, Any]  # a part of a plotly figure


# What a page is made of; the template writes it


class Key(NamedTuple):
    """An entry of a legend; `mark` is plotly's name of a dash, or a character. A click hides the traces so named."""

    label: str
    colour: str
    mark: str


class Plot(NamedTuple):
    """One pair of axes."""

    title: str
    data: list[Spec]
    layout: Spec


class Figure(NamedTuple):
    """Plots side by side, or below each other where there is no room, with one legend."""

    title: str
    caption: str
    legend: list[Key]
    plots: list[Plot]


class Fact(NamedTuple):
    """A key figure."""

    label: str
    value: str
    note: str = ""


class Report(NamedTuple):
    """What is told of a run, or of a study as a whole."""

    name: str
    summary: str
    remarks: list[str]
    facts: list[Fact]
    tables: list[Table]
    figures: list[Figure]
    config: str
    provenance: Table


class Page(NamedTuple):
    """A page: of one run, or of a study with the list of its runs and the report of each that has begun."""

    question: str
    report: Report
    listed: Table | None = None
    runs: tuple[Report, ...] = ()

    def html(self) -> str:
        """The page, complete."""
        from jinja2 import Environment, StrictUndefined
        from plotly.offline import get_plotlyjs

        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
        )
        environment.policies["json.dumps_function"] = lambda value, **_: json.dumps(_finite(value))
        template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
        return template.render(page=self, plotly=get_plotlyjs())


def _printable(value: Any) -> Any:
    """Return a value as the page has it; markup, which the template itself makes, stays as it is."""
    return printable_lines(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


# One run


class Seen(NamedTuple):
    """What only the trained network can tell, with some of the data's inputs."""

    windows: list[AxisWindow]
    resolutions: list[Resolution]
    cutoffs: dict[str, tuple[float, ...]]
    initial_macs: Macs
    initial_cost: float


def run_report(folder: Path, row: Row, batch: Callable[[str], Tensor | str]) -> Report:
    """What a run's folder has to tell, whether the run has ended or not.

    Args:
        folder: of the run.
        row: its state and result.
        batch: gives inputs of the data that a configuration, as JSON, describes; or says why there are none.
    """
    text = _text_of(folder / "config.yaml")
    metrics = read_dicts(folder / "metrics.csv")
    history = read_history(folder / "strides.csv")
    result = row.result or {}
    axes = list(dict.fromkeys(axis for _, axis in history))
    remarks = list(_state(row, metrics))
    figures = [*_training(metrics), *_trajectories(history)]
    seen = None
    if history or result.get("strides"):
        try:
            seen = _look(folder, batch, axes)
        except UsageError as error:
            remarks.append(
                "The learned windows, the staircase of resolutions, the cut-off frequencies and the cost at the "
                f"initial strides are left out: {error}."
            )
    elif result:
        remarks.append("This run has no learned strides: its downsampling is fixed.")
    if seen is not None:
        figures += [*_windows(seen.windows), *_staircase(seen.resolutions, axes)]
    return Report(
        row.name,
        _summary(text, result),
        remarks,
        _facts(result, seen) if result else [],
        [*_strides(result, history, seen), *_cost(result, seen)],
        figures,
        text,
        _provenance(result, "seed", "data", "data_fingerprint", "steps", "epochs"),
    )


def _text_of(file: Path) -> str:
    try:
        return read_text(file)
    except ValueError as error:
        return f"({file.name} cannot be shown: {one_line(error)})"


def _state(row: Row, metrics: Sequence[Mapping[str, str]]) -> Iterable[str]:
    """What must be said of a run that has not ended well."""
    if row.state == "failed":
        yield f"This run failed: {row.error}. The page shows what it left."
    elif row.state != "done":
        last = max((step for step, _ in _series(metrics, "step")), default=None)
        got = "nothing is logged yet" if last is None else f"it has logged up to step {last}"
        yield f"This run has not ended: {got}. The page shows what there is."


def _summary(text: str, result: Mapping[str, Any]) -> str:
    """What was trained on what, in one sentence."""
    try:
        config = load_yaml(text)
    except yaml.YAMLError:
        config = None
    network, data = _at(config, "model", "network"), _at(config, "data")
    options = _at(network, "init_args")
    words = _class(network) or "A network"
    if "depth" in options:
        words += f"-{options['depth']}"
    if (method := str(options.get("downsample"))) in METHODS:
        words += f" with {METHODS[method]}"
    path = _at(data, "init_args").get("path")
    if on := Path(str(path)).name if path else _class(data):
        words += f", trained on {on}"
    if result.get("steps") is not None:
        words += f" for {result['steps']:,} steps"
    if result.get("epochs") is not None:
        words += f" ({_counted(result['epochs'], 'epoch')})"
    return f"{words}."


def _at(config: Any, *keys: str) -> Mapping[str, Any]:
    """A part of a configuration; an empty one where it is not there."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else {}


def _class(config: Mapping[str, Any]) -> str:
    return str(config.get("class_path", "")).rsplit(".", 1)[-1]


def _batch(data: str) -> Tensor | str:
    try:
        return sample_inputs(build_data(json.loads(data)))
    except Exception as error:  # of libraries that read files, images or the hub
        return f"the run's data cannot be loaded ({one_line(error)})"


def _look(folder: Path, batch: Callable[[str], Tensor | str], axes: Sequence[str]) -> Seen:
    network, config = load_run(folder)
    inputs = batch(json.dumps(config.get("data"), default=str))
    if isinstance(inputs, str):
        raise UsageError(inputs)
    try:
        return _see(network, inputs, axes)
    except (RuntimeError, ValueError) as error:  # data that have changed, layers that no input reaches
        raise UsageError(f"the network cannot be looked into ({one_line(error)})") from error


def _see(network: nn.Module, batch: Tensor, axes: Sequence[str]) -> Seen:
    example = batch[:1]
    untrained = copy.deepcopy(network)
    for _, layer in learnable_layers(untrained):
        layer.reset_strides()
    with torch.no_grad():
        return Seen(
            input_windows(network, batch, axes),
            resolutions(network, example),
            cutoff_frequencies(network, 1, example),
            count_macs(untrained, example),
            stride_cost(untrained).item(),
        )


def _facts(result: Mapping[str, Any], seen: Seen | None) -> list[Fact]:
    initial = "" if seen is None else f"; {_millions(sum(seen.initial_macs))} at the initial strides"
    return [
        Fact("Accuracy", _number(result["accuracy"], ".2f", 100, " %"), "on the test split"),
        *(
            Fact(f"Accuracy, {task}", _number(accuracy, ".2f", 100, " %"), "on the test split")
            for task, accuracy in (result["accuracies"] or {}).items()
        ),
        Fact("MACs an image", _millions(result["macs"] + result["resampling_macs"]), f"resampling included{initial}"),
        Fact("Parameters", _number(result["parameters"], ",")),
        Fact("Time of a step", _number(result["step_time_ms"], ".3g", unit=" ms"), "median, data included"),
        Fact("Training", _duration(result["train_seconds"]), f"{_number(result['steps'], ',')} steps"),
        Fact("Peak memory", _number(result["peak_memory_mb"], ",", unit=" MB")),
    ]


def _strides(result: Mapping[str, Any], history: History, seen: Seen | None) -> Iterable[Table]:
    """Strides at the start and at the end, with the sizes of the maps and what the strides mean as frequencies."""
    starts = result.get("strides_initial") or _strides_at(history, 0)
    lines, unit = [], ""
    found = seen.cutoffs if seen else {}
    units: Mapping[str, str] = result.get("axes") or {}
    if measured := (result.get("cutoffs") or {}).get("exact"):
        found = measured
    for layer, strides in (result.get("strides") or _strides_at(history, -1)).items():
        unit = ", ".join(units.values()) if measured else "cycles per " + ("sample" if len(strides) == 1 else "pixel")
        cutoffs: Sequence[float | None] = found.get(layer, ())
        if len(cutoffs) != len(strides):  # of another network than the result, of a step that is not complete
            cutoffs = (None,) * len(strides)
        names = axis_names(len(strides), [axis for name, axis in history if name == layer])
        for axis, start, end, cutoff in zip(names, starts[layer], strides, cutoffs, strict=True):
            rows = history.get((layer, axis))
            sizes = (rows[0].size, rows[-1].size) if rows else (None, None)
            numbers = [_number(start), _number(end), *(_number(size, "d") for size in sizes), _number(cutoff, ".3g")]
            lines.append((layer, axis, *numbers))
    if lines:
        heading = ("layer", "axis", "start", "end", "map at the start", "map at the end", f"cut-off, {unit}")
        yield Table("Strides", heading, tuple(lines))


def _strides_at(history: History, place: int) -> dict[str, list[float]]:
    """Strides by layer at the start (0) or the end (-1) of their history."""
    found: dict[str, list[float]] = {}
    for (layer, _), rows in history.items():
        found.setdefault(layer, []).append(rows[place].stride)
    return found


def _cost(result: Mapping[str, Any], seen: Seen | None) -> Iterable[Table]:
    """What the network costs, and what it cost with the strides that it started from."""
    macs, resampling = seen.initial_macs if seen else (None, None)
    lines = [
        ("million MACs an image, convolutions and linear layers", macs, "macs", 1e-6),
        ("million MACs an image, resampling", resampling, "resampling_macs", 1e-6),
        ("cost of strides, Eq. 6", seen and seen.initial_cost, "stride_cost", 1),
        ("budget, million MACs an image", None, "macs_budget", 1e-6),
    ]
    known = [
        (name, _number(before, ".4g", scale), _number(result[key], ".4g", scale))
        for name, before, key, scale in lines
        if result.get(key) is not None
    ]
    if known and seen:
        yield Table("Cost", ("", "initial strides", "at the end"), tuple(known))
    elif known:
        yield Table("Cost", ("", "at the end"), tuple((name, end) for name, _, end in known))


def _provenance(facts: Mapping[str, Any], *more: str) -> Table:
    """Where figures come from."""
    lines = [(name.replace("_", " "), facts.get(name)) for name in ("commit", "hardware", *more)]
    lines += (facts.get("versions") or {}).items()
    return Table("Provenance", (), tuple((name, str(value)) for name, value in lines if value is not None))


# Figures of a run


def _training(metrics: Sequence[Mapping[str, str]]) -> Iterable[Figure]:
    """Loss and accuracy, and what is logged of the cost, against the optimiser step."""
    columns = {
        "train/loss": ("loss", "training", 1, "solid"),
        "val/loss": ("loss", "test", 1, "dash"),
        "val/accuracy": ("accuracy in %", "test", 100, "dash"),
        "train/macs": ("million MACs an image", "training", 1e-6, "solid"),
        "train/stride_cost": ("cost of strides, Eq. 6", "training", 1, "solid"),
    }
    plots: dict[str, Plot] = {}
    legend: dict[str, Key] = {}
    for column, (what, split, scale, dash) in columns.items():
        if points := [(step, value and scale * value) for step, value in _series(metrics, column)]:
            key = legend.setdefault(split, Key(split, PALETTE[split == "test"], dash))
            plot = plots.setdefault(what, Plot(what[0].upper() + what[1:], [], _steps(what)))
            plot.data.append(_line(key, points, what, markers=split == "test"))
    if plots:
        caption = "Training values are those of single batches."
        yield Figure("Training", caption, list(legend.values()), list(plots.values()))


def _trajectories(history: History) -> Iterable[Figure]:
    """Strides and sizes of maps against the optimiser step: a line per layer and axis."""
    layers = list(dict.fromkeys(layer for layer, _ in history))
    legend, strides, sizes = [], Plot("Strides", [], _steps("stride")), Plot("Maps", [], _steps("samples"))
    for (layer, axis), rows in history.items():
        legend.append(key := Key(f"{layer}, {axis}", _colour(layers.index(layer)), DASHES.get(axis, "solid")))
        strides.data.append(_line(key, [(row.step, row.stride) for row in rows], "stride"))
        sizes.data.append(_line(key, [(row.step, row.size) for row in rows], "size", shape="hv"))
    if legend:
        yield Figure("Strides while training", "And the size of the maps behind the layers.", legend, [strides, sizes])


def _windows(windows: Sequence[AxisWindow]) -> Iterable[Figure]:
    """Each window, initial and learned, over the mean spectrum of what it sees."""
    bars = Key("spectrum", GREY, "■")
    initial, learned = Key("initial window", PALETTE[1], "dash"), Key("learned window", PALETTE[0], "solid")
    layout = {
        "xaxis": {"title": {"text": "frequency (cycles per map)"}},
        "yaxis": {"range": [0, 1.15], "title": {"text": "relative amplitude"}},
    }
    plots = []
    for window in windows:
        top = max(window.spectrum[1:], default=0) or 1
        spectrum = {
            "type": "bar",
            "name": bars.label,
            "legendgroup": bars.label,
            **_points([(f, amplitude / top) for f, amplitude in enumerate(window.spectrum)]),
            "marker": {"color": bars.colour, "opacity": 0.45},
            "hovertemplate": "%{x} cycles: amplitude %{y:.3f}<extra></extra>",
        }
        lines = [
            _line(key, list(enumerate(values)), "window", x="cycles", markers=True)
            for key, values in ((initial, window.initial), (learned, window.learned))
        ]
        plots.append(Plot(f"{window.layer}, {window.axis}", [spectrum, *lines], layout))
    if plots:
        caption = (
            "Bars: mean amplitude of what reaches the window on test inputs, relative to the largest above 0 cycles; "
            "the bar at 0, the mean, goes beyond the frame where it is larger."
        )
        yield Figure("Learned windows over the spectrum", caption, [bars, initial, learned], plots)


def _staircase(found: Sequence[Resolution], names: Sequence[str]) -> Iterable[Figure]:
    """The size of the maps from the input to the last learnable layer."""
    axes = axis_names(len(found[0].learned), names)
    steps = [step for step in found if len(step.learned) == len(axes)]  # behind them, a network may turn 2-d to 1-d
    names = [_label(step.layer) for step in steps]
    initial, learned = Key("initial strides", PALETTE[1], "dash"), Key("learned strides", PALETTE[0], "solid")
    layout = {"xaxis": {"type": "category"}, "yaxis": {"rangemode": "tozero", "title": {"text": "samples"}}}
    plots = []
    for i, axis in enumerate(axes):
        lines = [
            _line(key, list(zip(names, sizes, strict=True)), "size", x="behind", markers=True, shape="hvh")
            for key, sizes in ((initial, [s.initial[i] for s in steps]), (learned, [s.learned[i] for s in steps]))
        ]
        plots.append(Plot(axis.capitalize(), lines, layout))
    yield Figure("Resolution", "Size of the map behind each learnable layer.", [initial, learned], plots)


# A study


def study_page(folder: Path, say: Callable[[str], None]) -> Page:
    """The page of a study and of all its runs.

    Args:
        folder: of the study.
        say: told what is being worked on.
    """
    definition, rows = read_study(folder)
    batch = functools.cache(_batch)  # runs mostly share their data
    started = [row for row in rows if (folder / row.name / "config.yaml").is_file()]
    runs = []
    for i, row in enumerate(started):
        say(f"run {i + 1} of {len(started)}: {row.name}")
        runs.append(run_report(folder / row.name, row, batch))
    latency = read_latency(folder)
    notes = [str(definition["notes"])] if definition.get("notes") else []
    report = Report(
        str(definition.get("name") or folder.resolve().name),
        _states(rows),
        [*notes, *(f"{row.name} failed: {row.error}." for row in rows if row.state == "failed")],
        [],
        tables(definition, rows, latency),
        [*_compare(rows, latency), *_all_trajectories(folder, rows), *_distribution(rows), *_factors(rows)],
        yaml.safe_dump({key: value for key, value in definition.items() if key != "runs"}, sort_keys=False),
        _study_provenance(folder),
    )
    return Page(str(definition.get("question") or ""), report, _listed(rows), tuple(runs))


def _states(rows: Sequence[Row]) -> str:
    counts = {state: sum(row.state == state for row in rows) for state in ("done", "failed", "unfinished", "open")}
    return f"{_counted(len(rows), 'run')}: {', '.join(f'{n} {state}' for state, n in counts.items() if n)}."


def _listed(rows: Sequence[Row]) -> Table:
    """A line for each run."""
    axes = list(dict.fromkeys(axis for row in rows for axis in row.axes))
    lines = []
    for row in rows:
        result = row.result or {}
        strides = ", ".join("×".join(_number(s, ".2f") for s in layer) for layer in result.get("strides", {}).values())
        lines.append(
            (
                row.name,
                *(shown(axis, row.axes[axis]).removeprefix(axis) if axis in row.axes else DASH for axis in axes),
                row.state,
                _number(result.get("accuracy"), ".2f", 100),
                _number(result["macs"] + result["resampling_macs"] if result else None, ".4g", 1e-6),
                strides or DASH,
                _duration(result.get("train_seconds")),
            )
        )
    heading = ("run", *axes, "state", "accuracy in %", "million MACs", "learned strides", "training")
    return Table("Runs", heading, tuple(lines))


class _StudyFacts(TypedDict, total=False):
    commit: str | None
    hardware: str
    versions: dict[str, str]
    seconds: float


def _study_provenance(folder: Path) -> Table:
    try:
        facts: dict[str, Any] = read_json(folder / "provenance.json")
        check_kind(facts, _StudyFacts)
    except (OSError, ValueError):  # no run has ended yet
        facts = {}
    time = {"time of all runs": _duration(facts["seconds"])} if "seconds" in facts else {}
    return _provenance(facts | time, *time)


def _compare(rows: Sequence[Row], latency: Mapping[str, Any]) -> Iterable[Figure]:
    """Accuracy against compute, and against time where that was measured: a point per group of runs."""
    series: dict[str, list[tuple[str, Statistic, Statistic]]] = {}
    for label, group in groups(rows).items():
        accuracy = statistic(group, lambda r: r["accuracy"])
        macs = statistic(group, lambda r: r["macs"] + r["resampling_macs"])
        if accuracy is not None and macs is not None:
            method = group[0].axes.get("method")
            series.setdefault(METHODS.get(str(method), str(method or "runs")), []).append((label, accuracy, macs))
    if not series:
        return
    y = {"title": {"text": "accuracy in %"}}
    compute = [1e-6 * macs.mean for points in series.values() for _, _, macs in points]
    against_macs = Plot("Compute", [], {"xaxis": _wide("million MACs an image", compute), "yaxis": y})
    x = {"rangemode": "tozero", "title": {"text": "ms a batch"}}
    against_time = Plot("Time, strides fixed", [], {"xaxis": x, "yaxis": y})
    legend = []
    for i, (name, points) in enumerate(series.items()):
        symbol, sign = list(SYMBOLS.items())[i % len(SYMBOLS)]
        legend.append(key := Key(name, _colour(i), sign))
        shared = {
            "type": "scatter",
            "mode": "markers",
            "name": _label(name),
            "legendgroup": name,
            "y": [100 * accuracy.mean for _, accuracy, _ in points],
            "error_y": {"array": [100 * (a.sd or 0) for _, a, _ in points], "thickness": 1, "width": 3},
            "marker": {"symbol": symbol, "size": 10, "color": key.colour},
            "text": [_hover(*point, latency) for point in points],
            "hoverinfo": "text",
        }
        against_macs.data.append(shared | {"x": [1e-6 * macs.mean for _, _, macs in points]})
        times = [latency[label]["ms"] if label in latency else None for label, _, _ in points]
        against_time.data.append(shared | {"x": times})
    caption = "Means over the runs of a group, which differ in the seed alone; the bars are standard deviations."
    plots = [against_macs, against_time] if latency else [against_macs]
    yield Figure("Accuracy against compute", caption, legend, plots)


def _hover(label: str, accuracy: Statistic, macs: Statistic, latency: Mapping[str, Any]) -> str:
    spread = "" if accuracy.sd is None else f" ± {100 * accuracy.sd:.1f}"
    lines = [
        f"<b>{_label(label)}</b>",
        f"accuracy {100 * accuracy.mean:.1f}{spread} %",
        f"{1e-6 * macs.mean:.4g} million MACs",
        _counted(accuracy.n, "seed"),
    ]
    if label in latency:
        lines.append(f"{latency[label]['ms']:.3g} ms a batch")
    return "<br>".join(lines)


def _all_trajectories(folder: Path, rows: Sequence[Row]) -> Iterable[Figure]:
    """Strides of all runs that learn them, a plot per layer, a colour per group of runs."""
    plots: dict[str, Plot] = {}
    legend: dict[str, Key] = {}
    styles: dict[str, None] = {}  # a set that keeps its order
    for label, group in groups(rows).items():
        for row in group:
            for (layer, axis), line in read_history(folder / row.name / "strides.csv").items():
                key = legend.setdefault(label, Key(label, _colour(len(legend)), "solid"))
                dash = DASHES.get(axis, "solid")
                styles[f"{ {'dash': 'dashed', 'dot': 'dotted'}.get(dash, dash) } along the {axis}"] = None
                points = [(r.step, r.stride) for r in line]
                plot = plots.setdefault(layer, Plot(layer, [], _steps("stride")))
                plot.data.append(_line(key._replace(mark=dash), points, "stride", name=f"{row.name}, {axis}"))
    if plots:
        caption = f"Lines are {' and '.join(styles)}; those of one colour and style differ in the seed."
        yield Figure("Strides while training", caption, list(legend.values()), list(plots.values()))


def _distribution(rows: Sequence[Row]) -> Iterable[Figure]:
    """Learned strides by layer and axis, over all runs."""
    boxes: dict[str, Spec] = {}
    for row in rows:
        for layer, strides in ((row.result or {}).get("strides") or {}).items():
            for axis, stride in zip(
                axis_names(len(strides), list((row.result or {}).get("axes") or ())), strides, strict=True
            ):
                box = boxes.setdefault(axis, _box(axis, _colour(len(boxes))))
                box["hovertemplate"] = "%{text}: %{y:.3f}<extra></extra>"
                box["x"].append(_label(layer))
                box["y"].append(stride)
                box["text"].append(_label(f"{row.name}, {axis}"))
    if boxes:
        legend = [Key(axis, box["line"]["color"], "●") for axis, box in boxes.items()]
        layout = {"boxmode": "group", "xaxis": {"type": "category"}, "yaxis": {"title": {"text": "learned stride"}}}
        caption = "A point is a run: boxes hold the middle half of the runs, whatever they started from."
        yield Figure("Learned strides", caption, legend, [Plot("By layer", list(boxes.values()), layout)])


def _factors(rows: Sequence[Row]) -> Iterable[Figure]:
    """The product of all strides, at the start and at the end."""
    done = [(label, row.name, row.result) for label, group in groups(rows).items() for row in group if row.result]
    learned = [(label, name, result) for label, name, result in done if result["strides"]]
    if not learned:
        return
    labels = [_label(label) for label, _, _ in learned]
    text = [_label(name) for _, name, _ in learned]
    data: list[Spec] = []
    legend: list[Key] = []
    values: list[float] = []
    for name, way, colour, symbol in (
        ("initial", "strides_initial", PALETTE[1], "diamond"),
        ("learned", "strides", PALETTE[0], "circle"),
    ):
        factors = [striding_factor(result, way) or 1.0 for _, _, result in learned]
        hover = {"text": text, "hovertemplate": f"%{{text}}, {name}: %{{x:.4g}}<extra></extra>"}
        marker = {"color": colour, "symbol": symbol, "size": 9, "opacity": 0.8}
        points = {"type": "scatter", "mode": "markers", "x": factors, "y": labels, "marker": marker, **hover}
        box = _box(name, colour) | {"x": factors, "y": [f"all runs, {name}"] * len(factors), "orientation": "h"}
        data += [points | {"name": name, "legendgroup": name}, box | {"boxpoints": False, "hoverinfo": "skip"}]
        legend.append(Key(name, colour, SYMBOLS[symbol]))
        values += factors
    layout = {
        "height": 152 + 26 * len(set(labels)),
        "xaxis": _wide("product of all strides", values),
        "yaxis": {"type": "category", "autorange": "reversed"},
    }
    caption = (
        "Over layers and axes: how many times fewer samples the last map has than the first. Boxes: over all runs."
    )
    yield Figure("Striding factor", caption, legend, [Plot("By start", data, layout)])


def _box(name: str, colour: str) -> Spec:
    return {
        "type": "box",
        "name": name,
        "legendgroup": name,
        "x": [],
        "y": [],
        "text": [],
        "boxpoints": "all",
        "jitter": 0.5,
        "pointpos": 0,
        "hoveron": "points",
        "line": {"color": colour, "width": 1},
        "marker": {"color": colour, "size": 6, "opacity": 0.8},
    }


# Parts of figures


def _series(rows: Iterable[Mapping[str, str]], column: str) -> list[tuple[int, float | None]]:
    """The steps at which a column has a value, and the values; None for one that is not finite.

    Lightning logs a step by the number of those before it; strides and results count those done, and so does this.
    """
    found: list[tuple[int, float | None]] = []
    for row in rows:
        with suppress(KeyError, TypeError, ValueError):
            value = float(row[column])
            found.append((whole_number(row["step"]) + 1, value if math.isfinite(value) else None))
    return found


def _line(
    key: Key,
    points: Sequence[tuple[float | str, float | None]],
    what: str,
    *,
    name: str | None = None,
    x: str = "step",
    markers: bool = False,
    shape: str = "linear",
) -> Spec:
    """A line in the style of a legend's entry, and called like it if it has no `name` of its own."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "name": _label(name or key.label),
        "legendgroup": key.label,
        **_points(points),
        "line": {"color": key.colour, "dash": key.mark, "width": 1.5, "shape": shape},
        "hovertemplate": f"%{{fullData.name}}<br>{x} %{{x}}: {what} %{{y:.4g}}<extra></extra>",
    }


def _points(points: Sequence[tuple[float | str, float | None]]) -> Spec:
    """Coordinates, rounded, and thinned to what can be seen."""
    every = math.ceil(len(points) / POINTS) or 1
    kept = [*points[:-1:every], *points[-1:]]
    return {"x": [x for x, _ in kept], "y": [None if y is None else float(f"{y:.5g}") for _, y in kept]}


def _steps(y: str) -> Spec:
    """The layout of what is drawn against the optimiser step."""
    return {"xaxis": {"rangemode": "tozero", "title": {"text": "optimiser step"}}, "yaxis": {"title": {"text": y}}}


def _wide(title: str, values: Sequence[float]) -> Spec:
    """An axis for these values: logarithmic, with the numbers 1, 2, 5, 10, .. at it, if their range is wide."""
    axis: Spec = {"title": {"text": title}}
    if max(values, default=1) > 4 * min(values, default=1) > 0:
        ticks = [m * 10.0**e for e in range(-4, 8) for m in (1, 2, 5)]
        axis |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}
    return axis


def _colour(i: int) -> str:
    return PALETTE[i % len(PALETTE)]


def _label(text: str) -> str:
    """Text as it is: plotly takes some tags for markup."""
    return html.escape(text, quote=False)


# Words


def _number(value: float | None, form: str = ".4g", scale: float = 1, unit: str = "") -> str:
    """A number, or a dash where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{scale * value if scale != 1 else value:{form}}{unit}"


def _millions(value: float | None) -> str:
    return _number(value, ".3g", 1e-6, " M")


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 600:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _finite(value: Any) -> Any:
    """The same with null for every number that JSON has not; one of them would stop the whole page's script."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The command


def report(arguments: Sequence[str]) -> None:
    """Make the page, say where it is."""
    options = _options(arguments)
    folder: Path = options.folder
    target: Path = options.out or folder / "report.html"
    console = PlainConsole()
    with console.status("reading") as status, quiet():
        text = make(folder, lambda name: status.update(plain(name))).html()
    try:
        atomic_write_text(target, text)
    except OSError as error:
        raise UsageError(f"{describe_os_error(error)}, or give another path with --out") from error
    console.say(f"{target}: {len(text.encode()) / 1e6:.1f} MB; open it in a browser.")


def make(folder: Path, say: Callable[[str], None]) -> Page:
    """The page of a run or of a study.

    Args:
        folder: of either.
        say: told what is being worked on.

    Raises:
        UsageError: a folder that is neither.
    """
    if is_study(folder):
        return study_page(folder, say)
    if not (folder / "config.yaml").is_file():
        what = (
            f"{folder} is not the folder of a run or of a study" if folder.is_dir() else f"there is no folder {folder}"
        )
        raise UsageError(f"{what}: give one that `diffstride fit` or `diffstride study` made")
    name = folder.resolve().name
    say(name)
    return Page(_question(folder.resolve()), run_report(folder, row_of(folder.resolve().parent, name, {}), _batch))


def _question(folder: Path) -> str:
    """That of the study which a run belongs to, if it does."""
    if not is_study(folder.parent):
        return ""
    with suppress(UsageError):  # the run's page does not depend on it
        definition, rows = read_study(folder.parent)
        return str(definition.get("question") or "") if folder.name in {row.name for row in rows} else ""
    return ""


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="diffstride report", description=DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="RUN_OR_STUDY", help="folder of a run or of a study")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="the page (default: report.html in the folder); replaced if there"
    )
    options = parser.parse_args(arguments)
    out: Path | None = options.out
    if out is not None and out.suffix != ".html":
        raise UsageError(f"--out must end in .html, got {out}")
    if out is not None:
        check_file(out)
    return options
