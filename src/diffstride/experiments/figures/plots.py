"""Every picture, drawn from rows and arrays that others wrote. Matplotlib is imported inside.

Each function writes `path` with the suffixes `.png` and `.svg`. Colours are Okabe and Ito's, which colour-blind eyes
tell apart; lines also differ in style, points in shape.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from diffstride import _files
from diffstride.experiments.history import StrideRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = {"height": "-", "width": "--", "depth": ":", "length": "-", "time": "-", "frequency": "--"}
# Their numbers have no common divisor with that of the colours: more runs than colours still look different.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)))


def stride_trajectories(rows: Sequence[StrideRow], path: str | Path, *, title: str = "Strides while training") -> None:
    """Stride against step, one line per layer (colour) and axis (style): Figure 3a of the paper."""
    figure, axes = _figure(1, 1)
    for i, (layer, by_axis) in enumerate(_by_layer(rows).items()):
        for axis, line in by_axis.items():
            axes[0].plot(*line, STYLES.get(axis, "-"), color=COLOURS[i % len(COLOURS)], label=f"{layer}, {axis}")
    axes[0].set(title=title, xlabel="optimiser step", ylabel="stride", ylim=(0.9, None))
    axes[0].legend(frameon=False, fontsize="small")
    _save(figure, path)


def trajectories_to_bands(
    runs: Mapping[str, Sequence[StrideRow]], limits: Mapping[str, tuple[float, float]], path: str | Path
) -> None:
    """Strides of several runs, a panel per axis, with what they do to the band that matters.

    Args:
        runs: rows by the run's name.
        limits: by axis, the stride up to which the window keeps the class's band whole, and up to which it sees it.
        path: of the pictures.
    """
    figure, axes = _figure(1, len(limits), width=4.2, sharey=True)
    top = 1.1 * max(row.stride for rows in runs.values() for row in rows)
    for panel, (axis, (whole, seen)) in zip(axes, limits.items(), strict=True):
        panel.axhspan(1, whole, color="#009E73", alpha=0.3, lw=0, label="keeps the class's band whole")
        panel.axhspan(whole, min(seen, top), color="#009E73", alpha=0.12, lw=0, label="still sees it (on the ramp)")
        for i, (name, rows) in enumerate(runs.items()):
            for by_axis in _by_layer(rows).values():
                panel.plot(*by_axis[axis], color=COLOURS[i % len(COLOURS)], label=name)
        panel.set(title=f"along the {axis}", xlabel="optimiser step", ylim=(1, top))
    axes[0].set_ylabel("stride")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    _save(figure, path)


class Explored(NamedTuple):
    """Strides of an axis in runs that explored alike.

    Attributes:
        learned: a line per run, steps and strides.
        used: what training used of the first run's.
    """

    learned: Sequence[tuple[Sequence[int], Sequence[float]]]
    used: tuple[Sequence[int], Sequence[float]]


def explored_strides(panels: Mapping[str, Explored], seen: float, path: str | Path, *, axis: str) -> None:
    """Learned strides and those that training used in their place, a panel per way of exploring.

    Args:
        panels: by title.
        seen: the stride up to which the window sees the class's band.
        path: of the pictures.
        axis: "height" or "width".
    """
    lines = [line for explored in panels.values() for line in (explored.used, *explored.learned)]
    figure, axes = _figure(1, len(panels), width=3.1, sharey=True)
    top = 1.1 * max(max(strides) for _, strides in lines)
    for panel, (title, explored) in zip(axes, panels.items(), strict=True):
        panel.axhspan(1, seen, color="#009E73", alpha=0.15, lw=0, label="sees the class's band")
        panel.plot(*explored.used, color="#999999", lw=1, label="used in training, first run")
        for i, line in enumerate(explored.learned):
            panel.plot(
                *line, color=COLOURS[0], ls=LINES[i % len(LINES)], label="learned, a line per seed" if not i else ""
            )
        panel.set(title=title, xlabel="optimiser step", ylim=(1, top))
        _plain_log(panel, "y", 2)
    axes[0].set_ylabel(f"stride along the {axis}")
    _legend_below(figure, *axes[0].get_legend_handles_labels())
    _save(figure, path)


def windows_over_spectrum(
    spectra: Mapping[str, Tensor],
    windows: Mapping[str, Mapping[str, Tensor]],
    bands: Mapping[str, int],
    path: str | Path,
) -> None:
    """Learned windows over the mean amplitude spectrum of the data, a panel per axis.

    Args:
        spectra: by axis, the mean amplitude at 0, 1, .. cycles.
        windows: by axis and by the run's name, the window at the same frequencies.
        bands: by axis, the cycles at which the class sits.
        path: of the pictures.
    """
    figure, axes = _figure(1, len(spectra), width=4.2, sharey=True)
    for panel, (axis, spectrum) in zip(axes, spectra.items(), strict=True):
        panel.bar(
            range(len(spectrum)), (spectrum / spectrum.max()).tolist(), color="#BBBBBB", label="data, mean amplitude"
        )
        panel.axvline(bands[axis], color="#009E73", lw=1.5, label="the class sits here")
        for i, (name, window) in enumerate(windows[axis].items()):
            panel.plot(range(len(window)), window.tolist(), marker=".", color=COLOURS[i % len(COLOURS)], label=name)
        panel.set(title=f"along the {axis}", xlabel="frequency (cycles per image)", ylim=(0, 1.25))
    axes[0].set_ylabel("window, relative amplitude")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    _save(figure, path)


def before_and_after(pictures: Mapping[str, Tensor], path: str | Path) -> None:
    """Images `[H, W]` of one field of view side by side, each over its own range of grey, with name and size."""
    figure, axes = _figure(1, len(pictures), width=3)
    for panel, (name, picture) in zip(axes, pictures.items(), strict=True):
        panel.imshow(_array(picture), cmap="gray", extent=(0, 1, 1, 0), interpolation="nearest")
        panel.set_title(f"{name}\n{picture.shape[0]} x {picture.shape[1]}", fontsize="medium")
        panel.set_axis_off()
    _save(figure, path)


# One layer, one run


def layer_steps(
    image: Tensor, spectrum: Tensor, window: Tensor, kept: Tensor, output: Tensor, path: str | Path, *, title: str
) -> None:
    """A layer on an image, step by step: Figure 1 of the paper.

    Pixels have one size in both pictures and cycles in all spectra, so that what the layer leaves is seen as smaller.

    Args:
        image: `[H, W]` or `[3, H, W]`, from 0 to 1.
        spectrum: its amplitudes `[H, W]`, frequency 0 in the middle (`torch.fft.fftshift`).
        window: the layer's window at the same frequencies.
        kept: amplitudes `[H', W']` of the output, which are those left of the spectrum.
        output: `[H', W']` or `[3, H', W']`.
        path: of the pictures.
        title: above all.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    if not 0 < spectrum.max() < math.inf:
        raise ValueError(f"spectrum must have amplitudes above 0, all finite, got a largest one of {spectrum.max():g}")
    figure, axes = _figure(2, 3, width=2.8, height=2.9)
    height, width = spectrum.shape
    for panel, picture, name in ((axes[0], image, "1. image"), (axes[5], output, "6. output")):
        h, w = picture.shape[-2:]
        shown = picture.clamp(0, 1).movedim(0, -1) if picture.ndim == 3 else picture
        panel.imshow(_array(shown), cmap="gray", vmin=0, vmax=1, extent=(0, w, h, 0), interpolation="nearest")
        panel.set(title=f"{name}, {h} × {w}", xlabel="width (pixels)", xlim=(0, width), ylim=(height, 0))
        panel.set_ylabel("height (pixels)")
    top = float(spectrum.max())
    log = {"norm": LogNorm(vmin=1e-4 * top, vmax=top), "cmap": "cividis"}
    left, right, bottom, upper = _cycles(*kept.shape)
    for panel, values, name, options in (
        (axes[1], spectrum, "2. spectrum", log),
        (axes[2], window, "3. window", {"vmin": 0, "vmax": 1, "cmap": "gray"}),
        (axes[3], spectrum * window, "4. spectrum × window", log),
        (axes[4], kept, "5. cropped", log),
    ):
        visible = values if values is window else values.clamp(min=1e-4 * top)
        h, w = values.shape
        panel.imshow(_array(visible), extent=_cycles(h, w), interpolation="nearest", **options)
        x0, x1, y0, y1 = _cycles(height, width)
        panel.set(title=f"{name}, {h} × {w}", xlabel="cycles per width", xlim=(x0, x1), ylim=(y0, y1))
        panel.set_ylabel("cycles per height")
        if values is not spectrum:
            panel.add_patch(
                Rectangle((left, upper), right - left, bottom - upper, fill=False, color=COLOURS[1], ls="--")
            )
    for panel in axes:
        panel.title.set_fontsize("medium")
    figure.colorbar(axes[2].images[0], ax=axes[2], shrink=0.8, ticks=(0, 0.5, 1))
    figure.colorbar(
        axes[4].images[0], ax=axes[3:5], location="bottom", shrink=0.6, label="amplitude (pixel values, log)"
    )
    figure.suptitle(title)
    _save(figure, path)


