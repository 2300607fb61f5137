"""Every picture, drawn from rows and arrays that others wrote. Matplotlib is imported inside.

Each function writes `path` with the suffixes `.png` and `.svg`. Colours are Okabe and Ito's, which colour-blind eyes
tell apart; lines also differ in style.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from diffstride.tracking import StrideRow

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = {"height": "-", "width": "--", "depth": ":", "length": "-"}


def stride_trajectories(rows: Iterable[StrideRow], path: Path, *, title: str = "Strides while training") -> None:
    """Stride against step, one line per layer (colour) and axis (style): Figure 3a of the paper."""
    figure, axes = _figure(1, 1)
    for i, (layer, by_axis) in enumerate(_by_layer(rows).items()):
        for axis, line in by_axis.items():
            axes[0].plot(*line, STYLES[axis], color=COLOURS[i % len(COLOURS)], label=f"{layer}, {axis}")
    axes[0].set(title=title, xlabel="optimiser step", ylabel="stride", ylim=(0.9, None))
    axes[0].legend(frameon=False, fontsize="small")
    _save(figure, path)


def trajectories_to_bands(
    runs: Mapping[str, Sequence[StrideRow]], limits: Mapping[str, tuple[float, float]], path: Path
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


def windows_over_spectrum(
    spectra: Mapping[str, Tensor], windows: Mapping[str, Mapping[str, Tensor]], bands: Mapping[str, int], path: Path
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


def before_and_after(pictures: Mapping[str, Tensor], path: Path) -> None:
    """Images `[H, W]` of one field of view side by side, each over its own range of grey, with name and size."""
    figure, axes = _figure(1, len(pictures), width=3)
    for panel, (name, picture) in zip(axes, pictures.items(), strict=True):
        panel.imshow(picture.numpy(), cmap="gray", extent=(0, 1, 1, 0), interpolation="nearest")
        panel.set_title(f"{name}\n{picture.shape[0]} x {picture.shape[1]}", fontsize="medium")
        panel.set_axis_off()
    _save(figure, path)


def _by_layer(rows: Iterable[StrideRow]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Lines of (steps, strides) by layer and axis, in the order of their first row."""
    lines: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for row in rows:
        steps, strides = lines.setdefault(row.layer, {}).setdefault(row.axis, ([], []))
        steps.append(row.step)
        strides.append(row.stride)
    return lines


def _figure(rows: int, columns: int, *, width: float = 6.4, **options: Any) -> tuple[Figure, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
