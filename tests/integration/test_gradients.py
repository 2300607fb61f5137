"""Gradients of inputs and strides against finite differences, and where they must be alive."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import diffstride as ds
from diffstride import functional as F
from diffstride.options import LayerOptions
from tests.helpers import reference

OPTIONS = [
    pytest.param({"backend": b, "basis": s, "window": w}, id=f"{b}-{s}-{w}")
    for b in ("fft", "matmul")
    for s in ("dft", "dct")
    for w in ("outer", "inner")
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("shape", "strides", "smoothness"),
    [((7,), (1.53,), 1.0), ((12,), (2.41,), 1.7), ((6, 9), (1.53, 2.21), 0.7), ((4, 5, 6), (1.43, 1.53, 1.87), 0.6)],
)
def test_gradcheck(options, shape, strides, smoothness):
    x = torch.randn(1, 2, *shape, dtype=torch.float64, requires_grad=True)
    stride = torch.tensor(strides, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, s: F.diffstride(x, s, smoothness, **options), (x, stride))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(64,), (37, 40), (1, 2, 16, 3, 20)], ids=str)
def test_gradients_by_hand_are_those_of_autograd(options, shape):
    """Ramps of few coefficients, kept from the forward pass, and of many, in every layout."""
    ndim = len(shape) if len(shape) < 3 else 2
    x = torch.randn(2, 3, *shape[-ndim:], dtype=torch.float64)
    strides = torch.tensor((2.0, 2.3)[:ndim], dtype=torch.float64, requires_grad=True)
    for smoothness in (0.6, 1.0, 4.0):
        layer_options = LayerOptions(smoothness=smoothness, norm="ortho", **options)
        on_host = tuple(strides.tolist())
        sizes = layer_options.output_sizes(shape[-ndim:], on_host)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=layout) if x.ndim == 4 else x
            x.requires_grad_()
            by_hand, by_autograd = (
                F.downsample(x, strides, values, sizes, layer_options) for values in (on_host, None)
            )
            torch.testing.assert_close(by_hand, by_autograd)
            upstream = torch.randn_like(by_hand)
            found = torch.autograd.grad(by_hand, [x, strides], upstream)
            expected = torch.autograd.grad(by_autograd, [x, strides], upstream)
            torch.testing.assert_close(found, expected)
            x = x.detach()


@pytest.mark.parametrize("options", OPTIONS)
def test_frequencies_at_both_ends_of_the_ramp_count_with_strides_on_the_host_and_without(options):
    """8 samples at stride 2: from 2 to 3 (outer) or from 1 to 2 (inner) the mask falls from 1 to 0; all are kept."""
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    strides = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    layer_options = LayerOptions(smoothness=1.0, size_multiple=8, **options)
    sizes = layer_options.output_sizes((8,), (2.0,))
    slopes = reference.mask_slope(8, 2.0, 1.0, options["window"], options["basis"])
    assert np.count_nonzero(slopes) == (2 if options["basis"] == "dft" else 3)
    upstream = torch.randn(2, 3, *sizes, dtype=torch.float64)
    expected = (upstream.numpy() * reference.resample(x, sizes, [slopes], options["basis"])).sum()
    for on_host in ((2.0,), None):
        (found,) = torch.autograd.grad(F.downsample(x, strides, on_host, sizes, layer_options), strides, upstream)
        assert found.item() == pytest.approx(expected, rel=1e-10)


def test_only_what_is_asked_for_is_computed():
    x = torch.randn(2, 3, 20, 20)
    layer = ds.DiffStride2d(2.0, 1.0)
    layer(x).sum().backward()  # the input needs no gradient: a first layer
    assert layer.stride.grad is not None
    layer.requires_grad_(False)
    y = layer(x.requires_grad_())
    assert all(t is None or t.numel() < x.numel() for t in y.grad_fn.saved_tensors)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad.sum(), y.sum() * 0 + 2 * 3 * 12 * 12)


@pytest.mark.parametrize("options", OPTIONS)
def test_second_derivatives(options):
    x = torch.randn(1, 1, 9, dtype=torch.float64, requires_grad=True)
    stride = torch.tensor([1.73], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, s: F.diffstride(x, s, 1.1, **options), (x, stride))


def test_stride_gradient_is_zero_where_the_signal_lies_inside_the_flat_band():
    n = torch.arange(64, dtype=torch.float64)
    layer = ds.DiffStride1d(2.0, 4.0).double()  # flat up to 16, ramp to 20
    for cycles, on_ramp in ((3, False), (15, False), (18, True), (25, False)):
        wave = torch.cos(2 * torch.pi * cycles * n / 64)[None, None]
        (grad,) = torch.autograd.grad(layer(wave).square().sum(), layer.stride)
        assert (grad.abs().item() > 1e-6) == on_ramp, cycles
        if on_ramp:
            assert grad.item() < 0  # a larger stride keeps less energy


@pytest.mark.parametrize("size", [*range(4, 14), 16, 31, 32, 33, 64])
@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_stride_one_is_the_identity_with_a_live_gradient(size, basis):
    x = torch.randn(2, 3, size, dtype=torch.float64)
    layer = ds.DiffStride1d(1.0, 4.0, basis=basis).double()
    y = layer(x)
    assert y.shape == x.shape
    assert (y - x).norm() <= 1.001e-3 * x.norm()
    (grad,) = torch.autograd.grad(y.square().sum(), layer.stride)
    assert torch.isfinite(grad)
    assert grad.item() < 0  # less energy with a larger stride: the loss -energy would hold S, +energy pushes it up


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # in torch's own forward mode
def test_forward_mode_agrees_with_backward_mode():
    x = torch.randn(1, 2, 12, 9, dtype=torch.float64)
    stride = torch.tensor([1.73, 2.21], dtype=torch.float64)
    loss = lambda s: F.diffstride(x, s, 1.1, output_size=(9, 6)).square().sum()
    gradient = torch.func.grad(loss)(stride)
    for i, direction in enumerate(torch.eye(2, dtype=torch.float64)):
        _, slope = torch.func.jvp(loss, (stride,), (direction,))
        torch.testing.assert_close(slope, gradient[i])
    hessian = torch.func.hessian(loss)(stride)
    torch.testing.assert_close(hessian, hessian.T)


def test_dual_numbers_and_batches_of_tangents():
    x, t = torch.randn(2, 2, 3, 12, 9, dtype=torch.float64)
    strides = torch.tensor([1.73, 2.21], dtype=torch.float64)
    f = lambda x: F.diffstride(x, strides, 1.1)
    with torch.autograd.forward_ad.dual_level():
        y = f(torch.autograd.forward_ad.make_dual(x, t))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, f(t))  # it is linear


def test_gradients_of_single_samples():
    layer = ds.DiffStrideConv2d(3, 4, 3, (1.7, 2.2), padding=1, smoothness=1).double()
    x = torch.randn(5, 3, 13, 12, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    loss = lambda p, x: torch.func.functional_call(layer, p, x[None]).square().sum()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        expected = torch.autograd.grad(layer(x[i : i + 1]).square().sum(), list(parameters.values()))
        torch.testing.assert_close([each[name][i] for name in parameters], list(expected))


def test_autocast_around_backward_changes_nothing():
    x = torch.randn(2, 3, 40, 40)
    layer = ds.DiffStride2d((1.9, 2.3), 1.0)
    y = layer(x)
    (expected,) = torch.autograd.grad(y.square().sum(), layer.stride, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(y.square().sum(), layer.stride)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [9, 64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_activation_may_write_in_place(layout, size):
    x = torch.randn(8, 16, size, size, requires_grad=True)
    frozen = ds.DiffStride2d(2.0, 1.0).requires_grad_(False)
    layers = [ds.DiffStride2d(2.0, 1.0), ds.DiffStride2d(2.0, backend="fft"), ds.SpectralPool2d(2), frozen]
    for layer in [*layers, ds.DiffStrideConv2d(16, 16, 3, 3.0, padding=1)]:
        grads = []
        for inplace in (False, True):
            y = torch.nn.functional.relu(layer(x.contiguous(memory_format=layout)), inplace=inplace)
            grads.append(torch.autograd.grad(y.square().sum(), x)[0])
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ["fft", "matmul"])
def test_stride_gradients_of_float16_stay_in_range(backend):
    x = (200 * torch.cos(2 * torch.pi * 66 * torch.arange(1024) / 1024))[None, None]
    layer = ds.DiffStride1d(8.0, 4.0, backend=backend)
    grads = [torch.autograd.grad(y, layer.stride, y.detach().sign() * 1e-3)[0] for y in (layer(x), layer(x.half()))]
    torch.testing.assert_close(grads[1], grads[0], rtol=0.02, atol=0)


def test_batched_upstream_gradients():
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    layer = ds.DiffStride2d(1.7, 1.0)
    y = layer(x)
    upstream = torch.randn(4, *y.shape)
    batched = torch.autograd.grad(y, [x, layer.stride], upstream, retain_graph=True, is_grads_batched=True)
    for i, g in enumerate(upstream):
        torch.testing.assert_close(
            [b[i] for b in batched], list(torch.autograd.grad(y, [x, layer.stride], g, retain_graph=True))
        )