def layer_windows(
    windows: Sequence[tuple[str, str, Sequence[float], Sequence[float], Sequence[float]]],
    path: str | Path,
    *,
    title: str,
) -> None:
    """Windows over the mean spectra of what they see, a panel per layer and axis.

    Args:
        windows: layer, axis, mean amplitude at 0, 1, .. cycles, initial and learned window at the same frequencies.
        path: of the pictures.
        title: above all.
    """
    columns = sum(layer == windows[0][0] for layer, *_ in windows)
    figure, axes = _grid(len(windows), columns, width=max(4.2, 8.4 / columns), height=2.3)
    for panel, (layer, axis, spectrum, initial, learned) in zip(axes, windows, strict=False):
        cycles = range(len(spectrum))
        behind = panel.twinx()
        behind.bar(cycles, spectrum, width=1, color="#CCCCCC", label="mean amplitude (right, log)")
        visible = [amplitude for amplitude in spectrum if amplitude > 0] or [1.0]
        behind.set_ylim(min(visible) / 2, max(visible) * 1.5)
        behind.set_ylabel("amplitude", color="#666666")
        _plain_log(behind, "y")
        behind.tick_params(axis="y", colors="#666666")
        behind.spines["top"].set_visible(False)
        panel.set_zorder(behind.get_zorder() + 1)
        panel.patch.set_visible(False)
        for values, label, look in (
            (initial, "initial window", {"ls": "--", "marker": "s", "ms": 6, "mfc": "none", "color": COLOURS[1]}),
            (learned, "learned window", {"ls": "-", "marker": "o", "ms": 3.5, "color": COLOURS[0]}),
        ):
            panel.plot(cycles, values, label=label, markevery=math.ceil(len(cycles) / 40), **look)
        panel.set(title=f"{layer}, {axis}", xlabel="frequency (cycles per map)", ylabel="window", ylim=(-0.04, 1.1))
    handles = [*behind.get_legend_handles_labels()[0], *axes[0].get_legend_handles_labels()[0]]
    _legend_below(figure, handles, [handle.get_label() for handle in handles])
    figure.suptitle(title)
    _save(figure, path)


