"""The figures of a study, drawn from its folder, and those of a single run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffstride._text import one_line
from diffstride.errors import UsageError
from diffstride.experiments.data import ClassificationData
from diffstride.experiments.figures import plots
from diffstride.experiments.history import axis_names, read_rows
from diffstride.experiments.studies.probes import Resolution, executed, input_windows, resolutions, sample_inputs
from diffstride.experiments.studies.results import (
    METHODS,
    Row,
    Statistic,
    by_task,
    first_cutoff,
    groups,
    latency_file,
    line_of,
    read_study,
    seeds_of,
    statistic,
    striding_factor,
)
from diffstride.experiments.studies.study import shown
from diffstride.experiments.training.runs import build_data, load_run
from diffstride.nn import DiffStride2d

NO_RUNS = "no run with learned strides is done"
MIXED = "the runs have strides along different numbers of axes"
NO_STRIDES = "the network has no learned strides"


def draw(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Draw figures of a study as `folder/NAME.png` and `.svg`, from the runs that are done.

    Args:
        folder: of the study.
        names: among those of :data:`FIGURES`.

    Returns:
        The names of those that could not be drawn, and why.

    Raises:
        UsageError: a folder that is not a study's.
    """
    _, rows = read_study(folder)
    done = [row for row in rows if row.result is not None]
    return _draw({name: partial(FIGURES[name], folder, done) for name in names})


def draw_run(folder: Path) -> dict[str, str]:
    """Draw `windows` and `resolution` of a run that is done into its folder; the result is that of :func:`draw`."""
    title = f"{{}}, {folder.absolute().name}"
    return _draw({
        "windows": partial(_draw_windows, folder, folder / "windows", title),
        "resolution": partial(_draw_resolutions, {"": folder}, folder / "resolution", title),
    })  # fmt: skip


def _draw(figures: Mapping[str, Callable[[], str | None]]) -> dict[str, str]:
    missing = {}
    for name, figure in figures.items():
        try:
            why = figure()
        except UsageError as error:  # data or a checkpoint that is no longer there
            why = str(error)
        if why is not None:
            missing[name] = why
    return missing


# Of many runs: each draws what it can from the done rows of a study, and says why where it cannot


def _trajectories(folder: Path, rows: Sequence[Row]) -> str | None:
    runs, legend = _by_start(rows)
    if not runs:
        return NO_RUNS
    found = {name: [read_rows(folder / row.name / "strides.csv") for row in group] for name, group in runs.items()}
    histories = {name: kept for name, group in found.items() if (kept := [rows for rows in group if rows])}
    if not histories:
        return "no run has its strides.csv any more"
    title = f"Strides while training, {_runs(runs)}"
    plots.trajectories_of_runs(histories, folder / "trajectories", title=title, legend=legend)
    return None


def _strides(folder: Path, rows: Sequence[Row]) -> str | None:
    runs, legend = _by_start(rows)
    if not runs:
        return NO_RUNS
    strides = {
        name: [(_result(row)["strides_initial"], _result(row)["strides"]) for row in group]
        for name, group in runs.items()
    }
    if _mixed(len(ends) for group in strides.values() for both in group for layers in both for ends in layers.values()):
        return MIXED
    first = _result(next(iter(runs.values()))[0])
    axes = axis_names(len(next(iter(first["strides"].values()))), list(first.get("axes") or ()))
    title = f"Strides learned, {_runs(runs)}"
    plots.learned_strides(strides, axes, folder / "strides", title=title, legend=legend)
    return None


def _factor(folder: Path, rows: Sequence[Row]) -> str | None:
    runs, legend = _by_start(rows)
    if not runs:
        return NO_RUNS
    factors = {
        name: (
            striding_factor(_result(group[0]), "strides_initial") or 1.0,
            [striding_factor(_result(row)) or 1.0 for row in group],
        )
        for name, group in runs.items()
    }
    title = f"Global striding factor, {_runs(runs)}"
    plots.striding_factors(factors, folder / "factor", title=title, legend=legend)
    return None


