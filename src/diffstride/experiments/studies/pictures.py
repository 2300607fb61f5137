"""Pictures of finished runs: the numbers come from their folders, `diffstride.experiments.figures` draws them.

Each function returns a figure, or the reason why there is none.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from diffstride._text import one_line
from diffstride.errors import UsageError
from diffstride.experiments.data import ClassificationData
from diffstride.experiments.figures import layer as layer_figures
from diffstride.experiments.figures import study as study_figures
from diffstride.experiments.figures.style import save
from diffstride.experiments.figures.training import (
    Line,
    WindowPanel,
    resolution_staircases,
    stride_trajectories,
    training_curves,
    windows_over_spectrum,
)
from diffstride.experiments.history import axis_names, read_dicts, read_rows
from diffstride.experiments.models.downsample import METHODS
from diffstride.experiments.studies.probes import executed, input_windows, resolutions, sample_inputs
from diffstride.experiments.studies.results import (
    Row,
    Statistic,
    by_task,
    first_cutoff,
    groups,
    line_of,
    read_latency,
    read_study,
    seeds_of,
    statistic,
    striding_factor,
)
from diffstride.experiments.studies.study import shown
from diffstride.experiments.training.runs import build_data, load_run, read_result
from diffstride.nn import DiffStride2d

NO_RUNS = "no run with learned strides is done"
NO_STRIDES = "the network has no learned strides"
MIXED = "the runs have strides along different numbers of axes"
POINTS = 400  # of a line of metrics, at most


def draw(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Draw figures of a study as `folder/NAME.png` and `.svg`, from the runs that are done.

    Args:
        folder: folder of the study.
        names: some of `FIGURES`.

    Returns:
        The names of the figures that could not be drawn, and why.

    Raises:
        UsageError: a folder that is not a study's.
    """
    done = [row for row in read_study(folder)[1] if row.result is not None]
    missing = {}
    for name in names:
        try:
            figure = FIGURES[name](folder, done)
        except UsageError as error:  # data or a checkpoint that is no longer there
            figure = str(error)
        if isinstance(figure, str):
            missing[name] = figure
        else:
            save(figure, folder / name)
    return missing


# Many runs


def _trajectories(folder: Path, rows: Sequence[Row]) -> Figure | str:
    runs, varied = _by_start(rows)
    found = {name: [read_rows(folder / row.name / "strides.csv") for row in group] for name, group in runs.items()}
    histories = {name: kept for name, group in found.items() if (kept := [history for history in group if history])}
    if not histories:
        return "no run has its strides.csv any more" if runs else NO_RUNS
    title = f"Strides while training, {_runs(runs)}"
    return study_figures.trajectories_of_runs(histories, title=title, varied=varied)


def _strides(folder: Path, rows: Sequence[Row]) -> Figure | str:
    runs, varied = _by_start(rows)
    if not runs:
        return NO_RUNS
    strides = {
        name: [(_result(row)["strides_initial"], _result(row)["strides"]) for row in group]
        for name, group in runs.items()
    }
    numbers = {len(ends) for group in strides.values() for _, learned in group for ends in learned.values()}
    if len(numbers) > 1:
        return MIXED
    axes = axis_names(numbers.pop(), list(_result(next(iter(runs.values()))[0]).get("axes") or ()))
    return study_figures.learned_strides(strides, axes, title=f"Strides learned, {_runs(runs)}", varied=varied)


def _factor(folder: Path, rows: Sequence[Row]) -> Figure | str:
    runs, varied = _by_start(rows)
    if not runs:
        return NO_RUNS
    factors = {
        name: (
            striding_factor(_result(group[0]), "strides_initial") or 1.0,
            [striding_factor(_result(row)) or 1.0 for row in group],
        )
        for name, group in runs.items()
    }
    return study_figures.striding_factors(factors, title=f"Global striding factor, {_runs(runs)}", varied=varied)


def _pareto(folder: Path, rows: Sequence[Row]) -> Figure | str:
    timed = read_latency(folder)
    latency: Mapping[str, Any] = timed["latency"] if timed else {}
    by_series: dict[str, list[Row]] = {}
    for row in rows:
        by_series.setdefault(_series(row, rows), []).append(row)
    compute: dict[str, list[study_figures.Point]] = {}
    time: dict[str, list[study_figures.Point]] = {}
    for series, members in by_series.items():
        varying = [axis for axis in _varying(members) if axis not in ("method", "dataset")]
        for label, group in groups(members).items():
            accuracy = statistic(group, lambda result: result["accuracy"])
            if accuracy is None:
                continue
            macs = [(_result(row)["macs"] + _result(row)["resampling_macs"]) / 1e6 for row in group]
            mean = min(max(fmean(macs), min(macs)), max(macs))  # of equal floats, it may differ by a rounding
            point = study_figures.Point(
                label=_name(group[0].axes, varying), cost=mean, low=min(macs), high=max(macs), accuracy=accuracy.mean,
                deviation=accuracy.sd or 0,
            )  # fmt: skip
            compute.setdefault(series, []).append(point)
            if label in latency:
                ms, low, high = (latency[label][key] for key in ("ms", "low", "high"))
                time.setdefault(series, []).append(point._replace(cost=ms, low=low, high=high))
    if not compute:
        return "no run with an accuracy is done"
    costs = {"million multiply-accumulates an image, mean and range": compute}
    if timed and time:
        unit = f"milliseconds a batch of {timed['batch']} on {timed['hardware']}"
        costs[f"{unit}\nstrides fixed, median and quartiles"] = time
    title = f"Accuracy against cost, {seeds_of(rows)}\nLines: the best at no more than this cost"
    return study_figures.pareto(costs, title=title)


