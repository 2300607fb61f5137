"""What is kept: little per step, and nothing that grows."""

import gc

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride import backends
from diffstride.backends import matmul


def live_bytes():
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def train(model, steps, size=48):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    sizes = set()
    for step in range(steps):
        stride = 1.5 + 1.4 * ((step * 0.618) % 1)  # a new stride each time, sizes that come and go
        with torch.no_grad():
            for _, layer in ds.nn.learnable_layers(model):
                layer.stride.fill_(stride)
        y = model(torch.randn(1, 2, size, size + step % 7))
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        sizes.add(tuple(y.shape))
    return sizes


def flat(steps):
    model = nn.Sequential(ds.DiffStride2d(2.0, 1.0), ds.DiffStrideConv2d(2, 3, 3, 2.0, padding=1, smoothness=1.0))
    keeps = (backends._kept_operator, matmul._kept_table)
    limits = [keep.cache_parameters()["maxsize"] for keep in keeps]
    train(model, max(limits))  # full
    before = live_bytes()
    sizes = train(model, steps)
    assert len(sizes) > 30
    assert live_bytes() < 1.2 * before  # operators differ in size, not in number
    for keep, limit in zip(keeps, limits, strict=True):
        assert keep.cache_info().currsize <= limit


def test_nothing_grows_while_strides_change_sizes():
    flat(150)


@pytest.mark.long
def test_nothing_grows_over_two_thousand_steps():
    flat(2000)


def test_only_the_input_and_thin_coefficients_are_saved():
    x = torch.randn(4, 8, 64, 64)
    y = ds.DiffStride2d(2.0, 1.0)(x)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.numel() > 2]
    assert saved[0].data_ptr() == x.data_ptr()
    assert sum(t.numel() for t in saved[1:]) < 0.1 * x.numel()
    fixed = ds.SpectralPool2d(2)(x.requires_grad_())
    assert all(t is None for t in fixed.grad_fn.saved_tensors)


def test_operators_are_built_once_for_each_stride_and_never_again_in_evaluation():
    layer = ds.DiffStride2d((1.9, 2.3), 1.0)
    x = torch.randn(1, 2, 23, 29)
    layer(x)
    built = backends._kept_operator.cache_info().misses
    for _ in range(3):
        layer.eval()(x)
        layer.train()(x).sum().backward()
    assert backends._kept_operator.cache_info().misses == built
    with torch.no_grad():
        layer.stride[0] += 0.1
    layer(x)
    assert backends._kept_operator.cache_info().misses == built + 1  # the other axis is as it was


def test_huge_operators_are_not_kept():
    before = backends._kept_operator.cache_info().currsize
    ds.DiffStride1d(1.7, 8.0, backend="matmul")(torch.randn(1, 1, 1500))
    assert backends._kept_operator.cache_info().currsize == before


def test_operators_made_in_inference_mode_serve_training():
    layer = ds.DiffStride2d((1.77, 2.11), 1.0)
    x = torch.randn(1, 2, 19, 21)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.stride.grad is not None


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses import FakeTensorMode

    size = 27
    with FakeTensorMode() as mode:
        pool = ds.SpectralPool1d(1.63)
        assert pool(torch.randn(1, 1, size)).shape[-1] == 16
    real = pool(torch.randn(1, 1, size))
    assert type(real) is torch.Tensor
    del mode