def _pareto(folder: Path, rows: Sequence[Row]) -> str | None:
    facts = latency_file(folder)
    latency: Mapping[str, Any] = {} if facts is None else facts["latency"]
    by_series: dict[str, list[Row]] = {}
    for row in rows:
        by_series.setdefault(_series(row, rows), []).append(row)
    compute: dict[str, list[plots.Point]] = {}
    time: dict[str, list[plots.Point]] = {}
    for series, members in by_series.items():
        varying = [axis for axis in _varying(members) if axis not in ("method", "dataset")]
        for label, group in groups(members).items():
            accuracy = statistic(group, lambda result: result["accuracy"])
            if accuracy is None:
                continue
            macs = [(_result(row)["macs"] + _result(row)["resampling_macs"]) / 1e6 for row in group]
            low, high = min(macs), max(macs)
            mean = min(max(fmean(macs), low), high)  # of equal floats it may lie outside by a rounding
            point = plots.Point(_name(group[0].axes, varying), mean, low, high, accuracy.mean, accuracy.sd or 0)
            compute.setdefault(series, []).append(point)
            if label in latency:
                ms, low, high = (latency[label][key] for key in ("ms", "low", "high"))
                time.setdefault(series, []).append(point._replace(cost=ms, low=low, high=high))
    if not compute:
        return "no run with an accuracy is done"
    panels = {"million multiply-accumulates an image, mean and range": compute}
    if time and facts is not None:
        panels[
            f"milliseconds a batch of {facts['batch']} on {facts['hardware']}\nstrides fixed, median and quartiles"
        ] = time
    title = f"Accuracy against cost, {seeds_of(rows)}\nLines: the best that costs no more"
    plots.pareto(panels, folder / "pareto", title=title)
    return None


def _windows(folder: Path, rows: Sequence[Row]) -> str | None:
    runs, _ = _by_start(rows)
    if not runs:
        return NO_RUNS
    first = next(iter(runs.values()))[0].name
    return _draw_windows(folder / first, folder / "windows", f"{{}}, {first}")


def _resolution(folder: Path, rows: Sequence[Row]) -> str | None:
    runs, _ = _by_start(rows)
    if not runs:
        return NO_RUNS
    first = {name: folder / group[0].name for name, group in runs.items()}
    return _draw_resolutions(first, folder / "resolution", "{}, the first run of each kind")


def _accuracies(folder: Path, rows: Sequence[Row]) -> str | None:
    panels: dict[str, dict[str, dict[str, plots.Spread]]] = {}
    for group in groups(by_task(rows)).values():
        axes = group[0].axes
        accuracy = statistic(group, lambda result: result["accuracy"])
        if "task" in axes and accuracy is not None:
            setting = str(axes.get("setting", ""))
            panel = panels.setdefault(f"{setting}-task" if setting in ("single", "multi") else setting, {})
            panel.setdefault(_series(group[0], rows), {})[str(axes["task"])] = _spread(accuracy)
    if not panels:
        return "no run with a task is done"
    for series in panels.values():
        for tasks in series.values():
            tasks["mean"] = plots.Spread(fmean(s.mean for s in tasks.values()), math.nan)
    plots.accuracy_bars(
        panels, folder / "accuracies", title=f"Accuracy by task, mean and deviation over {seeds_of(rows)}"
    )
    return None


def _cutoffs(folder: Path, rows: Sequence[Row]) -> str | None:
    rows = [row for row in rows if _result(row).get("cutoffs")]
    if not rows:
        return "no run with cut-off frequencies is done"
    panels: dict[str, dict[str, dict[str, plots.Spread]]] = {}
    for i, (axis, unit) in enumerate(_result(rows[0])["axes"].items()):
        panel = panels.setdefault(f"cut-off along {axis} ({unit})", {})
        names = [str(line_of(row, "task")) for row in rows]
        for task in dict.fromkeys(names):
            group = [row for row, name in zip(rows, names, strict=True) if name == task]
            for kind, name in (("exact", "exact"), ("whole_bins", "in whole bins, as the paper has it")):
                if found := statistic(group, partial(first_cutoff, kind, i)):
                    panel.setdefault(name, {})[task] = _spread(found)
    title = f"Cut-off frequencies of the first layer, mean and deviation over {seeds_of(rows)}"
    plots.cutoff_points(panels, folder / "cutoffs", title=title)
    return None


