"""Pictures of many runs: strides that they learned, accuracy against cost, accuracy by task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from diffstride.experiments.figures import style
from diffstride.experiments.figures.training import lines_of
from diffstride.experiments.history import StrideRow


def trajectories_of_runs(runs: Mapping[str, Sequence[Sequence[StrideRow]]], *, varied: str) -> Figure:
    """Draw stride against step, a panel per layer and axis, a line per run: Figure 3a of the paper.

    Rows are grouped by what runs have in common, which `varied` names in the legend. A group has one colour and style.
    """
    places = list(dict.fromkeys(place for group in runs.values() for rows in group for place in lines_of(rows)))
    columns = sum(layer == places[0][0] for layer, _ in places)
    width, title = max(4.2, 8.4 / columns), f"Strides while training, {_count(runs)}"
    figure, made = style.panels(len(places), columns, width=width, height=2.3, title=title, sharex=True, sharey="row")
    for i, (name, group) in enumerate(runs.items()):
        for lines in map(lines_of, group):
            for panel, place in zip(made, places, strict=True):
                panel.plot(
                    *lines.get(place, ([], [])), lw=1.4, label=name, **style.line_look(i) | style.look(i),
                    # Markers of one group are at other places than those of the next.
                    markevery=(0.02 + 0.25 * i / len(runs), 0.25),
                )  # fmt: skip
    for k, (panel, (layer, axis)) in enumerate(zip(made, places, strict=True)):
        panel.set(title=f"{layer}, {axis}", ylim=(0.9, None), ylabel="" if k % columns else "stride")
        panel.set_xlabel("optimiser step" if k >= len(places) - columns else "")
    style.legend(figure, made, title=varied)
    return figure


Ends = tuple[Mapping[str, Sequence[float]], Mapping[str, Sequence[float]]]  # initial and learned strides by layer


def _count(runs: Mapping[str, Sequence[Any]]) -> str:
    return f"{sum(map(len, runs.values()))} runs"


def learned_strides(strides: Mapping[str, Sequence[Ends]], axes_names: Sequence[str], *, varied: str) -> Figure:
    """Draw where the strides of each layer started and ended, a panel per axis: Figure 3b of the paper.

    Initial strides are on the left of a layer and the learned ones on the right. A box spans the quartiles of the
    learned ones, and whiskers span all of them.

    Strides are grouped by what runs have in common, which `varied` names in the legend.
    """
    layers = list(dict.fromkeys(layer for group in strides.values() for _, learned in group for layer in learned))
    width, title = max(6.4, 2.8 * len(layers)), f"Strides learned, {_count(strides)}"
    figure, made = style.panels(len(axes_names), width=width, height=2.7, title=title, sharex=True, sharey=True)
    for k, (panel, axis) in enumerate(zip(made, axes_names, strict=True)):
        for x, layer in enumerate(layers):
            moves = [
                (i, name, initial[layer][k], learned[layer][k])
                for i, (name, group) in enumerate(strides.items())
                for initial, learned in group
                if k < len(learned.get(layer, ()))
            ]
            panel.boxplot(
                [[end for *_, end in moves]], positions=[x + 0.36], widths=0.1, whis=(0, 100), manage_ticks=False,
                patch_artist=True, boxprops={"facecolor": "#999999"}, medianprops={"color": "black"},
            )  # fmt: skip
            for i, name, start, end in moves:
                shift = 0.1 * style.spread(i, len(strides))
                left, right = x - 0.3 + shift, x + 0.14 + shift
                panel.plot([left, right], [start, end], lw=0.8, alpha=0.6, color=style.look(i)["color"])
                panel.plot(left, start, mfc=style.PAPER, ls="", **style.look(i))
                panel.plot(right, end, ls="", label=name, **style.look(i))
        for x in range(1, len(layers)):
            panel.axvline(x - 0.5, color="#999999", lw=0.5)
        panel.set(title=f"along the {axis}", ylabel="stride", xlim=(-0.55, len(layers) - 0.45))
        panel.tick_params(axis="x", length=0)
    made[0].set_ylim(bottom=min(0.9, made[0].get_ylim()[0]))  # once all panels, which share it, have their values
    made[-1].set_xticks(range(len(layers)), [f"start → learned\n{layer}" for layer in layers])
    style.legend(figure, made, title=varied)
    return figure


def striding_factors(strides: Mapping[str, Sequence[Ends]], *, varied: str) -> Figure:
    """Draw how many times fewer samples the last map has than the first: Figure 3c of the paper.

    Strides are grouped by what runs have in common, which `varied` names. A group has one initial factor.
    """
    factors = {name: [[_product(end) for end in ends] for ends in group] for name, group in strides.items()}
    title = f"Global striding factor, {_count(strides)}"
    figure, (panel,) = style.panels(1, width=7, height=0.6 + 0.38 * len(factors), title=title)
    everything = [learned for group in factors.values() for _, learned in group]
    for i, group in enumerate(factors.values()):
        initial, learned = group[0][0], [end for _, end in group]
        heights = [i + 0.12 * style.spread(j, len(learned)) for j in range(len(learned))]
        panel.plot([initial, statistics.geometric_mean(learned)], [i, i], lw=1, color=style.look(i)["color"])
        panel.plot(initial, i, marker="D", mfc=style.PAPER, mec="black", ms=8, ls="", label="initial")
        panel.plot(learned, heights, ls="", **style.look(i))
    last = len(factors)
    quartiles = statistics.quantiles(everything, n=4, method="inclusive") if len(everything) > 1 else everything * 3
    panel.plot([min(everything), max(everything)], [last, last], "|-", ms=8, color="black", lw=1)
    panel.plot(quartiles[::2], [last, last], color="black", lw=5, label="all learned: range, quartiles, median")
    panel.plot(quartiles[1], last, marker="o", mfc=style.PAPER, mec="black", ms=5, ls="")
    panel.set_yticks(range(last + 1), [*factors, "all learned"])
    shown = [*everything, *(group[0][0] for group in factors.values())]
    # Two powers of two at least, so that the scale can be read.
    panel.set(ylim=(last + 0.6, -0.6), ylabel=varied, xlim=(min(shown) / 2, 2 * max(shown)))
    panel.set_xlabel("striding factor: product of the strides of all layers and axes (log)")
    style.log_scale(panel, "x", base=2)
    style.legend(figure, [panel])
    return figure


def _product(strides: Mapping[str, Sequence[float]]) -> float:
    return math.prod(stride for layer in strides.values() for stride in layer)


class Point(NamedTuple):
    """The cost of a group of runs with the ends of its spread, and their accuracy from 0 to 1 with its deviation."""

    label: str
    cost: float
    low: float
    high: float
    accuracy: float
    deviation: float  # 0 where it is not known


def pareto(costs: Mapping[str, Mapping[str, Sequence[Point]]], *, title: str) -> Figure:
    """Draw accuracy against each cost, with a line for the best that each series reaches at no more than some cost."""
    figure, made = style.panels(len(costs), height=3.8, title=title)
    names = list(dict.fromkeys(name for series in costs.values() for name in series))
    for panel, (cost, series) in zip(made, costs.items(), strict=True):
        everything = [p.cost for points in series.values() for p in points]
        for name, points in series.items():
            i = names.index(name)
            panel.errorbar(
                [p.cost for p in points], [100 * p.accuracy for p in points],
                xerr=[[p.cost - p.low for p in points], [p.high - p.cost for p in points]],
                yerr=[100 * p.deviation for p in points], ls="", elinewidth=1, capsize=2, label=name, **style.look(i),
            )  # fmt: skip
            best = frontier(points)
            steps = [*(p.cost for p in best), max(everything)], [100 * p.accuracy for p in [*best, best[-1]]]
            panel.plot(*steps, drawstyle="steps-post", lw=1.2, alpha=0.7, **style.line_look(i))
        panel.margins(0.12)
        if max(everything) > 4 * min(everything):
            style.log_scale(panel, "x")
            cost = f"{cost}, log scale"
        panel.set(xlabel=cost, ylabel="accuracy (%), mean and deviation")
    style.legend(figure, made)
    style.show_plain_text(figure)
    figure.draw_without_rendering()  # computes the layout, on which the places of labels depend
    for panel, series in zip(made, costs.values(), strict=True):
        _label(panel, [p for points in series.values() for p in points])
    return figure


def _label(panel: Any, points: Sequence[Point]) -> None:
    """Write labels at a corner of their points, and leave out those that would cover others; tables have them."""
    places = [(p.cost, 100 * p.accuracy) for p in points]
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in panel.transData.transform(places)]
    for point, place in zip(points, places, strict=True):
        for dx, dy in ((5, 4), (-5, 4), (5, -4), (-5, -4)):
            text = panel.annotate(
                point.label, place, (dx, dy), textcoords="offset points", fontsize="small",
                ha="left" if dx > 0 else "right", va="bottom" if dy > 0 else "top",
            )  # fmt: skip
            text.set_in_layout(False)
            box = text.get_window_extent()
            if box.x1 <= panel.bbox.x1 and not any(map(box.overlaps, taken)):
                taken.append(box)
                break
            text.remove()


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points than which none is both cheaper and better, from the cheapest on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def accuracy_bars(settings: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]], *, title: str) -> Figure:
    """Draw means and deviations of accuracies from 0 to 1 as bars: by panel, method (colour) and task.

    A deviation that is NaN is not drawn.
    """
    methods = list(dict.fromkeys(method for series in settings.values() for method in series))
    found = [value for series in settings.values() for tasks in series.values() for value in tasks.values()]
    lowest = min(mean - (deviation if deviation > 0 else 0) for mean, deviation in found)
    bottom = max(0.0, 100 * lowest - 5)  # no more than what tells them apart
    note = f"\nThe scale begins at {bottom:.0f} %" if bottom else ""
    figure, made = style.panels(len(settings), height=2.7, title=f"{title}{note}", sharey=True)
    width = 0.8 / len(methods)
    for panel, (name, series) in zip(made, settings.items(), strict=True):
        tasks = list(dict.fromkeys(task for by_task in series.values() for task in by_task))
        for method, by_task in series.items():
            i = methods.index(method)
            places = [tasks.index(task) + (i - (len(methods) - 1) / 2) * width for task in by_task]
            means, deviations = (100 * np.array(values) for values in zip(*by_task.values(), strict=True))
            look = {"color": style.look(i)["color"], "label": method}
            bars = panel.bar(places, means, 0.9 * width, yerr=deviations, capsize=2, **look)
            panel.bar_label(bars, fmt="%.1f", padding=2, fontsize="x-small")
        panel.set_xticks(range(len(tasks)), tasks)
        panel.set(title=name, ylabel="accuracy (%)", ylim=(bottom, 100 + (100 - bottom) / 8))
    style.legend(figure, made)
    return figure