def resolution_staircases(
    runs: Mapping[str, Sequence[tuple[str, Sequence[int], Sequence[int]]]],
    axes_names: Sequence[str],
    path: str | Path,
    *,
    title: str,
) -> None:
    """The sizes of a network's maps from layer to layer, with initial and with learned strides, a panel per run.

    Args:
        runs: by the run's name: layer, initial and learned sizes; first those of the input.
        axes_names: of the entries of sizes, "height" and so on.
        path: of the pictures.
        title: above all.
    """
    columns = min(2, len(runs))
    figure, axes = _grid(len(runs), columns, width=8.4 / columns, height=2.4, sharey=True)
    sizes = [size for steps in runs.values() for _, *both in steps for end in both for size in end]
    for k, (panel, (name, steps)) in enumerate(zip(axes, runs.items(), strict=False)):
        edges = [i - 0.5 for i in range(len(steps) + 1)]
        starts = list(zip(*(initial for _, initial, _ in steps), strict=True))
        ends = list(zip(*(learned for _, _, learned in steps), strict=True))
        for i, axis in enumerate(axes_names):
            if len(set(starts)) > 1:
                panel.stairs(starts[i], edges, baseline=None, color=COLOURS[i], ls=":", lw=1.5, label=f"initial {axis}")
            elif i == 0:
                panel.stairs(starts[0], edges, baseline=None, color="black", ls=":", lw=1.5, label="initial")
            panel.stairs(
                ends[i], edges, baseline=None, color=COLOURS[i], ls=STYLES.get(axis, "-"), lw=2, label=f"learned {axis}"
            )
            for x, size in enumerate(ends[i]):
                others = [end[x] for j, end in enumerate(ends) if j != i]
                if size in others[:i]:
                    continue  # said already
                above = size >= max(others, default=0) if set(others) != {size} else size >= starts[i][x]
                panel.annotate(
                    str(size), (x, size), (0, 3 if above else -3), textcoords="offset points", ha="center",
                    va="bottom" if above else "top", color=COLOURS[i], fontsize="small",
                    bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.3},
                )  # fmt: skip
        panel.set(title=name, ylim=(min(sizes) / 1.6, max(sizes) * 1.5), ylabel="" if k % columns else "samples (log)")
        _plain_log(panel, "y", base=2)
        layers = [layer for layer, _, _ in steps]
        said_below = k + columns < len(runs) and layers == [layer for layer, _, _ in list(runs.values())[k + columns]]
        panel.set_xticks(
            range(len(steps)), [""] * len(steps) if said_below else layers, rotation=30, ha="right", fontsize="small"
        )
    _legend_below(figure, *axes[0].get_legend_handles_labels())
    figure.suptitle(title)
    _save(figure, path)