def _mixed(numbers_of_axes: Iterable[int]) -> bool:
    return len(set(numbers_of_axes)) > 1


def _spread(found: Statistic) -> plots.Spread:
    return plots.Spread(found.mean, math.nan if found.sd is None else found.sd)


def _spectrogram(folder: Path, rows: Sequence[Row]) -> str | None:
    learned = [row for row in rows if _result(row)["strides"] and len(_result(row).get("axes") or ()) == 2]
    if not learned:
        return "no run with learned strides on spectrograms is done"
    return _draw_spectrogram(folder / learned[0].name, folder / "spectrogram", f"{{}}, {learned[0].name}")


FIGURES: dict[str, Callable[[Path, Sequence[Row]], str | None]] = {
    "trajectories": _trajectories,
    "strides": _strides,
    "factor": _factor,
    "pareto": _pareto,
    "windows": _windows,
    "resolution": _resolution,
    "accuracies": _accuracies,
    "cutoffs": _cutoffs,
    "spectrogram": _spectrogram,
}


# Of networks


def _draw_windows(run: Path, path: Path, title: str) -> str | None:
    network, config = load_run(run)
    data = _data(config)
    windows = input_windows(network, sample_inputs(data), [axis.name for axis in data.axes])
    if not windows:
        return NO_STRIDES
    plots.layer_windows(windows, path, title=title.format("Windows over the mean spectrum that reaches them"))
    return None


def _draw_resolutions(runs: Mapping[str, Path], path: Path, title: str) -> str | None:
    found: dict[str, ClassificationData] = {}  # loading data takes seconds, and runs mostly share them
    drawn: dict[str, list[Resolution]] = {}
    for name, run in runs.items():
        network, config = load_run(run)
        key = json.dumps(config["data"], default=str)
        if key not in found:
            found[key] = _data(config)
        drawn[name] = resolutions(network, torch.zeros(1, *found[key].sample_shape))
    if any(len(steps) < 2 for steps in drawn.values()):
        return NO_STRIDES
    if _mixed(len(step.learned) for steps in drawn.values() for step in steps):
        return MIXED
    names = [axis.name for axis in next(iter(found.values())).axes]
    axes = axis_names(len(next(iter(drawn.values()))[-1].learned), names)
    plots.resolution_staircases(drawn, axes, path, title=title.format("Sizes of the maps behind each layer"))
    return None


@torch.no_grad()
def _draw_spectrogram(run: Path, path: Path, title: str) -> str | None:
    """A test sound before and after the first learned pooling: the sound itself, and the strongest channel there."""
    network, config = load_run(run)
    data = _data(config)
    sound = sample_inputs(data, 1)[:1]
    (name, layer, before, after), *_ = executed(network, sound)
    if not isinstance(layer, DiffStride2d):
        return f"the first learned layer, {name}, is not a DiffStride2d"
    channel = int(before[0].var((-2, -1)).argmax())
    pictures = {
        "log-mel spectrogram": sound[0, 0],
        "through the layer alone": layer(sound)[0, 0],
        f"channel {channel} before {name}": before[0, channel],
        f"channel {channel} after it": after[0, channel],
    }
    time, frequency = (n * axis.spacing for n, axis in zip(sound.shape[2:], data.axes, strict=True))
    strides = " along time, ".join(f"{s:.2f}" for s in layer.strides) + " along frequency"
    plots.spectrograms(
        pictures, (time, frequency), path, title=title.format(f"First learned pooling, strides {strides}")
    )
    return None


