"""Convolution and stride as one operator, in every order, against naive sums and against the two layers."""

import copy
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import diffstride as ds
from diffstride.cost import count_macs
from diffstride.experiments.benchmark.measure import StorageMeter
from diffstride.nn._fused import ConvDownsample, Convolution, cheapest_fused_axes, make_schedule
from tests.helpers import reference

ORDERS = [0, 1, None]  # axes that are resampled before the convolution; None stands for all
CASES = [
    # kernel, other arguments, spatial sizes
    pytest.param((3, 3), {"padding": 1}, (13, 12), id="same"),
    pytest.param((3, 4), {"padding": (2, 0), "dilation": (2, 1)}, (12, 11), id="dilated"),
    pytest.param((2, 3), {"groups": 2, "padding": (0, 1)}, (9, 14), id="groups"),
    pytest.param((1, 1), {}, (7, 10), id="pointwise"),
    pytest.param((5, 3), {"padding": (6, 1)}, (5, 4), id="wider than the map"),
    pytest.param((3, 3), {"padding": (6, 12), "dilation": (6, 12)}, (4, 8), id="taps in the padding alone"),
    pytest.param((3,), {"padding": 1}, (17,), id="1d"),
    pytest.param((4,), {"dilation": 3}, (20,), id="1d dilated"),
    pytest.param((3, 2, 2), {"padding": (1, 0, 1)}, (5, 6, 4), id="3d"),
    pytest.param((2, 1, 3), {"groups": 2, "padding": (1, 0, 2), "dilation": (2, 1, 2)}, (5, 3, 6), id="3d dilated"),
]
OPTIONS = [
    pytest.param({"window": w, "basis": b, "norm": n}, id=f"{w}-{b}-{n}")
    for w in ("outer", "inner", "hard")
    for b, n in (("dft", "forward"), ("dft", "ortho"), ("dct", "backward"))
]


FUSED = {1: ds.DiffStrideConv1d, 2: ds.DiffStrideConv2d, 3: ds.DiffStrideConv3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAYERS = {1: ds.DiffStride1d, 2: ds.DiffStride2d, 3: ds.DiffStride3d}


def make(kernel, arguments, stride=(2.3, 1.7, 1.4), smoothness=1.3, **options):
    layer = FUSED[len(kernel)]
    return layer(4, 6, kernel, stride[: len(kernel)], smoothness=smoothness, **arguments, **options).double()


def run(layer, x, order):
    return at_fixed_sizes(layer, order, layer.output_size(x.shape[-layer.ndim :]))(
        x, layer.weight, layer.bias, layer.stride
    )


def scheduled(layer, x, order, new_sizes):
    fused_axes = layer.ndim if order is None else order
    return make_schedule(layer.convolution, layer.options, x.shape[-layer.ndim :], new_sizes, fused_axes)


def two_layers(layer):
    conv = CONVOLUTIONS[layer.ndim](
        4, 6, layer.kernel_size, 1, layer.padding, layer.dilation, layer.groups, layer.bias is not None,
        layer.padding_mode,
    ).double()  # fmt: skip
    conv.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "stride"})
    pool = LAYERS[layer.ndim](layer.initial_strides, **asdict(layer.options)).double()
    pool.load_state_dict({"stride": layer.stride})
    pool.size_offset = layer.size_offset
    return conv, pool


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("kernel", "arguments", "size"), CASES)
def test_every_order_is_convolution_then_layer_by_naive_sums(kernel, arguments, size, options):
    layer = make(kernel, arguments, **options)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    full = reference.convolve(x, layer.weight.detach(), layer.bias.detach(), **arguments)
    expected = reference.diffstride(full, layer.stride.tolist(), 1.3, **options)
    for order in ORDERS:
        y = run(layer, x, order)
        assert y.shape[2:] == layer.output_size(size)
        assert np.abs(y.detach().numpy() - expected).max() < 1e-11, order
    assert np.abs(layer(x).detach().numpy() - expected).max() < 1e-11


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("kernel", "arguments", "size"), CASES)
def test_gradients_of_every_order_are_those_of_the_two_layers(kernel, arguments, size, options):
    layer = make(kernel, arguments, **options)
    conv, pool = two_layers(layer)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    y = pool(conv(x))
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, conv.weight, conv.bias, pool.stride], upstream)
    for order in ORDERS:
        found = torch.autograd.grad(run(layer, x, order), [x, layer.weight, layer.bias, layer.stride], upstream)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def at_fixed_sizes(layer, order, sizes):
    """Return the layer as a function of its input and parameters, for finite differences."""

    def f(x, weight, bias, stride):
        conv_downsample = ConvDownsample(scheduled(layer, x, order, sizes), x, layer.recompute)
        return conv_downsample.at(stride.tolist())(x, weight, bias, stride)

    return f


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("window", ["outer", "inner"])
@pytest.mark.parametrize(("kernel", "size"), [((3, 2), (6, 5)), ((2, 1, 2), (4, 5, 4))], ids=["2d", "3d"])
def test_gradcheck(kernel, size, order, window):
    layer = make(kernel, {"padding": (1, 1) if len(kernel) == 2 else (1, 0, 1)}, window=window)
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    f = at_fixed_sizes(layer, order, layer.output_size(size))
    inputs = (x, layer.weight, layer.bias, layer.stride)
    assert gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, atol=1e-4, fast_mode=len(size) == 3)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("kernel", "arguments", "size", "size_offset"),
    [
        pytest.param((3,), {"padding": 1}, (6,), (1,), id="1d even"),
        pytest.param((3,), {"padding": 1}, (7,), (1,), id="1d odd"),
        pytest.param((3, 2), {"padding": (1, 0)}, (6, 6), (1, 2), id="2d"),
        pytest.param((1, 2, 2), {"padding": (0, 1, 0)}, (4, 3, 5), (1, 0, 2), id="3d"),
    ],
)
def test_axes_that_grow(kernel, arguments, size, size_offset, options):
    """With `size_offset` the output may have more samples than the convolution, in every order."""
    # Within the bounds of every axis: finite differences know nothing of the clamp's backward.
    strides = (1.37, 1.43, 1.4) if options["window"] == "outer" else (1.07, 1.05, 1.1)
    layer = make(kernel, arguments, strides, **options)
    layer.size_offset = size_offset
    sampled = layer.window_size(size)
    sizes = layer.output_size(size)
    assert sizes == tuple(n + more for n, more in zip(sampled, size_offset, strict=True))
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    full = reference.convolve(x.detach(), layer.weight.detach(), layer.bias.detach(), **arguments)
    expected = reference.diffstride(full, layer.stride.tolist(), 1.3, **options, size_offset=size_offset)
    conv, pool = two_layers(layer)
    y = pool(conv(x))
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, conv.weight, conv.bias, pool.stride], upstream)
    for order in ORDERS:
        y = run(layer, x, order)
        assert y.shape[2:] == sizes
        assert np.abs(y.detach().numpy() - expected).max() < 1e-11, order
        found = torch.autograd.grad(y, [x, layer.weight, layer.bias, layer.stride], upstream)
        torch.testing.assert_close(found, gradients, rtol=1e-10, atol=1e-11)
        inputs = (x, layer.weight, layer.bias, layer.stride)
        assert gradcheck(at_fixed_sizes(layer, order, sizes), inputs, fast_mode=len(size) == 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [(15, 18), (7, 8, 9)], ids=["2d", "3d"])