# Many runs


def trajectories_of_runs(
    runs: Mapping[str, Sequence[Sequence[StrideRow]]], path: str | Path, *, title: str, legend: str
) -> None:
    """Stride against step, a panel per layer and axis, a line per run: Figure 3a of the paper.

    Args:
        runs: rows of each run, by what the runs have in common; these share a colour and a style.
        path: of the pictures.
        title: above all.
        legend: title of the legend.
    """
    layers = _by_layer(row for group in runs.values() for rows in group for row in rows)
    panels = [(layer, axis) for layer, by_axis in layers.items() for axis in by_axis]
    columns = len(layers[panels[0][0]])
    width = max(4.2, 8.4 / columns)
    figure, axes = _grid(len(panels), columns, width=width, height=2.3, sharex=True, sharey="row")
    for i, (name, group) in enumerate(runs.items()):
        for j, rows in enumerate(group):
            lines = _by_layer(rows)
            for panel, (layer, axis) in zip(axes, panels, strict=False):
                line = lines.get(layer, {}).get(axis, ([], []))
                panel.plot(
                    *line, ls=LINES[i % len(LINES)], lw=1.4, label="" if j else name,
                    # Markers of one group stand at other places than those of the next.
                    markevery=(0.02 + 0.25 * i / len(runs), 0.25), **_look(i),
                )  # fmt: skip
    for k, (panel, (layer, axis)) in enumerate(zip(axes, panels, strict=False)):
        panel.set(title=f"{layer}, {axis}", ylim=(0.9, None), ylabel="" if k % columns else "stride")
        panel.set_xlabel("optimiser step" if k >= len(panels) - columns else "")
    _legend_below(figure, *axes[0].get_legend_handles_labels(), title=legend)
    figure.suptitle(title)
    _save(figure, path)


