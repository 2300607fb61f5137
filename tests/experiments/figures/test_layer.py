"""Pictures of a layer show what it does to an image."""

import numpy as np
import pytest
import torch

from diffstride.nn import DiffStride2d
from draw_layer import draw_layer
from tests.helpers.figures import inside


def centred(x):
    return np.fft.fftshift(np.fft.fft2(x.double().numpy()) / x[0].numel(), axes=(-2, -1))


@pytest.mark.parametrize("size", [(32, 24), (25, 18)])
def test_the_steps_of_the_layer_follow_from_each_other(size):
    layer = DiffStride2d((2.6, 1.7), 2.0)
    image = torch.rand(3, *size)
    figure = draw_layer(layer, image)
    drawn_image, drawn_spectrum, drawn_window, _, drawn_kept, drawn_output = (
        np.asarray(panel.images[0].get_array()) for panel in figure.axes[:6]
    )
    with torch.no_grad():
        output = layer(image)
    assert drawn_image == pytest.approx(image.movedim(0, -1).numpy())
    assert drawn_output == pytest.approx(output.clamp(0, 1).movedim(0, -1).numpy())
    spectrum, kept = centred(image), centred(output)
    assert drawn_spectrum == pytest.approx(np.abs(spectrum).mean(0), abs=1e-4)
    masks = []
    for n, stride in zip(size, (2.6, 1.7), strict=True):
        cycles = np.abs(np.arange(n) - n // 2)
        masks.append(np.clip((2.0 + n / (2 * stride) - cycles) / 2.0, 0, 1))
    assert drawn_window == pytest.approx(np.outer(*masks), abs=1e-6)
    # Below the highest frequency of an even size, which is +N'/2 and -N'/2, the output has the masked spectrum.
    inner = [(new - 1) // 2 for new in output.shape[1:]]
    (top, left), (above, beside) = (
        [n // 2 - f for n, f in zip(sizes, inner, strict=True)] for sizes in (size, output.shape[1:])
    )
    height, width = (2 * f + 1 for f in inner)
    masked = (spectrum * np.outer(*masks))[:, top : top + height, left : left + width]
    assert kept[:, above : above + height, beside : beside + width] == pytest.approx(masked, abs=1e-6)
    assert drawn_kept == pytest.approx(np.abs(kept).mean(0), abs=1e-4)
    # A cell per cycle around frequency 0; the box is what is kept.
    left, right, bottom, top = figure.axes[4].images[0].get_extent()
    assert (right - left, bottom - top, -0.5 - left, -0.5 - top) == (
        *drawn_kept.shape[::-1],
        *(n // 2 for n in drawn_kept.shape[::-1]),
    )
    assert figure.axes[3].patches[0].get_bbox().extents.tolist() == [left, top, right, bottom]
    assert inside(figure)