def test_narrow_dtypes_and_channels_last(dtype, order, size):
    layer = make((3,) * len(size), {"padding": 1})
    layout = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    expected = layer(x).detach()
    narrow = layer.to(dtype)
    assert narrow.stride.dtype == (torch.float32 if dtype == torch.float32 else torch.float64)  # never half
    assert narrow.weight.dtype == dtype
    assert run(narrow, x.to(dtype), order).is_contiguous()
    y = run(narrow, x.to(dtype).contiguous(memory_format=layout), order)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (y.double() - expected).norm() < tolerance * expected.norm()


def test_the_transpose_of_a_convolution():
    layer = ds.DiffStrideConv2d(4, 6, 3, (1.7, 2.4), padding=1, smoothness=1)
    x = torch.randn(2, 4, 14, 11)
    flipped = copy.deepcopy(layer)
    with torch.no_grad():
        flipped.stride.copy_(layer.stride.flip(0))
        flipped.weight.copy_(layer.weight.mT)
    torch.testing.assert_close(flipped(x.mT), layer(x).mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("size", [(9, 10), (4, 6, 5)], ids=["2d", "3d"])
def test_other_padding_modes_are_those_of_the_convolution(mode, size):
    layer = make((3, 3, 2)[: len(size)], {"padding": (1, 2, 1)[: len(size)], "padding_mode": mode})
    conv, pool = two_layers(layer)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), pool(conv(x)))
    layout = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    last = layer(x.contiguous(memory_format=layout))
    assert last.is_contiguous(memory_format=layout)
    torch.testing.assert_close(last, pool(conv(x)))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_parameters_are_those_of_a_convolution(ndim):
    arguments = (4, 6, 3, 2, 1, 2, 2, True, "zeros")  # nn.Conv2d's order
    torch.manual_seed(3)
    layer = FUSED[ndim](*arguments)
    torch.manual_seed(3)
    conv = CONVOLUTIONS[ndim](*arguments)
    assert torch.equal(layer.weight, conv.weight)
    assert torch.equal(layer.bias, conv.bias)
    missing, unexpected = layer.load_state_dict(conv.state_dict(), strict=False)
    assert (missing, unexpected) == (["stride"], [])
    for name in ("in_channels", "out_channels", "kernel_size", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(conv, name)
    assert FUSED[ndim](4, 6, 3, bias=False).bias is None
    assert f"4, 6, kernel_size={(3,) * ndim}, padding={(1,) * ndim}" in repr(layer)


def test_fuse_shares_the_parameters_of_both():
    conv, pool = nn.Conv2d(4, 6, 3, padding=1), ds.DiffStride2d((1.6, 2.2), 1.5, window="inner", basis="dct")
    fused = ds.DiffStrideConv2d.fuse(conv, pool)
    assert (fused.weight, fused.bias, fused.stride) == (conv.weight, conv.bias, pool.stride)
    x = torch.randn(2, 4, 15, 16)
    torch.testing.assert_close(fused(x), pool(conv(x)), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        pool.stride.fill_(3.0)
    assert fused.output_size(15) == (5, 5)
    fused.reset_parameters()
    assert pool.strides == pytest.approx((1.6, 2.2))
    with pytest.raises(
        ValueError, match=r"conv must have stride 1 and 2 spatial axes like the layer, got stride \(2, 2\)"
    ):
        ds.DiffStrideConv2d.fuse(nn.Conv2d(4, 6, 3, 2), pool)
    with pytest.raises(
        TypeError, match=r"conv and layer must be a plain nn\.Conv .* and a DiffStride, got ConvTranspose2d"
    ):
        ds.DiffStrideConv2d.fuse(nn.ConvTranspose2d(4, 6, 3), pool)


def test_fuse_takes_volumes_and_keeps_the_excess():
    conv, pool = nn.Conv3d(4, 6, (3, 1, 3), padding=(1, 0, 0)), ds.DiffStride3d((1.6, 2.2, 1.3), 1.5, window="inner")
    pool.size_offset = (0, 1, 2)
    fused = ds.DiffStrideConv3d.fuse(conv, pool)
    assert (fused.weight, fused.bias, fused.stride) == (conv.weight, conv.bias, pool.stride)
    assert fused.size_offset == (0, 1, 2)
    x = torch.randn(2, 4, 6, 4, 5)
    y = fused(x)
    assert y.shape[2:] == fused.output_size((6, 4, 5)) == (4, 3, 4)  # of 6, 4 + 1 and 3 + 2
    torch.testing.assert_close(y, pool(conv(x)), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"conv must have stride 1 and 2 spatial axes like the layer, got stride \(1, 1"
    ):
        ds.DiffStrideConv2d.fuse(conv, pool)
    with pytest.raises(ValueError, match=r"3 spatial axes like the layer, got stride \(1, 1, 1\) and a layer of 2"):
        ds.DiffStrideConv3d.fuse(conv, ds.DiffStride2d())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double()])
