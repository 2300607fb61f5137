"""The baselines of the benchmark agree with the layer."""

import pytest
import torch

import diffstride as ds
from diffstride.experiments.benchmark.baselines import AxisByAxisFFT, JointFFT, NaiveFFT, move_data

# Size, strides, smoothness, size of the result. No frequency lies on an end of a ramp, where clamps of versions differ.
EVEN = ((32, 28), (1.99, 2.6), 4.0, (24, 18))
ODD = ((33, 21), (2.3, 1.7), 1.0, (16, 14))
ODD_RESULT = ((32, 21), (2.6, 1.49), 0.5, (13, 15))
WHOLE = ((9, 11), (1.49, 1.2), 4.0, (9, 11))  # nothing is cropped


def make(baseline, strides, smoothness):
    layer = baseline(smoothness=smoothness)
    with torch.no_grad():
        layer.strides.copy_(torch.tensor(strides))
    return layer


def gradients(layer, x):
    """Return the result and the gradients of the input and of the strides, for a fixed gradient of the result."""
    x = x.clone().requires_grad_()
    y = layer(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], upstream)


def assert_agree(baseline, x, strides, smoothness, of=("result", "input", "strides")):
    theirs = gradients(make(baseline, strides, smoothness), x)
    for name, actual, expected in zip(
        ("result", "input", "strides"), theirs, gradients(ds.DiffStride2d(strides, smoothness), x), strict=True
    ):
        if name in of:
            # The gradient of a stride sums over all samples: its rounding errors are those of its largest entry.
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(("size", "strides", "smoothness", "new"), [EVEN, ODD, ODD_RESULT, WHOLE])
def test_axis_by_axis_is_our_layer(size, strides, smoothness, new):
    x = torch.randn(2, 3, *size)
    assert make(AxisByAxisFFT, strides, smoothness)(x).shape == (2, 3, *new)
    assert_agree(AxisByAxisFFT, x, strides, smoothness)


@pytest.mark.parametrize("baseline", [JointFFT, NaiveFFT])
@pytest.mark.parametrize(("size", "strides", "smoothness", "new"), [ODD_RESULT, WHOLE])
def test_both_axes_at_once_are_our_layer_where_results_are_odd(baseline, size, strides, smoothness, new):
    x = torch.randn(2, 3, *size)
    assert make(baseline, strides, smoothness)(x).shape == (2, 3, *new)
    assert_agree(baseline, x, strides, smoothness)


@pytest.mark.parametrize("baseline", [JointFFT, NaiveFFT])
@pytest.mark.parametrize(("size", "strides", "smoothness", "new"), [EVEN, ODD])
def test_both_axes_at_once_are_our_layer_below_the_last_row(baseline, size, strides, smoothness, new):
    """Even sizes: nothing at half the result's size, so the one row kept of two does not matter."""
    x = ds.spectral_resize(torch.randn(2, 3, *(n - 1 for n in new)), size)
    assert make(baseline, strides, smoothness)(x).shape == (2, 3, *new)
    assert_agree(baseline, x, strides, smoothness, of=("result", "strides"))


@pytest.mark.parametrize("baseline", [AxisByAxisFFT, JointFFT, NaiveFFT])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_memory_format_stay(baseline, memory_format):
    x = torch.randn(2, 3, 16, 16).to(memory_format=memory_format)
    y = baseline()(x)
    assert y.is_contiguous(memory_format=memory_format)
    half = baseline()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # Computed in float32: rounded once on the way in (8 bits) and once on the way out.
    torch.testing.assert_close(half.float(), y, rtol=2**-7, atol=2**-6)


def test_data_movement_hands_on_copies():
    x = torch.randn(2, 3, requires_grad=True)
    y = move_data(x)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    upstream = torch.randn(2, 3)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(grad, upstream)
    assert grad.data_ptr() != upstream.data_ptr()