def _windows(folder: Path, rows: Sequence[Row]) -> Figure | str:
    runs, _ = _by_start(rows)
    return run_windows(folder / next(iter(runs.values()))[0].name) if runs else NO_RUNS


def _resolution(folder: Path, rows: Sequence[Row]) -> Figure | str:
    runs, _ = _by_start(rows)
    first = {name: folder / group[0].name for name, group in runs.items()}
    return run_resolutions(first, "the first run of each kind") if runs else NO_RUNS


def _accuracies(folder: Path, rows: Sequence[Row]) -> Figure | str:
    panels: dict[str, dict[str, dict[str, study_figures.Spread]]] = {}
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
            tasks["mean"] = study_figures.Spread(fmean(s.mean for s in tasks.values()), math.nan)
    return study_figures.accuracy_bars(panels, title=f"Accuracy by task, mean and deviation over {seeds_of(rows)}")


def _cutoffs(folder: Path, rows: Sequence[Row]) -> Figure | str:
    rows = [row for row in rows if _result(row).get("cutoffs")]
    if not rows:
        return "no run with cut-off frequencies is done"
    by_line: dict[str, list[Row]] = {}
    for row in rows:
        by_line.setdefault(str(line_of(row, "task")), []).append(row)
    panels: dict[str, dict[str, dict[str, study_figures.Spread]]] = {}
    for i, (axis, unit) in enumerate(_result(rows[0])["axes"].items()):
        panel = panels.setdefault(f"cut-off along {axis} ({unit})", {})
        for task, group in by_line.items():
            for kind, name in (("exact", "exact"), ("whole_bins", "in whole bins, as in the paper")):
                if found := statistic(group, functools.partial(first_cutoff, kind, i)):
                    panel.setdefault(name, {})[task] = _spread(found)
    title = f"Cut-off frequencies of the first layer, mean and deviation over {seeds_of(rows)}"
    return study_figures.cutoff_points(panels, title=title)


def _spectrogram(folder: Path, rows: Sequence[Row]) -> Figure | str:
    learned = [row for row in rows if _result(row)["strides"] and len(_result(row).get("axes") or ()) == 2]
    if not learned:
        return "no run with learned strides on spectrograms is done"
    return _spectrogram_of_run(folder / learned[0].name)