def test_a_shared_stride_stays_shared_and_counts_once(duplicate):
    pool = ds.DiffStride2d(2.0)
    model = nn.ModuleDict({"down": pool, "conv": ds.DiffStrideConv2d.fuse(nn.Conv2d(1, 1, 3), pool)})
    model = duplicate(model)
    assert model["down"].stride is model["conv"].stride
    assert list(ds.strides(model)) == ["down"]
    assert ds.stride_cost(model).item() == 0.25
    assert [len(group["params"]) for group in ds.param_groups(model, 0.1)] == [2, 1]


def test_the_rule_takes_the_order_with_less_work():
    def rule(channels, size, new, kernel, **options):
        (out_channels, in_channels), ones = channels, (1,) * len(kernel)
        convolution = Convolution(in_channels, out_channels, kernel, ((1, 1),) * len(kernel), ones, ones, **options)
        return cheapest_fused_axes(convolution, size, new)

    assert rule((256, 128), (16, 16), (6, 6), (3, 3)) == 2
    assert rule((32, 16), (32, 32), (16, 16), (3, 3)) == 1
    assert rule((64, 64), (32, 32), (32, 32), (3, 3)) == 0  # nothing is saved
    assert rule((128, 128), (32, 32), (18, 18), (3, 3), groups=128) == 0
    assert rule((256, 128), (16, 16), (6, 6), (3, 3), padding_mode="reflect") == 0
    assert rule((256, 128), (64,), (24,), (3,)) == 1
    assert rule((128, 64), (8, 8, 8), (4, 4, 4), (3, 3, 3)) == 3
    assert rule((32, 16), (16, 16, 16), (8, 8, 8), (3, 3, 3)) == 1
    assert rule((32, 32), (16, 16, 16), (13, 13, 13), (3, 3, 3)) == 0
    assert rule((64, 64), (16000,), (4000,), (9,)) == 0  # a matrix of 36,000 x 16,000


