"""Draw the layer step by step on one image: a file, or a test image of a set in the hub's layout.

python benchmarks/draw_layer.py ../shared/data/cifar10 docs/images/layer --index 15
"""

from pathlib import Path

import torch
from command_line import Parser, at_least, pictures
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from torch import Tensor

from diffstride.experiments.data import ImageData
from diffstride.experiments.figures import style
from diffstride.experiments.studies.probes import input_windows
from diffstride.nn import DiffStride2d


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("image", type=Path, help="image file, or folder of an image set")
    parser.add_argument("out", type=pictures, help="pictures to write, without suffix")
    parser.add_argument("--index", type=at_least(0), default=0, help="which test image of a set (default: 0)")
    parser.add_argument("--strides", type=float, nargs=2, default=(2.6, 1.7), help="along height and width")
    parser.add_argument("--smoothness", type=float, default=4.0, help="R, in cycles (default: 4)")
    options = parser.parse_args()
    with parser.mistakes():
        layer = DiffStride2d(tuple(options.strides), options.smoothness)
        image = read_image(options.image, options.index)
        style.save(draw_layer(layer, image), options.out)


def read_image(path: Path, index: int) -> Tensor:
    """`[1 or 3, H, W]` from 0 to 1."""
    if path.is_dir():
        data = ImageData(str(path), train_samples=1)
        data.setup()
        images = data.test_set[0]
        if index >= len(images):
            raise ValueError(f"--index must be < {len(images)}, the test images of {path}, got {index}")
        return images[index] / 255
    pixels = torch.from_numpy(imread(path).copy())  # [H, W] or [H, W, channels]; floats, or bytes
    image = pixels if pixels.is_floating_point() else pixels.float() / torch.iinfo(pixels.dtype).max
    return image[None] if image.ndim == 2 else image.movedim(-1, 0)[:3]


@torch.no_grad()
def draw_layer(layer: DiffStride2d, image: Tensor) -> Figure:
    """Draw a layer with `basis="dft"` and `norm="forward"` on an image `[1 or 3, H, W]` from 0 to 1, as Figure 1 does.

    Pixels have one size in both pictures, and cycles in all spectra, so that what the layer leaves is smaller.
    """
    output = layer(image)
    spectrum, kept = amplitudes(image), amplitudes(output)
    window = torch.ones(())
    for axis, size in zip(input_windows(layer, image[None]), spectrum.shape, strict=True):
        cycles = (torch.arange(size) - size // 2).abs()
        window = window[..., None] * torch.tensor(axis.windows["learned window"])[cycles]
    strides = ", ".join(f"{s:.3g}" for s in layer.strides)
    title = f"DiffStride with strides ({strides}) along height and width, R = {layer.smoothness:g}"
    figure, panels = style.panels(6, 3, width=2.8, height=2.8, title=title)
    height, width = spectrum.shape
    for panel, picture, name in ((panels[0], image, "1. image"), (panels[5], output, "6. output")):
        h, w = picture.shape[1:]
        shown = picture.clamp(0, 1).movedim(0, -1).numpy()
        panel.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=(0, w, h, 0), interpolation="nearest")
        panel.set(title=f"{name}, {h} × {w}", xlabel="width (pixels)", xlim=(0, width), ylim=(height, 0))
        panel.set_ylabel("height (pixels)")
    top = float(spectrum.max())
    log = {"norm": LogNorm(vmin=1e-4 * top, vmax=top), "cmap": "cividis"}
    left, right, bottom, upper = borders(*kept.shape)
    whole = borders(height, width)
    for panel, values, name, options in (
        (panels[1], spectrum, "2. spectrum", log),
        (panels[2], window, "3. window", {"vmin": 0, "vmax": 1, "cmap": "gray"}),
        (panels[3], spectrum * window, "4. spectrum × window", log),
        (panels[4], kept, "5. cropped", log),
    ):
        visible = values if values is window else values.clamp(min=1e-4 * top)
        h, w = values.shape
        panel.imshow(visible.numpy(), extent=borders(h, w), interpolation="nearest", **options)
        panel.set(title=f"{name}, {h} × {w}", xlabel="cycles per width", xlim=whole[:2], ylim=whole[2:])
        panel.set_ylabel("cycles per height")
        if values is not spectrum:
            box = Rectangle((left, upper), right - left, bottom - upper, fill=False, color=style.COLOURS[1], ls="--")
            panel.add_patch(box)
    for panel in panels:
        panel.title.set_fontsize("medium")
    figure.colorbar(panels[2].images[0], ax=panels[2], shrink=0.8, ticks=(0, 0.5, 1))
    label = "amplitude (pixel values, log)"
    figure.colorbar(panels[4].images[0], ax=panels[3:5], location="bottom", shrink=0.6, label=label, format="%g")
    return figure


def amplitudes(x: Tensor) -> Tensor:
    """The mean amplitude over channels, frequency 0 in the middle."""
    return torch.fft.fftshift(torch.fft.fft2(x, norm="forward").abs().mean(0))


def borders(height: int, width: int) -> tuple[float, float, float, float]:
    """Borders (left, right, bottom, top) of a spectrum with frequency 0 in the middle, a cell per cycle."""
    left, top = -(width // 2) - 0.5, -(height // 2) - 0.5
    return left, left + width, top + height, top


if __name__ == "__main__":
    main()
