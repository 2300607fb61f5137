"""Pictures of finished runs: the numbers come from their folders, `diffstride.experiments.figures` draws them."""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from diffstride._text import one_line
from diffstride.experiments.data import ClassificationData
from diffstride.experiments.figures import layer as layer_figures
from diffstride.experiments.figures import study as study_figures
from diffstride.experiments.figures import training as training_figures
from diffstride.experiments.figures.style import save
from diffstride.experiments.history import StrideRow, axis_names, read_dicts, read_rows
from diffstride.experiments.models.downsample import METHODS
from diffstride.experiments.studies import results
from diffstride.experiments.studies.probes import executed, input_windows, sample_inputs
from diffstride.experiments.studies.results import Row, by_task, groups, seeds_of, statistic
from diffstride.experiments.studies.study import shown
from diffstride.experiments.training.runs import build_data, load, read_result
from diffstride.experiments.training.schema import total_macs
from diffstride.nn import DiffStride2d

NO_STRIDES = "the network has no learned strides"


class NothingToDrawError(Exception):
    """An error of runs that have no such picture."""


def draw(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Draw some of `FIGURES` of a study as `folder/NAME.png` and `.svg`, from the runs that are done.

    Returns:
        The names of the figures that could not be drawn, and why.
    """
    done = [row for row in results.read_study(folder)[1] if row.result is not None]
    missing = {}
    for name in names:
        try:
            figure = FIGURES[name](folder, done)
        except Exception as error:  # nothing to draw, or data or a checkpoint that is no longer there
            missing[name] = one_line(error)
        else:
            save(figure, folder / name)
    return missing


# Many runs


def _trajectories(folder: Path, rows: Sequence[Row]) -> Figure:
    runs, varied = _by_start(rows)
    found = {name: [read_rows(folder / row.name / "strides.csv") for row in group] for name, group in runs.items()}
    return study_figures.trajectories_of_runs(found, varied=varied)


def _strides(folder: Path, rows: Sequence[Row]) -> Figure:
    runs, varied = _by_start(rows)
    ends = _ends(runs)
    number = max(len(strides) for group in ends.values() for _, learned in group for strides in learned.values())
    axes = next(iter(runs.values()))[0].result.get("axes") or ()
    return study_figures.learned_strides(ends, axis_names(number, list(axes)), varied=varied)


def _factor(folder: Path, rows: Sequence[Row]) -> Figure:
    runs, varied = _by_start(rows)
    return study_figures.striding_factors(_ends(runs), varied=varied)


def _pareto(folder: Path, rows: Sequence[Row]) -> Figure:
    timed = results.read_latency(folder)
    compute: defaultdict[str, list[study_figures.Point]] = defaultdict(list)
    time: defaultdict[str, list[study_figures.Point]] = defaultdict(list)
    for series, members in groups(rows, lambda row: _series(row, rows)).items():
        varying = [axis for axis in _varying(members) if axis not in ("method", "dataset")]
        for label, group in groups(members).items():
            accuracy = statistic(group, itemgetter("accuracy"))
            if accuracy is None:
                continue
            macs = [total_macs(row.result) / 1e6 for row in group]
            mean = min(max(fmean(macs), min(macs)), max(macs))  # of equal floats, it may differ by a rounding
            name = _name(group[0].axes, varying)
            point = study_figures.Point(name, mean, min(macs), max(macs), accuracy.mean, accuracy.sd or 0)
            compute[series].append(point)
            if label in timed["latency"]:
                ms, low, high = (timed["latency"][label][key] for key in ("ms", "low", "high"))
                time[series].append(point._replace(cost=ms, low=low, high=high))
    if not compute:
        raise NothingToDrawError("no run with an accuracy is done")
    costs = {"million multiply-accumulates a sample, mean and range": compute}
    if time:
        unit = f"milliseconds a batch of {timed['batch']} on {timed['hardware']}"
        costs[f"{unit}\nstrides fixed, median and quartiles"] = time
    title = f"Accuracy against cost, {seeds_of(rows)}\nLines: the best at no more than this cost"
    return study_figures.pareto(costs, title=title)


def _windows(folder: Path, rows: Sequence[Row]) -> Figure:
    runs, _ = _by_start(rows)
    return run_windows(folder / next(iter(runs.values()))[0].name)


def _resolution(folder: Path, rows: Sequence[Row]) -> Figure:
    runs, _ = _by_start(rows)
    first = {name: folder / group[0].name for name, group in runs.items()}
    return run_resolutions(first, "the first run of each kind")


def _accuracies(folder: Path, rows: Sequence[Row]) -> Figure:
    panels: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for group in groups(by_task(rows)).values():
        axes = group[0].axes
        accuracy = statistic(group, itemgetter("accuracy"))
        if "task" in axes and accuracy is not None:
            setting = str(axes.get("setting", ""))
            panel = panels.setdefault(f"{setting}-task" if setting in ("single", "multi") else setting, {})
            spread = accuracy.mean, math.nan if accuracy.sd is None else accuracy.sd
            panel.setdefault(_series(group[0], rows), {})[str(axes["task"])] = spread
    if not panels:
        raise NothingToDrawError("no run with a task is done")
    for series in panels.values():
        for tasks in series.values():
            tasks["mean"] = fmean(mean for mean, _ in tasks.values()), math.nan
    return study_figures.accuracy_bars(panels, title=f"Accuracy by task, mean and deviation over {seeds_of(rows)}")


@torch.no_grad()
def _spectrogram(folder: Path, rows: Sequence[Row]) -> Figure:
    """Draw a test sound before and after the first learned pooling: the sound itself, and the strongest channel."""
    learned = [row for row in rows if row.result["strides"] and len(row.result.get("axes") or ()) == 2]
    if not learned:
        raise NothingToDrawError("no run with learned strides on spectrograms is done")
    network, data = look_into(folder / learned[0].name)
    sound = sample_inputs(data, 1)[:1]
    name, (layer, before, after) = next(iter(executed(network, sound).items()))
    if not isinstance(layer, DiffStride2d):
        raise NothingToDrawError(f"the first learned layer, {name}, is not a DiffStride2d")
    channel = int(before[0].var((-2, -1)).argmax())
    maps = {
        "log-mel spectrogram": sound[0, 0],
        "through the layer alone": layer(sound)[0, 0],
        f"channel {channel} before {name}": before[0, channel],
        f"channel {channel} after it": after[0, channel],
    }
    time, frequency = (n * axis.spacing for n, axis in zip(sound.shape[2:], data.axes, strict=True))
    strides = " along time, ".join(f"{s:.2f}" for s in layer.strides)
    title = f"First learned pooling, strides {strides} along frequency, {learned[0].name}"
    return layer_figures.spectrograms(maps, (time, frequency), title=title)


FIGURES: dict[str, Callable[[Path, Sequence[Row]], Figure]] = {
    "trajectories": _trajectories,
    "strides": _strides,
    "factor": _factor,
    "pareto": _pareto,
    "windows": _windows,
    "resolution": _resolution,
    "accuracies": _accuracies,
    "spectrogram": _spectrogram,
}


# Single runs


def run_training(run: Path) -> Figure:
    """Draw loss and accuracy, and the cost where it is logged, against the optimiser step."""
    columns = {
        "train/loss": ("loss", "training, single batches", 1),
        "val/loss": ("loss", "test", 1),
        "val/accuracy": ("accuracy (%)", "test", 100),
        "train/macs": ("million MACs a sample", "training, single batches", 1e-6),
        "train/stride_cost": ("cost of strides, Eq. 6", "training, single batches", 1),
    }
    metrics = read_dicts(run / "metrics.csv")
    result = read_result(run)
    total = (result and result["steps"]) or math.inf
    curves: dict[str, dict[str, training_figures.Line]] = {}
    for column, (quantity, split, scale) in columns.items():
        if logged := [row for row in metrics if row.get(column) and row.get("step")]:
            # Lightning logs a step by the number of those before it, but a validation at the end by those done.
            line = [min(int(row["step"]) + 1, total) for row in logged], [scale * float(row[column]) for row in logged]
            curves.setdefault(quantity, {})[split] = line
    if not curves:
        raise NothingToDrawError("nothing is logged yet")
    return training_figures.training_curves(curves, title=f"Training, {run.absolute().name}")


def run_strides(run: Path) -> Figure:
    """Draw strides and sizes of the maps against the optimiser step."""
    return training_figures.stride_trajectories(_history(run), title=f"Strides while training, {run.absolute().name}")


def run_windows(run: Path) -> Figure:
    """Draw the windows of a run's layers over the spectra of test inputs that reach them."""
    network, data = look_into(run)
    windows = input_windows(network, sample_inputs(data), [axis.name for axis in data.axes])
    if not windows:
        raise NothingToDrawError(NO_STRIDES)
    title = f"Windows over the mean spectrum that reaches them, {run.absolute().name}"
    return training_figures.windows_over_spectrum(windows, title=title)


def run_resolutions(runs: Mapping[str, Path], which: str) -> Figure:
    """Draw the sizes of the input and of the maps behind each layer, a panel per run, by its name."""
    found = {}
    for name, run in runs.items():
        rows = _history(run)
        axes, (_, *sizes) = dict.fromkeys(row.axis for row in rows), look_into(run)[1].sample_shape
        found[name] = [StrideRow(0, "input", axis, 1.0, n) for axis, n in zip(axes, sizes, strict=False)] + rows
    return training_figures.resolution_staircases(found, title=f"Sizes of the maps behind each layer, {which}")


def _history(run: Path) -> list[StrideRow]:
    if rows := read_rows(run / "strides.csv"):
        return rows
    raise NothingToDrawError(NO_STRIDES)


def look_into(run: Path) -> tuple[nn.Module, ClassificationData]:
    """Return the network and the data of a run."""
    loaded = load(run)
    return loaded.network, shared_data(loaded.config)


def shared_data(config: Mapping[str, Any]) -> ClassificationData:
    """Return the data of a configuration. The last ones are kept, since the runs of a study mostly share them."""
    return _data(json.dumps(config["data"], default=str))


@functools.lru_cache(maxsize=1)
def _data(config: str) -> ClassificationData:
    return build_data(json.loads(config))


# Names


def _by_start(rows: Sequence[Row]) -> tuple[dict[str, list[Row]], str]:
    """Return the runs that learned strides, by what they have in common but for the seed, and what the names are."""
    learned = [row for row in rows if row.result["strides"]]
    if not learned:
        raise NothingToDrawError("no run with learned strides is done")
    varying = _varying(learned)
    named = {_name(group[0].axes, varying) or label: group for label, group in groups(learned).items()}
    return named, ", ".join("initial strides" if axis == "strides" else _heading(axis) for axis in varying)


def _ends(runs: Mapping[str, Sequence[Row]]) -> dict[str, list[study_figures.Ends]]:
    return {name: [(r.result["strides_initial"], r.result["strides"]) for r in group] for name, group in runs.items()}


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
    method = row.axes.get("method", "diffstride" if row.result["strides"] else "all runs")
    dataset = row.axes.get("dataset") if "dataset" in _varying(rows) else None
    return METHODS.get(str(method), str(method)) + ("" if dataset is None else f", {shown('dataset', dataset)}")