@pytest.mark.parametrize(("stride", "channels"), [(3.0, (16, 32)), (1.0, (4, 4)), (2.0, (4, 4))])
def test_macs_of_the_convolution_are_those_of_the_size_at_which_it_runs(stride, channels):
    layer = ds.DiffStrideConv2d(*channels, 3, stride, padding=1, smoothness=1)
    x = torch.randn(2, channels[0], 24, 20)
    h, w = layer.output_size((24, 20))
    fused_axes = layer.schedule((24, 20), (h, w)).fused_axes
    positions = [24 * 20, h * 20, h * w][fused_axes]
    macs = count_macs(nn.Sequential(layer, nn.Identity()), x)
    assert macs.model == 2 * positions * channels[0] * channels[1] * 9
    a, b = channels
    products = [
        b * (h * 24 * 20 + h * 20 * w),
        a * 3 * h * 24 * 20 + b * h * 20 * w,
        a * (3 * h * 24 * 20 + 3 * h * 20 * 3 * w),
    ][fused_axes]
    assert macs.resampling == 2 * products


@pytest.mark.parametrize(("stride", "fused_axes"), [(3.0, 3), (1.5, 1), (1.05, 0)])
def test_macs_of_volumes(stride, fused_axes):
    layer = ds.DiffStrideConv3d(16, 40, 3, stride, padding=1, window="inner")
    size = (10, 9, 8)
    n = layer.output_size(size)
    assert layer.schedule(size, n).fused_axes == fused_axes
    positions, products = {
        0: (10 * 9 * 8, 40 * (n[0] * 10 * 9 * 8 + n[0] * n[1] * 9 * 8 + n[0] * n[1] * n[2] * 8)),
        1: (
            n[0] * 9 * 8, 16 * 3 * n[0] * 10 * 9 * 8 + 40 * (n[0] * n[1] * 9 * 8 + n[0] * n[1] * n[2] * 8)
        ),
        3: (
            n[0] * n[1] * n[2],
            16 * (3 * n[0] * 10 * 9 * 8 + 9 * n[0] * n[1] * 9 * 8 + 27 * n[0] * n[1] * n[2] * 8),
        ),
    }[fused_axes]  # fmt: skip
    macs = count_macs(nn.Sequential(layer), torch.randn(1, 16, *size))
    assert macs == (positions * 16 * 40 * 27, products)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, 6, 3, 2, -1), ValueError, "padding must be >= 0, got -1"),
        ((4, 6, 3, 2, 1, 1, 3), ValueError, "in_channels must be divisible by groups=3, got 4"),
        ((4, 6, 3, 2, 1, 1, 1, True, "mirror"), ValueError, "padding_mode must be one of 'zeros'.*got 'mirror'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        ds.DiffStrideConv2d(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("order", [1, None])
def test_resampling_again_in_backward_changes_memory_alone(order):
    layer = make((3, 3), {"padding": 1}, window="inner")
    x = torch.randn(1, 4, 12, 11, dtype=torch.float64, requires_grad=True)
    sizes, inputs = layer.output_size((12, 11)), (x, layer.weight, layer.bias, layer.stride)
    upstream = torch.randn(1, 6, *sizes, dtype=torch.float64)
    kept = torch.autograd.grad(at_fixed_sizes(layer, order, sizes)(*inputs), inputs, upstream)
    layer.recompute = True
    f = at_fixed_sizes(layer, order, sizes)
    torch.testing.assert_close(torch.autograd.grad(f(*inputs), inputs, upstream), kept, rtol=0, atol=0)
    assert torch.autograd.gradgradcheck(f, inputs, atol=1e-4, fast_mode=True)


def test_the_cost_knows_what_is_kept_for_backward():
    kept = []
    for recompute in (False, True):
        fused = ds.DiffStrideConv2d(8, 64, 3, 2.0, padding=1, window="inner", recompute=recompute)
        x = torch.randn(2, 8, 64, 64)
        fused(x)  # builds the operators
        with StorageMeter() as meter:
            y = fused(x)
        kept.append(meter.alive - y.nbytes)
        cost = ds.CostModel(fused, x, measure="memory")
        assert kept[-1] == cost.exact() - x.nbytes
    assert kept[1] < 0.2 * kept[0]


def test_a_shared_layer_with_an_axis_that_stays_is_fused():
    layer = ds.DiffStride2d(3.0, shared=True, bounds=((1, None), (1, 2)))
    conv = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(ds.DiffStrideConv2d.fuse(conv, layer)(x), layer(conv(x)), atol=1e-5, rtol=1e-4)


def test_an_attribute_that_is_changed_between_calls_is_used():
    layer, x = ds.DiffStrideConv2d(3, 4, 3, 2.0, padding=1), torch.randn(1, 3, 16, 16)
    before = layer(x)
    layer.padding_mode = "circular"
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))
