"""Memory: little is kept per step, and nothing grows."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride.backends import matmul, resample
from diffstride.integrations.input_sizes import InputSizes


def live_bytes():
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def resident_bytes():
    """Return the memory of the process, which only Linux has at any moment."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


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
    keeps = (resample._cached_operator, matmul._cached_table)
    limits = [keep.cache_parameters()["maxsize"] for keep in keeps]
    train(model, max(limits))  # full
    before, resident = live_bytes(), resident_bytes()
    sizes = train(model, steps)
    assert len(sizes) > 30
    assert live_bytes() < 1.2 * before  # operators differ in size, not in number
    assert resident_bytes() < resident + 8 * 2**20  # 10,000 steps that leave a kilobyte each would be more
    for keep, limit in zip(keeps, limits, strict=True):
        assert keep.cache_info().currsize <= limit


def test_nothing_grows_while_strides_change_sizes():
    flat(150)


@pytest.mark.long
def test_nothing_grows_over_ten_thousand_steps():
    flat(10_000)


@pytest.mark.long
def test_nothing_grows_in_what_surrounds_a_training():
    """Hooks, costs, rows, copies of the state, layers that come and go."""
    model = nn.Sequential(ds.DiffStride2d(2.0, 1.0), nn.Conv2d(2, 2, 3), ds.DiffStrideConv2d(2, 3, 3, 2.0, padding=1))
    inputs = InputSizes(model)
    costs = [ds.CostModel(model, torch.randn(1, 2, 24, 24), measure) for measure in ("macs", "memory")]

    def steps(count):
        for step in range(count):
            train(model, 1, size=20 + step % 5)
            (ds.stride_cost(model) + sum(cost() for cost in costs)).backward()
            model.zero_grad()
            ds.clamp_strides_(model)
            ds.strides(model)
            model.state_dict()
            ds.DiffStride2d(1.0 + step % 3)(torch.randn(1, 1, 9, 8))
        gc.collect()
        return len(gc.get_objects()), live_bytes()

    steps(140)  # the caches are full
    objects, before = steps(20)
    more_objects, after = steps(100)
    assert more_objects < objects + 50
    assert after < 1.2 * before
    assert set(inputs.sizes) == {"0", "2"}
    inputs.close()
    assert not any(module._forward_pre_hooks for module in model)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_graphs_of_new_sizes_end_at_the_limit_of_torch(monkeypatch):
    """Beyond it a compiled layer runs as in eager mode: right, and keeps nothing more."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 4)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = ds.DiffStride1d(1.0, 1.0)
    compiled = torch.compile(layer, backend=backend, dynamic=False)

    def steps(sizes):
        for size in sizes:
            with torch.no_grad():
                layer.stride.fill_(1.0 + size % 9)
            layer.refresh_sizes()
            x = torch.randn(1, 1, size)
            y = compiled(x)
            torch.testing.assert_close(y, layer(x))
            y.sum().backward()
        gc.collect()
        return len(gc.get_objects())

    steps(range(20, 80))
    kept = len(graphs), len(vars(layer._slots))
    objects = steps(range(80, 220))  # the caches of operators are full
    more_objects = steps(range(220, 320))
    assert (len(graphs), len(vars(layer._slots))) == kept
    assert max(kept) <= 5
    assert more_objects < objects + 50


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
    built = resample._cached_operator.cache_info().misses
    for _ in range(3):
        layer.eval()(x)
        layer.train()(x).sum().backward()
    assert resample._cached_operator.cache_info().misses == built
    with torch.no_grad():
        layer.stride[0] += 0.1
    layer(x)
    assert resample._cached_operator.cache_info().misses == built + 1  # the other axis is as it was


def test_huge_operators_are_not_kept():
    before = resample._cached_operator.cache_info().currsize
    ds.DiffStride1d(1.7, 8.0, backend="matmul")(torch.randn(1, 1, 1500))
    assert resample._cached_operator.cache_info().currsize == before


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses import FakeTensorMode

    size = 27
    with FakeTensorMode() as mode:
        pool = ds.SpectralPool1d(1.63)
        assert pool(torch.randn(1, 1, size)).shape[-1] == 16
    real = pool(torch.randn(1, 1, size))
    assert type(real) is torch.Tensor
    del mode