FIGURES: dict[str, Callable[[Path, Sequence[Row]], Figure | str]] = {
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


# Single runs


def run_training(run: Path) -> Figure | str:
    """Draw loss and accuracy, and the cost where it is logged, against the optimiser step."""
    columns = {
        "train/loss": ("loss", "training, single batches", 1),
        "val/loss": ("loss", "test", 1),
        "val/accuracy": ("accuracy (%)", "test", 100),
        "train/macs": ("million MACs an image", "training, single batches", 1e-6),
        "train/stride_cost": ("cost of strides, Eq. 6", "training, single batches", 1),
    }
    metrics = read_dicts(run / "metrics.csv")
    result = read_result(run)
    total = (result and result["steps"]) or math.inf
    curves: dict[str, dict[str, Line]] = {}
    for column, (quantity, split, scale) in columns.items():
        logged = [row for row in metrics if row.get(column) and row.get("step")]
        kept = logged[:: math.ceil(len(logged) / POINTS) or 1]
        if kept:
            # Lightning logs a step by the number of those before it, but a validation at the end by those done.
            line = [min(int(row["step"]) + 1, total) for row in kept], [scale * float(row[column]) for row in kept]
            curves.setdefault(quantity, {})[split] = line
    return training_curves(curves, title=f"Training, {run.absolute().name}") if curves else "nothing is logged yet"


def run_strides(run: Path) -> Figure | str:
    """Draw strides and sizes of the maps against the optimiser step."""
    rows = read_rows(run / "strides.csv")
    return stride_trajectories(rows, title=f"Strides while training, {run.absolute().name}") if rows else NO_STRIDES


def run_windows(run: Path) -> Figure | str:
    """Draw the windows of a run's layers over the spectra of test inputs that reach them."""
    network, data = look_into(run)
    windows = input_windows(network, sample_inputs(data), [axis.name for axis in data.axes])
    if not windows:
        return NO_STRIDES
    panels = [
        WindowPanel(f"{w.layer}, {w.axis}", w.spectrum, {"learned window": w.learned, "initial window": w.initial})
        for w in windows
    ]
    columns = sum(w.layer == windows[0].layer for w in windows)
    title = f"Windows over the mean spectrum that reaches them, {run.absolute().name}"
    return windows_over_spectrum(panels, columns, title=title)


def run_resolutions(runs: Mapping[str, Path], which: str) -> Figure | str:
    """Draw the sizes of the maps from layer to layer, a panel per run, by its name."""
    looked_into = {name: look_into(run) for name, run in runs.items()}
    found = {
        name: resolutions(network, torch.zeros(1, *data.sample_shape)) for name, (network, data) in looked_into.items()
    }
    if any(len(steps) < 2 for steps in found.values()):
        return NO_STRIDES
    numbers = {len(step.learned) for steps in found.values() for step in steps}
    if len(numbers) > 1:
        return MIXED
    axes = axis_names(numbers.pop(), [axis.name for axis in next(iter(looked_into.values()))[1].axes])
    return resolution_staircases(found, axes, title=f"Sizes of the maps behind each layer, {which}")


@torch.no_grad()
def _spectrogram_of_run(run: Path) -> Figure | str:
    """Draw a test sound before and after the first learned pooling: the sound itself, and the strongest channel."""
    network, data = look_into(run)
    sound = sample_inputs(data, 1)[:1]
    (name, layer, before, after), *_ = executed(network, sound)
    if not isinstance(layer, DiffStride2d):
        return f"the first learned layer, {name}, is not a DiffStride2d"
    channel = int(before[0].var((-2, -1)).argmax())
    maps = {
        "log-mel spectrogram": sound[0, 0],
        "through the layer alone": layer(sound)[0, 0],
        f"channel {channel} before {name}": before[0, channel],
        f"channel {channel} after it": after[0, channel],
    }
    time, frequency = (n * axis.spacing for n, axis in zip(sound.shape[2:], data.axes, strict=True))
    strides = " along time, ".join(f"{s:.2f}" for s in layer.strides)
    title = f"First learned pooling, strides {strides} along frequency, {run.absolute().name}"
    return layer_figures.spectrograms(maps, (time, frequency), title=title)


def look_into(run: Path) -> tuple[nn.Module, ClassificationData]:
    """Return the network and the data of a run.

    Raises:
        UsageError: a checkpoint, a configuration or data that cannot be read.
    """
    network, config = load_run(run)
    data = _data(json.dumps(config["data"], default=str))
    if isinstance(data, str):
        raise UsageError(f"the data cannot be loaded ({data})")
    return network, data


@functools.lru_cache(maxsize=1)  # loading data takes seconds, and the runs of a study mostly share them
def _data(config: str) -> ClassificationData | str:
    try:
        return build_data(json.loads(config))
    except Exception as error:  # of libraries that read files, images or the hub
        return one_line(error)


# A layer


@torch.no_grad()
def draw_layer(layer: DiffStride2d, image: Tensor) -> Figure:
    """Draw a layer with `basis="dft"` and `norm="forward"` on an image `[1 or 3, H, W]` from 0 to 1, step by step."""
    window = torch.ones(())
    for axis in input_windows(layer, image[None]):
        n = image.shape[len(window.shape) + 1]
        cycles = (torch.arange(n) - n // 2).abs()
        window = window[..., None] * torch.tensor(axis.learned)[cycles]
    output = layer(image)
    strides = ", ".join(f"{s:.3g}" for s in layer.strides)
    return layer_figures.layer_steps(
        image.squeeze(0), _amplitudes(image), window, _amplitudes(output), output.squeeze(0),
        title=f"DiffStride with strides ({strides}) along height and width, R = {layer.smoothness:g}",
    )  # fmt: skip


def _amplitudes(x: Tensor) -> Tensor:
    """Return the mean amplitude over channels, frequency 0 in the middle."""
    amplitudes: Tensor = torch.fft.fftshift(torch.fft.fft2(x, norm="forward").abs().mean(0))
    return amplitudes


# Names


def _by_start(rows: Sequence[Row]) -> tuple[dict[str, list[Row]], str]:
    """Return the runs that learned strides, by what they have in common but for the seed, and what the names are."""
    learned = [row for row in rows if _result(row)["strides"]]
    varying = _varying(learned)
    named = {_name(group[0].axes, varying) or label: group for label, group in groups(learned).items()}
    return named, ", ".join("initial strides" if axis == "strides" else _heading(axis) for axis in varying)


def _varying(rows: Sequence[Row]) -> list[str]:
    """Return the axes but for the seed along which some rows differ."""
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
    """Return the method, and the data where a study has several."""
    method = row.axes.get("method", "diffstride" if _result(row)["strides"] else "all runs")
    dataset = row.axes.get("dataset") if "dataset" in _varying(rows) else None
    return METHODS.get(str(method), str(method)) + ("" if dataset is None else f", {shown('dataset', dataset)}")


def _spread(found: Statistic) -> study_figures.Spread:
    return study_figures.Spread(found.mean, math.nan if found.sd is None else found.sd)


def _runs(runs: Mapping[str, Sequence[Row]]) -> str:
    return f"{sum(map(len, runs.values()))} runs"


def _result(row: Row) -> Mapping[str, Any]:
    assert row.result is not None, row.name
    return row.result