def _data(config: Mapping[str, Any]) -> ClassificationData:
    try:
        return build_data(config["data"])
    except Exception as error:  # of libraries that read files, images or the hub
        raise UsageError(f"the data cannot be loaded ({one_line(error)})") from error


class LayerSteps(NamedTuple):
    """What a layer does to an image, in the order of doing; frequency 0 is in the middle.

    Attributes:
        spectrum: amplitudes `[H, W]` of the image, the mean over channels.
        window: `[H, W]`, at the same frequencies.
        kept: amplitudes `[H', W']` of the output.
        output: `[C, H', W']`.
    """

    spectrum: Tensor
    window: Tensor
    kept: Tensor
    output: Tensor


@torch.no_grad()
def layer_steps(layer: DiffStride2d, image: Tensor) -> LayerSteps:
    """The steps of a layer with `basis="dft"` and `norm="forward"` on an image `[C, H, W]`."""
    window = torch.ones(())
    for axis in input_windows(layer, image[None]):
        n = image.shape[len(window.shape) + 1]
        cycles = (torch.arange(n) - n // 2).abs()
        window = window[..., None] * torch.tensor(axis.learned)[cycles]
    output = layer(image)
    return LayerSteps(_amplitudes(image), window, _amplitudes(output), output)


def draw_layer(layer: DiffStride2d, image: Tensor, path: Path) -> None:
    """Draw a layer step by step on an image `[C, H, W]` with one or three channels, from 0 to 1."""
    steps = layer_steps(layer, image)
    strides = ", ".join(f"{s:.3g}" for s in layer.strides)
    title = f"DiffStride with strides ({strides}) along height and width, R = {layer.smoothness:g}"
    plots.layer_steps(image.squeeze(0), *steps[:3], steps.output.squeeze(0), path, title=title)


def _amplitudes(x: Tensor) -> Tensor:
    amplitudes: Tensor = torch.fft.fftshift(torch.fft.fft2(x, norm="forward").abs().mean(0))
    return amplitudes


# Names


def _by_start(rows: Sequence[Row]) -> tuple[dict[str, list[Row]], str]:
    """The runs that learned strides, by what they have in common but for the seed; and what the names are of."""
    learned = [row for row in rows if _result(row)["strides"]]
    varying = _varying(learned)
    named = {_name(group[0].axes, varying) or label: group for label, group in groups(learned).items()}
    return named, ", ".join("initial strides" if axis == "strides" else _heading(axis) for axis in varying)


def _varying(rows: Iterable[Row]) -> list[str]:
    """The axes but for the seed along which some rows differ."""
    rows = list(rows)
    axes = dict.fromkeys(axis for row in rows for axis in row.axes if axis != "seed")
    return [axis for axis in axes if any(row.axes.get(axis) != rows[0].axes.get(axis) for row in rows)]


def _name(axes: Mapping[str, Any], varying: Sequence[str]) -> str:
    kept = {axis: axes[axis] for axis in varying if axis in axes}
    return ", ".join(
        f"{_heading(axis)} {value:g}" if isinstance(value, int | float) else shown(axis, value)
        for axis, value in kept.items()
    )


def _heading(axis: str) -> str:
    return axis.rsplit(".", 1)[-1].replace("_", " ")


def _series(row: Row, rows: Sequence[Row]) -> str:
    """The method, and the data where a study has several."""
    method = row.axes.get("method", "diffstride" if _result(row)["strides"] else "all runs")
    dataset = row.axes.get("dataset") if "dataset" in _varying(rows) else None
    return METHODS.get(str(method), str(method)) + ("" if dataset is None else f", {shown('dataset', dataset)}")


def _runs(runs: Mapping[str, Sequence[Row]]) -> str:
    return f"{sum(map(len, runs.values()))} runs"


def _result(row: Row) -> Mapping[str, Any]:
    assert row.result is not None, row.name
    return row.result
