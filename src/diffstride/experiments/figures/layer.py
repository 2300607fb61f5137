"""Pictures of what a layer does to images and sounds."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

from diffstride.experiments.figures import style


def before_and_after(pictures: Mapping[str, Tensor]) -> Figure:
    """Draw images `[H, W]` of one field of view side by side, each over its own range of grey, with name and size."""
    figure, made = style.panels(len(pictures), len(pictures), width=3)
    for panel, (name, picture) in zip(made, pictures.items(), strict=True):
        panel.imshow(picture.numpy(), cmap="gray", extent=(0, 1, 1, 0), interpolation="nearest")
        panel.set_title(f"{name}\n{picture.shape[0]} x {picture.shape[1]}", fontsize="medium")
        panel.set_axis_off()
    return figure


def spectrograms(pictures: Mapping[str, Tensor], extent: tuple[float, float], *, title: str) -> Figure:
    """Draw maps `[T, F]` of one sound that spans `extent` seconds and mel bands, pairs of before and after in rows."""
    figure, made = style.panels(len(pictures), 2, width=4.4, height=2.5, title=title)
    for panel, (name, values) in zip(made, pictures.items(), strict=True):
        panel.imshow(
            values.mT.numpy(), origin="lower", aspect="auto", cmap="magma", interpolation="nearest",
            extent=(0, extent[0], 0, extent[1]),
        )  # fmt: skip
        time, frequency = values.shape
        panel.set(title=f"{name}, {time} × {frequency}", xlabel="time (s)", ylabel="mel band")
    return figure
