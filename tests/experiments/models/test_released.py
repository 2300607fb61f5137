"""The layer of the authors' program against its rules written out as sums in float64."""

import math

import numpy as np
import pytest
import torch

from diffstride import functional
from diffstride.experiments.models import ReleasedDiffStride2d, ResNet


def windows(n, stride, smoothness):
    """Return the weights by frequency of both axes: `{f: weight}`, negative ones for the height."""
    edge = max(n / max(stride, n / (n - smoothness)), 2) / 2

    def weight(edge, position):
        return min(max((smoothness + edge - position) / smoothness, 0), 1)

    half = (n - 1) // 2 if n % 2 else n // 2 - 1
    positions = [*range(half + 1), *(f - 1 if n % 2 == 0 else f for f in range(n // 2, 0, -1))]
    frequencies = [*range(half + 1), *range(-(n // 2), 0)]
    if n % 2:  # the window has moved by one place
        positions = [*positions[1:], positions[0]]
    vertical = {f: weight(edge, p) for f, p in zip(frequencies, positions, strict=True)}
    return vertical, {f: weight(edge + 1, f) for f in range(n // 2 + 1)}


def expected(x, strides, smoothness):
    """Sum over all kept coefficients."""
    height, width = x.shape
    vertical, _ = windows(height, strides[0], smoothness)
    _, horizontal = windows(width, strides[1], smoothness)
    rows = [(f, w) for f, w in vertical.items() if w > 0]
    columns = [(f, w) for f, w in horizontal.items() if w > 0]
    new_height, new_width = len(rows), 2 * (len(columns) - 1)
    f, v = np.array(rows).T
    g, w = np.array(columns).T
    analysis = np.exp(-2j * np.pi * np.outer(f, np.arange(height)) / height) * v[:, None]
    spectrum = analysis @ x @ (np.exp(-2j * np.pi * np.outer(np.arange(width), g) / width) * w)
    places = np.arange(len(rows))  # a row takes the frequency of its place among those kept
    synthesis = np.exp(2j * np.pi * np.outer(np.arange(new_height), places) / new_height)
    twice = np.where((g == 0) | (2 * np.arange(len(g)) == new_width), 1, 2)
    back = np.exp(2j * np.pi * np.outer(np.arange(len(g)), np.arange(new_width)) / new_width) * twice[:, None]
    return (synthesis @ spectrum @ back).real / (new_height * new_width)


@pytest.mark.parametrize("smoothness", [1.0, 4.0])
@pytest.mark.parametrize("size", [8, 9, 12, 16, 21, 32, 47, 64])
def test_values_and_sizes(size, smoothness):
    draw = np.random.default_rng(size)
    for stride in np.linspace(1.03, 5, 28):
        for shape, strides in (((size, size), (stride, stride)), ((size, size + 3), (stride, 1.5 * stride))):
            x = draw.normal(size=shape)
            layer = ReleasedDiffStride2d(strides, smoothness).double()
            layer.stride.data.copy_(torch.tensor(strides, dtype=torch.float64))
            y = layer(torch.from_numpy(x)[None, None])[0, 0].detach().numpy()
            found = expected(x, strides, smoothness)
            assert y.shape == found.shape
            np.testing.assert_allclose(y, found, atol=1e-9)
            for n, s, new in zip(shape, strides, y.shape, strict=True):
                if n % 2 == 0:
                    edge = max(n / max(s, n / (n - smoothness)), 2) / 2
                    assert new == min(n, 2 * math.ceil(edge + smoothness))


@pytest.mark.parametrize(("n", "smoothness", "value"), [(32, 4.0, 1.78), (32, 1.0, 3.16), (64, 4.0, 2.56)])
def test_a_constant_grows(n, smoothness, value):
    y = ReleasedDiffStride2d(2.0, smoothness)(torch.ones(1, 1, n, n))
    torch.testing.assert_close(y, torch.full_like(y, value), atol=5e-3, rtol=0)


def test_forward_writes_the_parameter():
    for n, written in (32, 32 / 28), (8, 2.0), (4, math.inf):
        layer = ReleasedDiffStride2d(1.0)
        layer(torch.randn(1, 1, n, n))
        assert layer.stride.tolist() == pytest.approx([written] * 2)


def test_gradients():
    torch.manual_seed(0)
    layer = ReleasedDiffStride2d((2.31, 1.77), 2.0).double()
    x = torch.randn(1, 2, 16, 14, dtype=torch.float64, requires_grad=True)

    def run(x, stride):
        return torch.func.functional_call(layer, {"stride": stride}, (x,))

    stride = torch.tensor([2.31, 1.77], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(run(x, stride * 1))
    (run(x, stride * 1) * upstream).sum().backward()
    for axis in range(2):
        values = []
        for step in (1e-6, -1e-6):
            moved = stride.detach().clone()
            moved[axis] += step
            values.append((run(x, moved) * upstream).sum().item())
        assert stride.grad[axis].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_the_library_is_near_with_other_strides():
    """At equal sizes, most of the output is the same; with the strides of the program itself less."""
    torch.manual_seed(0)
    x = torch.randn(8, 4, 32, 32)
    layer = ReleasedDiffStride2d((2.2, 1.7))
    y = layer(x).detach()

    def error(strides):
        z = functional.diffstride(x, torch.tensor(strides), 4.0, norm="backward", output_size=y.shape[-2:])
        return ((z - y).norm() / y.norm()).item()

    near = error([32 / (32 / 2.2 + 1), 32 / (32 / 1.7 + 2)])
    assert near < 0.1
    assert near < 0.5 * error([2.2, 1.7])


def test_a_network_takes_it_by_name():
    path = "diffstride.experiments.models.ReleasedDiffStride2d"
    model = ResNet(width=0.125, downsample=path, strides=[1, None, 2, 2, 2])
    assert sum(isinstance(module, ReleasedDiffStride2d) for module in model.modules()) == 4
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.endswith("stride"))
    with pytest.raises(ValueError, match=r"downsample must be a path such as .*, got 'no\.such'"):
        ResNet(downsample="no.such")
