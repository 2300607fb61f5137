"""Pictures of what a layer does to images and sounds."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from diffstride.experiments.figures import style


def layer_steps(image: Tensor, spectrum: Tensor, window: Tensor, kept: Tensor, output: Tensor, *, title: str) -> Figure:
    """Draw a layer on an image, step by step: Figure 1 of the paper.

    Pixels have one size in both pictures, and cycles in all spectra, so that what the layer leaves is smaller.

    Args:
        image: `[H, W]` or `[3, H, W]`, from 0 to 1.
        spectrum: amplitudes `[H, W]` of the image, frequency 0 in the middle (`torch.fft.fftshift`).
        window: the layer's window at the same frequencies.
        kept: amplitudes `[H', W']` of the output, which are those left of the spectrum.
        output: `[H', W']` or `[3, H', W']`.
        title: above all panels.
    """
    figure, made = style.panels(6, 3, width=2.8, height=2.8, title=title)
    height, width = spectrum.shape
    for panel, picture, name in ((made[0], image, "1. image"), (made[5], output, "6. output")):
        h, w = picture.shape[-2:]
        shown = (picture.clamp(0, 1).movedim(0, -1) if picture.ndim == 3 else picture).numpy()
        panel.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=(0, w, h, 0), interpolation="nearest")
        panel.set(title=f"{name}, {h} × {w}", xlabel="width (pixels)", xlim=(0, width), ylim=(height, 0))
        panel.set_ylabel("height (pixels)")
    top = float(spectrum.max())
    log = {"norm": LogNorm(vmin=1e-4 * top, vmax=top), "cmap": "cividis"}
    left, right, bottom, upper = _cycles(*kept.shape)
    whole = _cycles(height, width)
    for panel, values, name, options in (
        (made[1], spectrum, "2. spectrum", log),
        (made[2], window, "3. window", {"vmin": 0, "vmax": 1, "cmap": "gray"}),
        (made[3], spectrum * window, "4. spectrum × window", log),
        (made[4], kept, "5. cropped", log),
    ):
        visible = values if values is window else values.clamp(min=1e-4 * top)
        h, w = values.shape
        panel.imshow(visible.numpy(), extent=_cycles(h, w), interpolation="nearest", **options)
        panel.set(title=f"{name}, {h} × {w}", xlabel="cycles per width", xlim=whole[:2], ylim=whole[2:])
        panel.set_ylabel("cycles per height")
        if values is not spectrum:
            box = Rectangle((left, upper), right - left, bottom - upper, fill=False, color=style.COLOURS[1], ls="--")
            panel.add_patch(box)
    for panel in made:
        panel.title.set_fontsize("medium")
    figure.colorbar(made[2].images[0], ax=made[2], shrink=0.8, ticks=(0, 0.5, 1))
    label = "amplitude (pixel values, log)"
    figure.colorbar(made[4].images[0], ax=made[3:5], location="bottom", shrink=0.6, label=label, format="%g")
    return figure


def _cycles(height: int, width: int) -> tuple[float, float, float, float]:
    """Return borders (left, right, bottom, top) of a spectrum with frequency 0 in the middle, a cell per cycle."""
    left, top = -(width // 2) - 0.5, -(height // 2) - 0.5
    return left, left + width, top + height, top


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
