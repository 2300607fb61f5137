"""How much work a call is for the host: counts of operations, which are exact."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import diffstride as ds
from diffstride.experiments.benchmark.measure import peak_bytes


class Operations(TorchDispatchMode):
    """Counts what PyTorch dispatches."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(layer, x, upstream):
    with Operations() as counted:
        layer(x).backward(upstream)
    return counted.count


@pytest.mark.parametrize(("basis", "window"), [("dft", "outer"), ("dft", "inner"), ("dct", "outer")])
def test_a_call_is_few_operations(basis, window):
    layer = ds.DiffStride2d((2.3, 1.9), basis=basis, window=window)
    x = torch.randn(2, 4, 32, 32, requires_grad=True)
    upstream = torch.ones_like(layer(x))
    for _ in range(2):
        operations(layer, x, upstream)
    assert operations(layer, x, upstream) <= 25
    with torch.no_grad():
        layer.stride.add_(1e-4)
    assert operations(layer, x, upstream) <= 40


def test_a_held_stride_builds_nothing_when_the_batch_changes():
    layer = ds.DiffStride2d((2.3, 1.9))
    inputs = [torch.randn(batch, 4, 32, 32, requires_grad=True) for batch in (2, 3)]
    for x in inputs:
        layer(x)
    for x in inputs:
        assert operations(layer, x, torch.ones_like(layer(x))) <= 25


@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_large_and_small_batches_have_the_same_gradients(basis):
    """A large one saves little, since its strides' gradients come from the frequencies on the ramps."""
    layer = ds.DiffStride2d((2.3, 1.9), basis=basis).double()
    x = torch.randn(40, 4, 24, 24, dtype=torch.float64)
    upstream = torch.randn(layer(x).shape, dtype=torch.float64)

    def gradients(x, upstream):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(layer(x), [x, layer.stride], upstream)

    whole = gradients(x, upstream)
    parts = [gradients(a, b) for a, b in zip(x.split(10), upstream.split(10), strict=True)]
    torch.testing.assert_close(whole[0], torch.cat([part[0] for part in parts]))
    torch.testing.assert_close(whole[1], torch.stack([part[1] for part in parts]).sum(0))
    made = [peak_bytes(partial(gradients, x[:n], upstream[:n]), torch.device("cpu")) for n in (10, 40)]
    assert made[1] < 2.5 * made[0]  # four times the elements: the derivative's matrices double what is made


def test_an_expanded_gradient_of_planes_with_a_single_column():
    layer = ds.DiffStrideConv2d(1, 2, (1, 2), (7.5, 1.0), padding="same", smoothness=52.5, basis="dct").double()
    x = torch.randn(2, 1, 21, 1, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    upstream = torch.randn(2, 1, 1, 1, dtype=torch.float64).expand(y.shape)
    expanded = torch.autograd.grad(y, [x, layer.stride, layer.weight], upstream, retain_graph=True)
    whole = torch.autograd.grad(y, [x, layer.stride, layer.weight], upstream.contiguous())
    for a, b in zip(expanded, whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_the_identity_is_not_computed(basis):
    """At stride 1 an inner window keeps all: exact outputs in memory of their own, without a product."""
    layer = ds.DiffStride2d((1.0, 2.0), window="inner", basis=basis)
    x = torch.randn(2, 4, 16, 20)
    with torch.no_grad():
        layer(x)  # builds the operators
        with FlopCounterMode(display=False) as counter:
            one = layer(x)
    assert counter.get_total_flops() == 2 * 2 * 4 * 16 * 20 * 10  # along the width alone
    reference = ds.DiffStride1d(2.0, window="inner", basis=basis)
    torch.testing.assert_close(one, reference(x.flatten(1, 2)).view(one.shape))
    layer.stride.data.fill_(1.0)
    for given in (x.clone(), x.clone().to(memory_format=torch.channels_last)):
        given.requires_grad_()
        y = layer(given)
        assert torch.equal(y, given)
        assert y.data_ptr() != given.data_ptr()
        y.relu_()  # as an activation after the layer
        upstream = torch.randn_like(y)
        y.backward(upstream)
        torch.testing.assert_close(given.grad, upstream * (given > 0), rtol=1e-5, atol=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(layer(x.to(dtype)), x.to(dtype))
    transformed = ds.DiffStride2d(1.0, window="inner", basis=basis, backend="fft")
    assert torch.equal(transformed(x), x)
    # The stride has the gradient that it has a little further on, where products are computed.
    grads = []
    for stride in (1.0, 1 + 1e-5):
        moved = ds.DiffStride2d(stride, window="inner", basis=basis).double()
        (moved(x.double()) ** 2).sum().backward()
        grads.append(moved.stride.grad)
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2)


def test_a_convolution_at_stride_1_resamples_nothing():
    """Whatever order would be the cheapest at other strides."""
    conv = nn.Conv2d(3, 64, 3, padding=1)
    layer = ds.DiffStrideConv2d.fuse(conv, ds.DiffStride2d(1.0, window="inner"))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(layer(x), conv(x))
    assert ds.cost.count_macs(layer, x) == (32 * 32 * 3 * 64 * 9, 0)
    assert ds.CostModel(layer, x).exact() == 32 * 32 * 3 * 64 * 9


@pytest.mark.parametrize("strides", [(3.0, 1.2), (1.2, 3.0)])
def test_the_order_in_channels_last_is_no_dearer(strides):
    layer = ds.DiffStride2d(strides, window="inner")
    x = torch.randn(1, 16, 32, 32)
    macs = [ds.cost.count_macs(layer, given).resampling for given in (x, x.to(memory_format=torch.channels_last))]
    assert macs[1] <= macs[0]
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x))
