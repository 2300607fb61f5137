"""Pictures of single runs: metrics and strides while training, learned windows, sizes of the maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from diffstride.experiments.figures import style
from diffstride.experiments.history import StrideRow

Line = tuple[Sequence[float], Sequence[float]]  # optimiser steps, and a value at each


def lines_of(rows: Iterable[StrideRow], quantity: str = "stride") -> dict[tuple[str, str], Line]:
    """Return steps and strides (or sizes) by layer and axis, in the order of their first row."""
    lines: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for row in rows:
        steps, values = lines.setdefault((row.layer, row.axis), ([], []))
        steps.append(row.step)
        values.append(getattr(row, quantity))
    return dict(lines)


def training_curves(quantities: Mapping[str, Mapping[str, Line]], *, title: str) -> Figure:
    """Draw metrics against the optimiser step, a panel per quantity and a line per split, by their names."""
    figure, made = style.panels(len(quantities), min(2, len(quantities)), title=title)
    splits = list(dict.fromkeys(split for lines in quantities.values() for split in lines))
    for panel, (quantity, lines) in zip(made, quantities.items(), strict=True):
        for split, line in lines.items():
            marker = "." if len(line[0]) < 50 else ""
            panel.plot(*line, marker=marker, lw=1.4, label=split, **style.line_look(splits.index(split)))
        panel.set(xlabel="optimiser step", ylabel=quantity)
    style.legend(figure, made)
    return figure


def stride_trajectories(rows: Sequence[StrideRow], *, title: str = "Strides while training") -> Figure:
    """Draw strides and sizes of maps against the step, by layer (colour) and axis (style): Figure 3a of the paper."""
    figure, (strides, sizes) = style.panels(2, 2, title=title)
    layers = list(dict.fromkeys(row.layer for row in rows))
    lines, lines_of_sizes = lines_of(rows), lines_of(rows, "size")
    for (layer, axis), line in lines.items():
        look = {"color": style.COLOURS[layers.index(layer) % len(style.COLOURS)], "ls": style.STYLES.get(axis, "-")}
        look |= {"marker": "."} if len(line[0]) == 1 else {}
        strides.plot(*line, label=f"{layer}, {axis}", **look)
        sizes.plot(*lines_of_sizes[layer, axis], drawstyle="steps-post", **look)
    strides.set(xlabel="optimiser step", ylabel="stride")
    strides.set_ylim(bottom=min(0.9, strides.get_ylim()[0]))
    sizes.set(xlabel="optimiser step", ylabel="samples behind the layer")
    sizes.set_ylim(bottom=0)
    style.legend(figure, [strides])
    return figure


def strides_over_bands(
    runs: Mapping[str, Mapping[str, Line]], limits: Mapping[str, tuple[float, float]], *, ylabel: str = "stride"
) -> Figure:
    """Draw strides while training over what they do to the band that tells classes apart.

    The lines of `runs` are by the panel's title and the run's name. The `limits` of a panel are the stride up to which
    the window keeps the band whole, and that up to which it still lets some of it through.
    """
    figure, made = style.panels(len(runs), len(runs), width=max(3.1, 8.4 / len(runs)), height=3, sharey=True)
    top = 1.1 * max(max(strides) for lines in runs.values() for _, strides in lines.values())
    for panel, (title, lines) in zip(made, runs.items(), strict=True):
        whole, seen = limits[title]
        band = {"color": style.COLOURS[2], "lw": 0}
        panel.axhspan(1, whole, alpha=0.3, label="keeps the class's band whole", **band)
        panel.axhspan(whole, min(seen, top), alpha=0.12, label="keeps a part (on the ramp)", **band)
        for i, (name, line) in enumerate(lines.items()):
            panel.plot(*line, label=name, **style.line_look(i))
        panel.set(title=title, xlabel="optimiser step", ylim=(1, top))
    made[0].set_ylabel(ylabel)
    style.legend(figure, made)
    return figure


class WindowPanel(NamedTuple):
    """Windows along one axis by name, over the mean amplitude of what reaches them, both at 0, 1, .. cycles per map."""

    title: str
    spectrum: Sequence[float]
    windows: Mapping[str, Sequence[float]]
    band: float | None = None  # cycles at which the class is, where that is known


def windows_over_spectrum(windows: Sequence[WindowPanel], *, title: str = "") -> Figure:
    """Draw windows over the mean amplitude spectra that reach them, a panel per layer and axis."""
    figure, made = style.panels(len(windows), min(2, len(windows)), height=2.3, title=title)
    spectra = []
    for panel, (name, spectrum, by_name, band) in zip(made, windows, strict=True):
        cycles = range(len(spectrum))
        spectra.append(behind := panel.twinx())
        behind.bar(cycles, spectrum, width=1, color=style.FAINT, alpha=0.3, label="mean amplitude (right, log)")
        visible = [amplitude for amplitude in spectrum if amplitude > 0] or [1.0]
        behind.set_ylim(min(visible) / 2, max(visible) * 1.5)
        behind.set_ylabel("amplitude", color=style.FAINT)
        style.log_scale(behind, "y")
        behind.tick_params(axis="y", colors=style.FAINT)
        behind.spines["top"].set_visible(False)
        panel.set_zorder(behind.get_zorder() + 1)
        panel.patch.set_visible(False)
        if band is not None:
            panel.axvline(band, color=style.COLOURS[2], lw=1.5, label="the class is here")
        for i, (label, values) in enumerate(by_name.items()):
            marker = {"marker": style.MARKERS[i], "ms": 4, "markevery": math.ceil(len(cycles) / 40)}
            panel.plot(cycles, values, label=label, **style.line_look(i), **marker)
        panel.set(title=name, xlabel="frequency (cycles per map)", ylabel="window", ylim=(-0.04, 1.1))
    style.legend(figure, [*spectra, *made])
    return figure


def resolution_staircases(runs: Mapping[str, Sequence[StrideRow]], *, title: str) -> Figure:
    """Draw the sizes of maps from layer to layer, with initial (dotted) and with learned strides, a panel per run."""
    figure, made = style.panels(len(runs), min(2, len(runs)), height=2.4, title=title, sharey=True)
    everything = [row.size for rows in runs.values() for row in rows]
    for panel, (name, rows) in zip(made, runs.items(), strict=True):
        layers, axes = list(dict.fromkeys(row.layer for row in rows)), list(dict.fromkeys(row.axis for row in rows))
        initial, learned = ({(r.layer, r.axis): r.size for r in ordered} for ordered in (reversed(rows), rows))
        edges = [x - 0.5 for x in range(len(layers) + 1)]
        for i, axis in enumerate(axes):
            start, end = ([sizes.get((layer, axis), math.nan) for layer in layers] for sizes in (initial, learned))
            shared = {"baseline": None, "color": style.COLOURS[i]}
            panel.stairs(start, edges, ls=":", label=f"initial {axis}", **shared)
            panel.stairs(end, edges, ls=style.STYLES.get(axis, "-"), lw=2, label=f"learned {axis}", **shared)
            for x, layer in enumerate(layers):
                numbers = [learned.get((layer, other), 0) for other in axes]
                if (size := numbers[i]) and size not in numbers[:i]:  # equal sizes have one number
                    above = size == max(numbers)
                    panel.annotate(
                        str(size), (x, size), (0, 3 if above else -3), textcoords="offset points", ha="center",
                        va="bottom" if above else "top", color=style.COLOURS[i], fontsize="small",
                    )  # fmt: skip
        panel.set(title=name, ylim=(min(everything) / 1.6, max(everything) * 1.5), ylabel="samples (log)")
        style.log_scale(panel, "y", base=2)
        panel.set_xticks(range(len(layers)), layers, rotation=30, ha="right", fontsize="small")
    style.legend(figure, made)
    return figure