def learned_strides(
    strides: Mapping[str, Sequence[tuple[Mapping[str, Sequence[float]], Mapping[str, Sequence[float]]]]],
    axes_names: Sequence[str],
    path: str | Path,
    *,
    title: str,
    legend: str,
) -> None:
    """From where to where the strides of each layer went, a panel per axis: Figure 3b of the paper.

    On the left of a layer are its initial strides, on the right the learned ones, and a box from quartile to quartile
    of them with whiskers to the extremes.

    Args:
        strides: initial and learned strides of each run by layer, by what the runs have in common.
        axes_names: of the entries of strides, "height" and so on.
        path: of the pictures.
        title: above all.
        legend: title of the legend.
    """
    layers = list(dict.fromkeys(layer for group in strides.values() for _, learned in group for layer in learned))
    figure, axes = _figure(len(axes_names), 1, width=max(6.4, 2.8 * len(layers)), height=3.2, sharex=True, sharey=True)
    for k, (panel, axis) in enumerate(zip(axes, axes_names, strict=True)):
        for x, layer in enumerate(layers):
            ends = [learned[layer][k] for group in strides.values() for _, learned in group if layer in learned]
            panel.boxplot(
                [ends], positions=[x + 0.36], widths=0.1, whis=(0, 100), manage_ticks=False, patch_artist=True,
                boxprops={"facecolor": "#DDDDDD"}, medianprops={"color": "black"},
            )  # fmt: skip
            for i, group in enumerate(strides.values()):
                shift = 0.1 * _spread(i, len(strides))
                for initial, learned in group:
                    if layer not in learned:
                        continue
                    places, values = [x - 0.3 + shift, x + 0.14 + shift], [initial[layer][k], learned[layer][k]]
                    panel.plot(places, values, lw=0.8, alpha=0.6, color=_look(i)["color"])
                    panel.plot(places[0], values[0], mfc="white", ls="", **_look(i))
                    panel.plot(places[1], values[1], ls="", **_look(i))
        panel.set(title=f"along the {axis}", ylabel="stride", xlim=(-0.55, len(layers) - 0.45))
        panel.set_ylim(bottom=min(0.9, panel.get_ylim()[0]))
        for x in range(1, len(layers)):
            panel.axvline(x - 0.5, color="#CCCCCC", lw=0.8)
        panel.tick_params(axis="x", length=0)
    axes[-1].set_xticks(range(len(layers)), [f"start → learned\n{layer}" for layer in layers])
    _legend_of_groups(figure, strides, legend)
    figure.suptitle(title)
    _save(figure, path)


def striding_factors(
    factors: Mapping[str, tuple[float, Sequence[float]]], path: str | Path, *, title: str, legend: str
) -> None:
    """How many times fewer samples the last map has than the first, before and after: Figure 3c of the paper.

    Args:
        factors: initial factor and those of the runs, by what the runs have in common.
        path: of the pictures.
        title: above all.
        legend: what the names of `factors` are.
    """
    figure, (panel,) = _figure(1, 1, width=7, height=1.6 + 0.38 * len(factors))
    names = list(factors)
    for i, (initial, learned) in enumerate(factors.values()):
        heights = [i + 0.12 * _spread(j, len(learned)) for j in range(len(learned))]
        panel.plot([initial, statistics.geometric_mean(learned)], [i, i], lw=1, color=_look(i)["color"])
        panel.plot(initial, i, marker="D", mfc="white", mec="black", ms=8, ls="", label="" if i else "initial")
        panel.plot(learned, heights, ls="", **_look(i))
    everything = [factor for _, learned in factors.values() for factor in learned]
    if len(everything) > 1:  # by hand: how matplotlib wants to be asked for a lying box depends on its version
        low, middle, high = statistics.quantiles(everything, n=4, method="inclusive")
        y = len(names)
        panel.plot([min(everything), max(everything)], [y, y], "|-", ms=8, color="black", lw=1)
        panel.barh(y, high - low, 0.5, left=low, facecolor="#DDDDDD", edgecolor="black", zorder=2)
        panel.plot([middle, middle], [y - 0.25, y + 0.25], color="black", lw=1.5, zorder=3)
        names.append("all learned")
    panel.set_yticks(range(len(names)), names)
    panel.set(ylim=(len(names) - 0.4, -0.6), ylabel=legend, title=title)
    shown = [*everything, *(initial for initial, _ in factors.values())]
    panel.set_xlim(min(shown) / 2, 2 * max(shown))  # two powers of two at least, so that the scale can be read
    panel.set_xlabel("striding factor: product of the strides of all layers and axes (log)")
    _plain_log(panel, "x", base=2)
    panel.legend(frameon=False, fontsize="small")
    _save(figure, path)


class Point(NamedTuple):
    """A place on a picture of accuracy against cost.

    Attributes:
        label: what to write beside it.
        cost: where it is.
        low: lower end of the cost's spread.
        high: upper end.
        accuracy: from 0 to 1.
        deviation: of the accuracy; 0 where it is not known.
    """

    label: str
    cost: float
    low: float
    high: float
    accuracy: float
    deviation: float


