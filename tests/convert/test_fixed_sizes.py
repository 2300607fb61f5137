"""Later modules need a map of one size: the sites before it learn all the same, and so do axes that nothing binds."""

import copy

import numpy as np
import pytest
import scipy.signal
import torch
from torch import nn
from torch.nn import functional as F

import diffstride as ds
from tests.helpers import reference, zoo


def resampled(x, *sizes):
    """Resample the last axes by the rule of scipy."""
    for axis, size in enumerate(sizes, start=x.ndim - len(sizes)):
        x = torch.from_numpy(scipy.signal.resample(x.numpy(), size, axis=axis))
    return x


@pytest.mark.parametrize("way", [ds.convert, ds.insert])
def test_the_map_before_a_flatten_head_is_resized_to_its_size(way):
    model, x = zoo.flatten_head().double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    original = copy.deepcopy(model)
    plan = way(model, x)
    assert [(r.name, r.size) for r in plan.resizes] == [("1", (8, 8))]
    assert "1 (MaxPool2d): resized to 8 x 8, which later modules need" in str(plan)
    assert "3 (Linear), at linear, which needs 512 features" in plan.left_alone["1"]
    if way is ds.insert:
        torch.testing.assert_close(model(x), original(x))
    with torch.no_grad():
        for parameter in model.parameters():
            if type(parameter) is not nn.Parameter:
                parameter.mul_(1.7)
    pooled = F.max_pool2d(model[0](x).detach(), 2)
    assert pooled.shape[-1] < 8
    found = model(x)
    torch.testing.assert_close(found, model[3](resampled(pooled, 8, 8).flatten(1)))
    found.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    torch.testing.assert_close(ds.freeze(model, x)(x), found)


class Subsampling(nn.Module):
    """The front end of speech encoders: `[B, 1, time, frequency]`, of which a linear layer counts the frequencies."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.linear = nn.Linear(6 * 10, 8)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        return self.linear(x.transpose(1, 2).flatten(2))


def test_an_axis_that_nothing_binds_learns_beside_one_that_is_bound(tmp_path):
    model, x = Subsampling().double(), torch.randn(2, 1, 80, 40, dtype=torch.float64)
    plan = ds.plan(model, x)
    assert [(site.name, site.stride, site.fixed_axes) for site in plan.sites] == [
        ("a", (2, 2), ()),
        ("b", (2, 1), (1,)),
    ]
    assert "needs 60 features" in plan.left_alone["b (width)"]
    plan.save(tmp_path / "plan.json")
    ds.Plan.load(tmp_path / "plan.json").apply(model)
    assert model.b.stride == (1, 2)
    with torch.no_grad():
        model.a.stride.copy_(torch.tensor([1.7, 2.6]))
        model.b.diffstride.stride[0] = 2.4
    first = model.a(x).relu()
    assert first.shape == (2, 4, 48, 16)
    second = F.conv2d(first, model.b.weight, model.b.bias, stride=(1, 2), padding=1)
    rows = reference.diffstride(second.detach().mT.numpy(), (2.4,), 4.0, window="inner")
    rows = torch.from_numpy(np.asarray(rows)).mT
    expected = model.linear(resampled(rows, 20, 10).relu().transpose(1, 2).flatten(2))
    found = model(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert model.a.stride.grad.all()
    assert model.b.diffstride.stride.grad[0] != 0
    assert model.b.diffstride.stride.grad[1] == 0
    torch.testing.assert_close(ds.freeze(model, x)(x), found)
    longer = torch.randn(2, 1, 113, 40, dtype=torch.float64)
    assert model(longer).shape == (2, *model.b.diffstride.output_size((model.a.output_size((113, 40))[0], 8))[:1], 8)


class Branches(Subsampling):
    """The map before the linear layer is a sum of two."""

    def __init__(self):
        super().__init__()
        self.pool, self.lift = nn.AvgPool2d(2), nn.Conv2d(4, 6, 1)

    def forward(self, x):
        x = self.a(x).relu()
        x = self.b(x) + self.lift(self.pool(x))
        return self.linear(x.transpose(1, 2).flatten(2))


def test_an_axis_is_bound_for_all_sites_that_share_a_stride():
    model, x = Branches(), torch.randn(2, 1, 80, 40)
    plan = ds.convert(model, x)
    assert plan.groups == [["a"], ["b", "pool"]]
    assert [site.fixed_axes for site in plan.sites] == [(), (1,), (1,)]
    assert model.pool.diffstride.stride is model.b.diffstride.stride
    for time, frequency in ((1.0, 1.0), (1.4, 2.3), (3.1, 2.9)):
        with torch.no_grad():
            model.a.stride.copy_(torch.tensor([time, frequency]))
            model.b.diffstride.stride[0] = time
        assert model(x).isfinite().all()
    with torch.no_grad():
        model.a.stride.fill_(2)
        model.b.diffstride.stride[0] = 2
    cost = ds.CostModel(model, x)
    strided = Branches()
    assert cost.baseline() == plan.macs_before == zoo.products(strided, x)[0][""]


def test_a_site_keeps_its_stride_for_an_upsampling_in_code():
    """`F.interpolate` has no module that could follow: the map that it must meet keeps half of the size before."""

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.c2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)

        def forward(self, x):
            a = self.c1(x)
            return (F.interpolate(self.c2(a), scale_factor=2.0) + a).mean((-1, -2))

    plan = ds.plan(Pyramid(), torch.randn(2, 3, 64, 64), upsample=True)
    assert [(site.name, site.size_multiple) for site in plan.sites] == [("c1", 2)]
    assert "Pyramid" in plan.left_alone["c2"]
    assert "at add" in plan.left_alone["c2"]


class MeetInTime(nn.Module):
    """Two maps meet along time alone: one has its frequencies counted, the other averages them."""

    def __init__(self):
        super().__init__()
        self.counted, self.averaged = nn.Conv2d(1, 6, 3, 2, 1), nn.Conv2d(1, 8, 3, 2, 1)
        self.linear = nn.Linear(6 * 20, 8)

    def forward(self, x):
        return self.linear(self.counted(x).transpose(1, 2).flatten(2)) + self.averaged(x).mean(-1).mT


def test_sites_that_share_a_stride_keep_the_same_axes():
    model, x = MeetInTime(), torch.randn(2, 1, 80, 40)
    plan = ds.convert(model, x)
    assert plan.groups == [["counted", "averaged"]]
    assert [(site.stride, site.fixed_axes) for site in plan.sites] == [((2, 1), (1,))] * 2
    assert plan.left_alone["averaged (width)"] == "its map must keep its size like that of counted"
    with torch.no_grad():
        model.counted.diffstride.stride[0] = 3.1
    assert model(x).shape == (2, 26, 8)
