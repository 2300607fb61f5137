"""Multiply-accumulates and memory, against the arithmetic, torch's counter and the tensors that real models save."""

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffstride as ds
from diffstride import DiffStride2d
from diffstride.cost import count_macs
from diffstride.experiments.models import ResNet
from diffstride.nn import _fused
from diffstride.nn.learnable import LearnableStrides
from tests.helpers import zoo

# Those of which another case has all the parts, and those whose code is slow to follow.
SLOW = {"swin", "mobilenet-v1", "mobilenet-v2", "resnet-bottleneck", "regnet"}
ALL = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in SLOW else name for name in zoo.CASES]
)


class Bound(nn.Module):
    """A model that takes its inputs by keyword, for `count_macs`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        (given,) = inputs
        return zoo.bare_call(self.model, given)


def layers_of(model):
    """Return the layers in the order in which they run, where that is the order of registration."""
    return [module for module in model.modules() if isinstance(module, LearnableStrides)]


def set_strides(model, draw):
    with torch.no_grad():
        for layer in layers_of(model):
            layer.stride.copy_(torch.tensor([draw(s) for s in layer.initial_strides[: len(layer.stride)]]))


def random_strides(model):
    set_strides(model, lambda s: 1 + (1.4 * s - 1) * torch.rand(()).item())


@ALL
def test_count_is_what_torch_counts_in_the_real_model(name):
    """Exactly, at the initial strides and at others; count_macs agrees."""
    original, model, _ = zoo.converted(name)
    inputs = zoo.CASES[name].inputs(0)
    cost = ds.CostModel(model, inputs)
    assert cost.baseline() == zoo.products(original, inputs)[0][""]
    for i in range(4):
        if i:
            random_strides(model)
        total, resampling = zoo.products(model, inputs)
        # In channels_last the second axis comes first where that is cheaper.
        assert cost.exact() == pytest.approx(total[""], rel=0.02 if name == "convnext" else 0, abs=0)
        assert cost.exact() >= total[""]
        if i == 1:
            macs = count_macs(Bound(model), inputs)
            assert macs.resampling == sum(resampling.values())
            assert sum(macs) == total[""]
    assert cost.initial() == ds.CostModel(zoo.converted(name)[1], inputs).exact()


# The pooling of the whole map is a mean after the conversion; that it saved its input before is not known.
ORIGINAL_WITHIN = {"efficientnet": 0.02}
# Interpolation by symbols for sizes saves the indices of its samples.
WITHIN = {"pyramid": 0.005, "unet-by-size": 0.005}


@ALL
def test_memory_is_what_the_real_model_saves_for_backward(name):
    """Exactly, at the initial strides and at others."""
    original, model, _ = zoo.converted(name)
    inputs = zoo.CASES[name].inputs(0)
    cost = ds.CostModel(model, inputs, measure="memory")
    assert cost.baseline() == pytest.approx(
        zoo.saved_bytes(original, inputs), rel=(ORIGINAL_WITHIN | WITHIN).get(name, 0.0), abs=0
    )
    for i in range(4):
        if i:
            random_strides(model)
        saved = zoo.saved_bytes(copy.deepcopy(model), inputs)
        assert cost.exact() == pytest.approx(saved, rel=WITHIN.get(name, 0.0), abs=0)


@ALL
@pytest.mark.parametrize("measure", ["macs", "memory"])
def test_least_and_most_enclose_the_cost(name, measure):
    _, model, _ = zoo.converted(name)
    cost = ds.CostModel(model, zoo.CASES[name].inputs(0), measure=measure)
    least, most = cost.minimum(), cost.maximum()
    assert 0 < least < cost.exact() < most
    set_strides(model, lambda s: 1.0001)  # at 1 an inner window is the identity, which costs nothing
    assert cost.exact() == most
    for _ in range(3):
        random_strides(model)
        assert least <= cost.exact() <= most


def test_least_is_the_cost_at_the_largest_strides_that_the_model_runs_with():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), DiffStride2d(2.0, window="inner"), nn.Conv2d(4, 5, 3))
    cost = ds.CostModel(model, torch.randn(1, 1, 20, 30))
    # A map of 3 x 3 is the smallest that the second convolution takes.
    assert cost.minimum() == 20 * 30 * 4 * 9 + 4 * resampling((20, 30), (3, 3)) + 1 * 4 * 5 * 9
    assert cost.maximum() == 20 * 30 * 4 * 9 + 4 * resampling((20, 30), (20, 30)) + 18 * 28 * 4 * 5 * 9
    bounded = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), DiffStride2d(2.0, window="inner", bounds=(1.5, 3.0)))
    bounded.append(nn.Conv2d(4, 5, 1))
    cost = ds.CostModel(bounded, torch.randn(1, 1, 20, 30))
    assert cost.minimum() == 20 * 30 * 4 * 9 + 4 * resampling((20, 30), (7, 10)) + 7 * 10 * 20
    assert cost.maximum() == 20 * 30 * 4 * 9 + 4 * resampling((20, 30), (14, 20)) + 14 * 20 * 20


def resampling(sizes, new):
    """The products of one channel: rows of the first matrix times the plane, then columns."""
    (height, width), (h, w) = sizes, new
    return h * height * width + h * width * w


# By case: the samples that the stride-1 self of each downsampling in a row takes off its map.
CHAINS = {
    "resnet": (0, 0, 0, 0),
    "regnet": (0, 0, 0, 0),
    "vgg": (1, 1, 1),
    "densenet": (0, 1, 1),
    "inception": (2, 0, 2),
    "wav2vec2": (9, 2, 2, 1),
    "audio-1d": (8, 0, 0, 0),
}


@pytest.mark.parametrize("measure", ["macs", "memory"])
@pytest.mark.parametrize("name", CHAINS)
def test_the_relaxed_cost_lies_between_those_at_sizes_rounded_down_and_up(name, measure, monkeypatch):
    _, model, plan = zoo.converted(name)
    # Which order is the cheapest depends on whole sizes; where another one becomes that, the exact cost jumps.
    monkeypatch.setattr(_fused, "cheapest_fused_axes", lambda *_: 0)
    model.double()  # sizes of thousands of samples divided by single-precision strides are not whole again
    inputs = doubled(zoo.CASES[name].inputs(0))
    cost = ds.CostModel(model, inputs, measure=measure)
    given = zoo.tensor_of(inputs)
    spatial = given.shape[1:] if name == "wav2vec2" else given.shape[2:]
    named = dict(model.named_modules())
    sites = {site.name: site for site in plan.sites}
    layers = [named[g[0] if sites[g[0]].fused else f"{g[0]}.diffstride"] for g in plan.groups]
    assert len(layers) == len(CHAINS[name])
    for _ in range(3):
        relaxed = [[float(n) for n in spatial]]
        strides = []
        for layer, lost in zip(layers, CHAINS[name], strict=True):
            drawn = [1.1 + (1.3 * s - 0.9) * torch.rand(()).item() for s in layer.initial_strides]
            strides.append(drawn)
            relaxed.append([(n - lost) / s for n, s in zip(relaxed[-1], drawn, strict=True)])
        set_rows(layers, strides)
        value = cost().item()
        counts = []
        for rounded in (math.floor, math.ceil):
            whole = [[rounded(n) for n in sizes] for sizes in relaxed]
            set_rows(
                layers,
                [
                    [(a - lost) / b if b < a - lost else 1.0 for a, b in zip(whole[i], whole[i + 1], strict=True)]
                    for i, lost in enumerate(CHAINS[name])
                ],
            )
            counts.append(cost.exact())
        assert counts[0] < value < counts[1]


def set_rows(layers, rows):
    with torch.no_grad():
        for layer, row in zip(layers, rows, strict=True):
            layer.stride.copy_(torch.tensor(row[: len(layer.stride)], dtype=torch.float64))


def doubled(inputs):
    if isinstance(inputs, dict):
        return {key: value.double() for key, value in inputs.items()}
    return tuple(x.double() for x in inputs) if isinstance(inputs, tuple) else inputs.double()


@pytest.mark.parametrize("measure", ["macs", "memory"])
@pytest.mark.parametrize("name", ["resnet", "convnext", "wav2vec2", "inception", "resnet-d", "unet", "mixed"])
def test_gradients_are_central_differences(name, measure):
    _, model, _ = zoo.converted(name)
    model.double()
    inputs = doubled(zoo.CASES[name].inputs(0))
    random_strides(model)
    check_gradient(model, ds.CostModel(model, inputs, measure=measure))


def test_gradients_of_an_unsaturated_outer_window():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), DiffStride2d((2.3, 1.7), 2.0), nn.Conv2d(4, 5, 3)).double()
    cost = ds.CostModel(model, torch.randn(1, 1, 40, 60).double())
    check_gradient(model, cost)
    h, w = 40 / 2.3 + 4, 60 / 1.7 + 4
    assert cost().item() == pytest.approx(40 * 60 * 36 + 4 * resampling((40, 60), (h, w)) + (h - 2) * (w - 2) * 180)


def test_the_relaxed_cost_falls_evenly_behind_kept_strides():
    """Along a line it stays near the mean of the exact cost, and its slope has no gaps and no peaks.

    Interpolated between whole sizes, the slope reached three times its mean.
    """
    model, x = ResNet(width=1 / 8, downsample="conv"), torch.randn(1, 3, 256, 256)
    ds.insert(model, x)
    cost = ds.CostModel(model, x)
    strides = 1 + np.linspace(1e-3, 0.6, 241)  # at 1 the layers cost nothing
    relaxed, exact = [], []
    for stride in strides:
        set_strides(model, lambda s, stride=stride: stride)
        relaxed.append(cost().item())
        exact.append(cost.exact())
    window = 21
    mean = np.convolve(exact, np.ones(window) / window, "valid")
    assert np.abs(np.array(relaxed)[window // 2 : -(window // 2)] / mean - 1).max() < 0.03
    slopes = np.diff(np.log(relaxed)) / np.diff(np.log(strides))
    assert slopes.max() < slopes.mean() / 3 < 0
    assert slopes.min() > 2 * slopes.mean()


def check_gradient(model, cost, step=1e-6):
    cost().backward()
    strides = {id(layer.stride): layer.stride for layer in layers_of(model)}
    for stride in strides.values():
        gradient, start = stride.grad.clone(), stride.detach().clone()
        for i in range(len(start)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    stride[i] = start[i] + sign * step
                values.append(cost().item())
            with torch.no_grad():
                stride[i] = start[i]
            slope = (values[0] - values[1]) / (2 * step)
            assert gradient[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-2)
        assert (gradient <= 0).all()
    assert any(stride.grad.any() for stride in strides.values())


def test_a_saturated_outer_window_still_has_a_direction_to_push():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), DiffStride2d(1.5, 4.0), nn.Conv2d(4, 5, 3))
    cost = ds.CostModel(model, torch.randn(1, 1, 12, 12))  # 12 / 1.5 + 8 > 12
    layer = model[1]
    whole = 12 * 12 * 36 + 4 * resampling((12, 12), (12, 12)) + 10 * 10 * 180
    assert cost.exact() == cost().item() == whole
    cost().backward()
    assert (layer.stride.grad < 0).all()  # against it the stride grows
    with torch.no_grad():
        layer.stride.fill_(1.4)
    assert cost().item() == whole  # no change in value
    optimizer = torch.optim.SGD([layer.stride], lr=1e-5)
    for _ in range(200):
        optimizer.zero_grad()
        cost().backward()
        optimizer.step()
    assert cost.exact() < whole  # pushed out of saturation


# Sizes at which the maps after a stride of 1.8 lie where a fixed stride's floor (or ceiling) has a slope.
@pytest.mark.parametrize(
    ("after", "size"),
    [
        (nn.ZeroPad2d((0, 1, 2, 0)), (24, 30)),
        (nn.MaxPool2d(3, 1, 1), (24, 30)),
        (nn.AvgPool2d(2), (24, 28)),
        (nn.Upsample(scale_factor=2), (24, 30)),
        (nn.MaxPool1d(3, 1, 1), (50,)),
        (nn.MaxPool1d(2, ceil_mode=True), (52,)),
        (nn.AvgPool1d(2), (50,)),
    ],
)
def test_gradients_reach_the_strides_through_what_torch_makes_numbers_of(after, size):
    """A padding by numbers, a 1-d max pooling and an upsampling turn symbols into numbers, if one lets them."""
    ndim = len(size)
    layer = (ds.DiffStride1d, DiffStride2d)[ndim - 1](1.8, window="inner")
    model = nn.Sequential(layer, after, (nn.Conv1d, nn.Conv2d)[ndim - 1](3, 4, 3)).double()
    x = torch.randn(2, 3, *size).double()
    for measure in ("macs", "memory"):
        cost = ds.CostModel(model, x, measure=measure)
        layer.stride.grad = None
        check_gradient(model, cost)
        assert (layer.stride.grad < 0).all()
        start = cost.exact()
        for stride in (2.9, 1.0, 1.0001):
            with torch.no_grad():
                layer.stride.fill_(stride)
            exact = zoo.saved_bytes(model, x) if measure == "memory" else zoo.products(model, x)[0][""]
            # An upsampling is traced by its decomposition, which saves indices.
            within = 0.01 if measure == "memory" and isinstance(after, nn.Upsample) else 0
            assert cost.exact() == pytest.approx(exact, rel=within, abs=0)
        assert cost.maximum() == cost.exact()
        assert cost.initial() == start
        with torch.no_grad():
            layer.stride.fill_(1.8)


class TwoRoads(nn.Module):
    """Large maps go through one more convolution."""

    def __init__(self):
        super().__init__()
        self.down = DiffStride2d(2.0, window="inner")
        self.more, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.down(x)
        if x.shape[-1] > 10:
            x = self.more(x)
        return self.last(x)


@pytest.mark.parametrize("measure", ["macs", "memory"])
def test_counts_stay_exact_where_the_models_code_takes_another_turn(measure):
    model, x = TwoRoads(), torch.randn(1, 3, 24, 24)
    cost = ds.CostModel(model, x, measure=measure)
    seen = set()
    for stride in (2.0, 2.5, 1.2, 3.0, 2.2):
        with torch.no_grad():
            model.down.stride.fill_(stride)
        if measure == "macs":
            n = math.ceil(24 / stride)
            assert cost.exact() == n * n * (12 + (81 if n > 10 else 0)) + 3 * resampling((24, 24), (n, n))
        else:
            assert cost.exact() == zoo.saved_bytes(model, x)
        seen.add(cost.exact())
        relaxed = cost().item()
        assert 0.7 * cost.exact() < relaxed <= cost.exact() * 1.001  # of the road that is taken
    assert len(seen) == 5


def test_unknown_measures_and_models_without_strides():
    model, x = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="measure must be one of 'macs', 'memory', got 'flops'"):
        ds.CostModel(model, x, measure="flops")
    cost = ds.CostModel(model, x)
    assert cost.exact() == cost().item() == cost.baseline() == cost.minimum() == cost.maximum() == 64 * 64 * 12


def test_the_cost_of_a_stride_that_nothing_uses_has_no_gradient():
    model = nn.Sequential(DiffStride2d(2.0, window="inner"), nn.Conv2d(3, 8, 3), nn.Identity())
    model[2].unused = DiffStride2d(2.0)
    cost = ds.CostModel(model, torch.randn(1, 3, 64, 64))
    cost().backward()
    assert model[0].stride.grad.abs().min() > 0
    assert not model[2].unused.stride.grad.any()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.proj = DiffStride2d(2.0, window="inner"), nn.Linear(4, 4)

    def forward(self, x, *, times=1):
        x = self.down(x).flatten(2).mT
        for _ in range(times):
            q = self.proj(x)
            x = F.scaled_dot_product_attention(q, q, q)
        return {"x": x}


def test_attention_is_counted_by_the_size_squared():
    model, x = Branches(), torch.randn(2, 4, 12, 16)
    cost = ds.CostModel(model, ds.ExampleInputs(x, times=3))
    tokens = 6 * 8
    assert cost.exact() == 3 * 2 * (tokens * 16 + 2 * tokens**2 * 4) + 2 * 4 * resampling((12, 16), (6, 8))
    assert cost().item() == cost.exact()
    cost().backward()
    # Tokens and rows go with 1 / stride.
    slope = -(3 * 2 * (tokens * 16 + 2 * 2 * tokens**2 * 4) + 2 * 4 * 6 * 16 * 8) / 2.0
    both = 2 * 4 * 6 * 12 * 16 / 2.0
    assert model.down.stride.grad.tolist() == pytest.approx([slope - both, slope])


def test_a_size_divided_by_that_of_an_empty_map_is_no_map():
    """Code that divides by the size of its map fails below 4 samples: the largest strides leave that many."""

    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.conv = DiffStride2d(2.0, window="inner", shared=True), nn.Conv2d(1, 64, 1)

        def forward(self, x):
            y = self.down(x)
            return self.conv(y[..., : 64 // (y.shape[-1] // 4)])

    assert ds.CostModel(Divides(), torch.randn(1, 1, 32, 32)).minimum() == 64 * 4 * 4 + resampling((32, 32), (4, 4))


def test_a_shared_stride_costs_nothing_along_an_axis_that_stays():
    def gradient(stride, **options):
        layer = DiffStride2d(stride, window="inner", bounds=((1.0, None), (1.0, 1.0)), **options)
        ds.CostModel(nn.Sequential(layer, nn.Conv2d(1, 4, 3, padding=1)), torch.randn(1, 1, 20, 30))().backward()
        return layer.stride.grad[0].item()

    # The convolution costs 4 * 9 * 20 / S * 30, and the resampling 20 / S * 20 * 30.
    assert gradient(1.7, shared=True) == pytest.approx(gradient((1.7, 1.0))) == pytest.approx(-33600 / 1.7**2)


def test_code_that_rounds_or_takes_roots_of_sizes_has_a_cost():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ds.DiffStrideConv2d(3, 8, 3, 2.0, padding=1, shared=True, window="inner")
            self.next = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            tokens = self.conv(x).flatten(2)
            side = int(tokens.shape[-1] ** 0.5)
            y = tokens.unflatten(-1, (side, side))
            return self.next(y[..., : round(side * 0.75)])

    model, x = Tokens(), torch.randn(1, 3, 32, 32)
    cost = ds.CostModel(model, x)
    for stride, size in ((2.0, 16), (3.0, 11)):
        model.conv.write_strides([stride])
        assert cost.exact() == sum(count_macs(model, x))
        assert model(x).shape[2:] == (size, round(size * 0.75))


def test_a_layer_that_is_called_diffstride_is_a_layer_like_any_other():
    names = ("conv", "diffstride", "next"), ("conv", "layer", "next")
    parts = [nn.Conv2d(3, 4, 3, padding=1), ds.DiffStride2d(2.0), nn.Conv2d(4, 4, 3, padding=1)]
    models = [nn.Sequential(OrderedDict(zip(given, parts, strict=True))) for given in names]
    named, other = (ds.CostModel(model, torch.randn(1, 3, 32, 32)).baseline() for model in models)
    assert named == other == 9 * 4 * (3 * 32 * 32 + 4 * 16 * 16)


def test_costs_are_counted_where_a_layer_is_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ds.DiffStrideConv2d(3, 4, 3, 2.0, padding=1)

        def forward(self, x):
            return self.conv(x=x)

    model, x = Keyword(), torch.randn(1, 3, 32, 32)
    assert count_macs(model, x) == count_macs(model.conv, x)


@pytest.mark.parametrize("window", ["inner", "outer"])
def test_sizes_change_by_steps_of_their_multiple(window):
    layer = ds.DiffStride2d(2.0, window=window, smoothness=2.0, size_multiple=4, shared=True)
    model, x = nn.Sequential(layer, nn.Conv2d(3, 64, 3, padding=1)), torch.randn(1, 3, 62, 62)
    cost = ds.CostModel(model, x)
    (size, _) = layer.output_size(62)
    found = list(cost.neighbours())
    sizes = []
    for neighbour in found:
        layer.write_strides([neighbour.stride])
        sizes.append(layer.output_size(62)[0])
        assert neighbour.cost == cost.exact()
    assert sizes == [size - 4, size + 4]
    layer.write_strides([2.0])
    changes = cost.sensitivity(lambda _: 0.0).changes
    assert {change.size % 4 for change in changes} == {0}
    assert {size - 4, size + 4} <= {change.size for change in changes}


def test_a_budget_without_strides_that_can_move_settles_where_it_is():
    model = nn.Sequential(ds.DiffStride2d(1.0, bounds=(1, 1)), nn.Conv2d(3, 3, 3))
    ds.CostModel(model, torch.randn(1, 3, 32, 32)).budget(1.0).settle([])
    assert ds.strides(model) == {"0": (1.0, 1.0)}