def pareto(panels: Mapping[str, Mapping[str, Sequence[Point]]], path: str | Path, *, title: str) -> None:
    """Accuracy against cost, with what each series can reach for at most some cost as a line.

    Args:
        panels: by the cost's name and unit: points by the name of their series.
        path: of the pictures.
        title: above all.
    """
    figure, axes = _figure(len(panels), 1, width=8.4, height=4.2)
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    for panel, (cost, series) in zip(axes, panels.items(), strict=True):
        costs = [p.cost for points in series.values() for p in points]
        most = max(costs)
        for name, points in series.items():
            look = _look(names.index(name))
            x, y = [p.cost for p in points], [100 * p.accuracy for p in points]
            panel.errorbar(
                x, y, yerr=[100 * p.deviation for p in points],
                xerr=[[p.cost - p.low for p in points], [p.high - p.cost for p in points]],
                ls="", elinewidth=1, capsize=2, label=name, **look,
            )  # fmt: skip
            panel.plot(
                *_steps(points, most), lw=1.2, alpha=0.7, ls=LINES[names.index(name) % len(LINES)], color=look["color"]
            )
        panel.margins(0.12)
        if most > 4 * min(costs):
            _plain_log(panel, "x")
            cost = f"{cost}, log scale"
        panel.set(xlabel=cost, ylabel="accuracy (%), mean and deviation")
    _legend_below(figure, *axes[0].get_legend_handles_labels())
    figure.suptitle(title)
    figure.draw_without_rendering()  # settles the layout: labels are placed on it
    for panel, series in zip(axes, panels.values(), strict=True):
        most = max(p.cost for points in series.values() for p in points)
        lines = [list(zip(*_steps(points, most), strict=True)) for points in series.values()]
        _label(panel, [(p, _look(names.index(name))["color"]) for name in series for p in series[name]], lines)
    _save(figure, path)


class Spread(NamedTuple):
    """Mean and deviation of some runs; NaN for a deviation that is not to be drawn."""

    mean: float
    deviation: float


def accuracy_bars(panels: Mapping[str, Mapping[str, Mapping[str, Spread]]], path: str | Path, *, title: str) -> None:
    """Accuracies as bars with deviations: by panel, by method (colour) and by task (place). Table 1 of the paper.

    Args:
        panels: accuracies from 0 to 1, by the panel's name, the method and the task.
        path: of the pictures.
        title: above all.
    """
    figure, axes = _figure(len(panels), 1, width=8.4, height=3.0, sharey=True)
    methods = list(dict.fromkeys(method for panel in panels.values() for method in panel))
    wide = 0.8 / len(methods)
    lowest = 1.0
    for panel, (name, series) in zip(axes, panels.items(), strict=True):
        tasks = list(dict.fromkeys(task for found in series.values() for task in found))
        for i, method in enumerate(methods):
            found = series.get(method, {})
            places = [tasks.index(task) + (i - (len(methods) - 1) / 2) * wide for task in found]
            bars = panel.bar(
                places, [100 * s.mean for s in found.values()], 0.9 * wide, label=method,
                yerr=[100 * s.deviation for s in found.values()], capsize=2, color=COLOURS[i % len(COLOURS)],
            )  # fmt: skip
            panel.bar_label(bars, fmt="%.1f", padding=2, fontsize="x-small")
            lowest = min([lowest, *(s.mean - (s.deviation if s.deviation > 0 else 0) for s in found.values())])
        panel.set_xticks(range(len(tasks)), tasks)
        panel.set(title=name, ylabel="accuracy (%)")
    bottom = max(0.0, 100 * lowest - 5)  # no more than what tells them apart
    axes[0].set_ylim(bottom, 100 + (100 - bottom) / 8)
    _legend_below(figure, *axes[0].get_legend_handles_labels())
    figure.suptitle(f"{title}\nThe scale begins at {bottom:.0f} %" if bottom else title)
    _save(figure, path)


