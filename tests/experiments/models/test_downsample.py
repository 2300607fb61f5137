"""The sizes and values of each downsampling method, and the mistakes that would give wrong results."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffstride.experiments.models import make_downsample
from diffstride.nn import SpectralPool2d

INTEGER_METHODS = ["conv", "avg", "max", "blur"]


def through(method, stride, x, **options):
    """Return the map of a 3x3 convolution and its downsampling layer, as in a block."""
    if method == "blur":
        pytest.importorskip("kornia")
    conv_stride, layer = make_downsample(method, stride, **options)
    return layer(F.conv2d(x, torch.ones(x.shape[1], 1, 3, 3), stride=conv_stride, padding=1, groups=x.shape[1]))


@pytest.mark.parametrize("size", [(8, 8), (7, 11), (2, 1)])
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("method", INTEGER_METHODS)
def test_integer_methods_leave_the_ceiling_of_the_quotient(method, stride, size):
    pair = stride if isinstance(stride, tuple) else (stride, stride)
    y = through(method, stride, torch.randn(2, 3, *size))
    assert y.shape == (2, 3, *(math.ceil(n / s) for n, s in zip(size, pair, strict=True)))


@pytest.mark.parametrize("stride", [1.0, 2.6, (1.5, 3.0)])
def test_spectral_takes_fractional_strides_and_floors(stride):
    pair = stride if isinstance(stride, tuple) else (stride, stride)
    y = through("spectral", stride, torch.randn(1, 2, 18, 13))
    assert y.shape == (1, 2, *(math.floor(n / s) for n, s in zip((18, 13), pair, strict=True)))


def test_average_of_a_cut_window_counts_only_its_own_samples():
    _, layer = make_downsample("avg", 2)
    assert layer(torch.arange(5.0).expand(1, 1, 1, 5)).flatten().tolist() == [0.5, 2.5, 4.0]


def test_maximum_of_each_window():
    _, layer = make_downsample("max", (1, 3))
    assert layer(torch.tensor([5.0, 1, 2, -4, -1, -2, -7]).view(1, 1, 1, 7)).flatten().tolist() == [5, -1, -7]


@pytest.mark.parametrize(("stride", "weights"), [(2, [1, 2, 1]), (3, [1, 4, 6, 4, 1])])
def test_blur_answers_an_impulse_with_samples_of_the_binomial_kernel(stride, weights):
    pytest.importorskip("kornia")
    _, layer = make_downsample("blur", stride)
    kernel = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    position = 2 * stride
    x = torch.zeros(1, 1, 6 * stride, 6 * stride, dtype=torch.float64)
    x[0, 0, position, position + 1] = 1
    radius = len(weights) // 2
    rows = torch.zeros(6 * stride, dtype=torch.float64)
    columns = rows.clone()
    rows[position - radius : position + radius + 1] = kernel
    columns[position + 1 - radius : position + radius + 2] = kernel
    torch.testing.assert_close(layer(x)[0, 0], torch.outer(rows[::stride], columns[::stride]))


def test_a_stride_of_one_is_a_layer_only_where_it_is_learned():
    for method in ("avg", "max", "blur"):
        conv_stride, layer = make_downsample(method, 1.0)
        assert conv_stride == 1
        assert isinstance(layer, nn.Identity)
    conv_stride, layer = make_downsample("diffstride", 1, smoothness=1.0)
    assert conv_stride == 1
    assert [p.tolist() for p in layer.parameters()] == [[1.0, 1.0]]
    assert layer.smoothness == 1


def test_spectral_takes_its_own_options_and_leaves_the_rest():
    x = torch.ones(1, 1, 8, 8)
    _, layer = make_downsample("spectral", 2, norm="backward", smoothness=3.0, window="inner", shared=True)
    assert isinstance(layer, SpectralPool2d)
    torch.testing.assert_close(layer(x), torch.full((1, 1, 4, 4), 4.0))


@pytest.mark.parametrize("method", [*INTEGER_METHODS, lambda stride: nn.AvgPool2d(2)])
def test_other_methods_leave_the_options_of_diffstride_aside(method):
    x = torch.randn(1, 2, 6, 6)
    assert torch.equal(through(method, 2, x, smoothness=1.0, basis="dct", bounds=(1.0, 3.0)), through(method, 2, x))


@pytest.mark.parametrize(
    ("method", "stride", "options", "message"),
    [
        ("avg", 2, {"smoothnes": 1.0}, r"DiffStride2d .*got \['smoothnes'\]: did you mean smoothness"),
        ("conv", (2, 2.5), {}, "stride must be an integer for downsample='conv', got .*2.5"),
        ("diffstride", 0.5, {}, "stride must be >= 1, got 0.5"),
        (nn.Identity, float("nan"), {}, "stride must be finite"),
        ("stride", 2, {}, "'conv', 'avg', 'max', 'blur', 'spectral', 'diffstride', got 'stride'"),
        ("blur", 2, {"ndim": 1}, "downsample must be one of 'conv', 'avg', 'max', 'spectral', 'diffstride'"),
    ],
)
def test_mistakes_are_refused(method, stride, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_downsample(method, stride, **options)


@pytest.mark.parametrize(("stride", "received"), [(2, 2), (2.5, 2.5), ((2.5, 2), (2.5, 2)), ([2.5, 2], (2.5, 2))])
def test_a_function_of_the_stride_is_a_method(stride, received):
    calls = []
    conv_stride, layer = make_downsample(lambda s: calls.append(s) or nn.Flatten(), stride)
    assert conv_stride == 1
    assert isinstance(layer, nn.Flatten)
    assert calls == [received]