def cutoff_points(panels: Mapping[str, Mapping[str, Mapping[str, Spread]]], path: str | Path, *, title: str) -> None:
    """Cut-off frequencies: by axis (panel), by the way of reading (marker) and by task (place). Table 2 of the paper.

    Args:
        panels: frequencies by the axis's name and unit, the way of reading and the task.
        path: of the pictures.
        title: above all.
    """
    figure, axes = _figure(1, len(panels), width=4.6, height=3.4)
    for panel, (name, series) in zip(axes, panels.items(), strict=True):
        tasks = list(dict.fromkeys(task for found in series.values() for task in found))
        for i, (reading, found) in enumerate(series.items()):
            places = [tasks.index(task) + 0.12 * _spread(i, len(series)) for task in found]
            panel.errorbar(
                [s.mean for s in found.values()], places,
                xerr=[s.deviation for s in found.values()], ls="", capsize=3, label=reading, **_look(i),
            )  # fmt: skip
        panel.set_yticks(range(len(tasks)), tasks)
        panel.set(xlabel=name, ylim=(len(tasks) - 0.5, -0.5))
        panel.margins(x=0.15)
    _legend_below(figure, *axes[0].get_legend_handles_labels())
    figure.suptitle(title)
    _save(figure, path)


def spectrograms(pictures: Mapping[str, Tensor], extent: tuple[float, float], path: str | Path, *, title: str) -> None:
    """Maps over time and frequency, pairs of before and after in rows.

    Args:
        pictures: `[T, F]` by name; all of one sound, at whatever resolution.
        extent: seconds and mel bands that they span.
        path: of the pictures.
        title: above all.
    """
    figure, axes = _figure(len(pictures) // 2, 2, width=4.4, height=2.9)
    for panel, (name, values) in zip(axes, pictures.items(), strict=True):
        panel.imshow(
            _array(values.mT), origin="lower", aspect="auto", cmap="magma", interpolation="nearest",
            extent=(0, extent[0], 0, extent[1]),
        )  # fmt: skip
        time, frequency = values.shape
        panel.set(title=f"{name}, {time} × {frequency}", xlabel="time (s)", ylabel="mel band")
    figure.suptitle(title)
    _save(figure, path)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those points than which none is both cheaper and better, from the cheapest on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def _steps(points: Sequence[Point], most: float) -> tuple[list[float], list[float]]:
    """The line (costs, percents) that a frontier is drawn as, up to the cost `most`."""
    best = frontier(points)
    costs = [cost for p in best for cost in (p.cost, p.cost)][1:]
    return [*costs, most], [100 * p.accuracy for p in best for _ in range(2)]


def _label(panel: Any, points: Sequence[tuple[Point, str]], lines: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Write the labels of points beside them, where they cover the least of labels, points, lines and borders.

    One that stands nearer to another point of its colour would be read as that one's, and counts as covering some.
    """
    renderer = panel.figure.canvas.get_renderer()
    pixels = panel.figure.dpi / 72
    frame = panel.get_window_extent(renderer)
    taken: list[Sequence[float]] = []
    written: list[Sequence[float]] = []
    centres = [(tuple(panel.transData.transform((p.cost, 100 * p.accuracy))), colour) for p, colour in points]
    for p, _ in points:
        (x0, y0), (x1, y1) = panel.transData.transform(
            [(p.low, 100 * (p.accuracy - p.deviation)), (p.high, 100 * (p.accuracy + p.deviation))]
        )
        x, y = panel.transData.transform((p.cost, 100 * p.accuracy))
        r = 4 * pixels
        taken += [(x - r, y - r, x + r, y + r), (x - 1, y0, x + 1, y1), (x0, y - 1, x1, y + 1)]
    for line in lines:
        for (x0, y0), (x1, y1) in itertools.pairwise(panel.transData.transform(line)):
            taken.append((x0 - 1, min(y0, y1) - 1, x1 + 1, max(y0, y1) + 1))
    for p, colour in points:
        if not p.label:
            continue
        place = p.cost, 100 * p.accuracy
        x, y = panel.transData.transform(place)
        probe = panel.text(*place, p.label, fontsize="small")
        size = probe.get_window_extent(renderer)
        probe.remove()
        choices = []
        for distance in (7, 14, 24, 36, 52):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7)):
                left = x + dx * distance * pixels - size.width * (1 - dx) / 2
                bottom = y + dy * distance * pixels - size.height * (1 - dy) / 2
                box = (left, bottom, left + size.width, bottom + size.height)
                outside = box[0] < frame.x0 or box[1] < frame.y0 or box[2] > frame.x1 or box[3] > frame.y1
                misread = _gap(box, (x, y)) > min(_gap(box, centre) for centre, its in centres if its == colour)
                covered = sum(_overlap(box, other) for other in [*taken, *written * 20])
                choices.append((covered + 200 * misread + distance + 1e6 * outside, distance, box))
        _, distance, box = min(choices, key=lambda choice: choice[:2])
        written.append(box)
        far = {"arrowstyle": "-", "color": colour, "lw": 0.5} if distance > 14 else None
        panel.annotate(
            p.label, place, ((box[0] - x) / pixels, (box[1] - y) / pixels), textcoords="offset points",
            fontsize="small", color=colour, arrowprops=far,
        ).set_in_layout(False)  # fmt: skip


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The area that two boxes (left, bottom, right, top) have in common."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _gap(box: Sequence[float], point: Sequence[float]) -> float:
    """The distance from a point to a box (left, bottom, right, top)."""
    return math.hypot(*(max(box[k] - point[k], 0, point[k] - box[k + 2]) for k in (0, 1)))


def _cycles(height: int, width: int) -> tuple[float, float, float, float]:
    """Borders (left, right, bottom, top) of a spectrum with frequency 0 in the middle, a cell a cycle."""
    left, top = -(width // 2) - 0.5, -(height // 2) - 0.5
    return left, left + width, top + height, top


def _spread(i: int, n: int) -> float:
    """The place of the `i`-th of `n` things between -1 and 1."""
    return 2 * i / (n - 1) - 1 if n > 1 else 0.0


def _plain_log(panel: Any, axis: str, base: float = 10) -> None:
    """A logarithmic scale with plain numbers, not powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    getattr(panel, f"set_{axis}scale")("log", base=base)
    scale = getattr(panel, f"{axis}axis")
    scale.set_major_locator(LogLocator(base, subs=(1, 2, 5) if base == 10 else (1,), numticks=20))
    scale.set_minor_locator(NullLocator())
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _look(i: int) -> dict[str, Any]:
    """Colour and marker of the `i`-th thing."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "ms": 6}


def _legend_of_groups(figure: Figure, names: Iterable[str], title: str) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], ls="", label=name, **_look(i)) for i, name in enumerate(names)]
    _legend_below(figure, handles, [str(handle.get_label()) for handle in handles], title=title)


def _legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[Any], *, title: str | None = None) -> None:
    widest = 0.6 + 0.07 * max(len(label) for label in labels)  # inches
    lines = math.ceil(len(labels) / max(1, int(figure.get_figwidth() / widest)))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / lines), title=title, frameon=False,
        fontsize="small", title_fontsize="small",
    )  # fmt: skip


def _by_layer(rows: Iterable[StrideRow]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Lines of (steps, strides) by layer and axis, in the order of their first row."""
    lines: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for row in rows:
        steps, strides = lines.setdefault(row.layer, {}).setdefault(row.axis, ([], []))
        steps.append(row.step)
        strides.append(row.stride)
    return lines


def _figure(
    rows: int, columns: int, *, width: float = 6.4, height: float = 3.6, **options: Any
) -> tuple[Figure, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _grid(count: int, columns: int, *, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    """`count` panels in rows, those left over empty; an inch for the title above and the legend below all."""
    rows = math.ceil(count / columns)
    figure, axes = _figure(rows, columns, height=height + 1 / rows, **options)
    for panel in axes[count:]:
        panel.set_axis_off()
    return figure, axes


def _array(values: Tensor) -> Any:
    """What matplotlib takes, wherever the values lie and whatever floats they are."""
    return values.detach().float().cpu().numpy()


def _save(figure: Figure, path: str | Path) -> None:
    for suffix in (".png", ".svg"):
        with _files.atomic_path(Path(path).with_suffix(suffix)) as unfinished:
            figure.savefig(unfinished, format=suffix[1:], dpi=150)
