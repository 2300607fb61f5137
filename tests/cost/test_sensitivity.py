"""Measured changes of a loss, beside the model itself with each stride set by hand."""

import copy
import math

import pytest
import scipy.stats
import torch
from torch import nn

import diffstride as ds
from diffstride.cost.sensitivity import Change, Sensitivity
from diffstride.errors import UsageError
from diffstride.nn import learnable_layers

X = torch.randn(4, 3, 24, 20, dtype=torch.float64)
TARGET = torch.randn(4, 6, dtype=torch.float64)


def network(**options):
    torch.manual_seed(0)
    options = {"window": "inner", **options}
    return nn.Sequential(
        ds.DiffStride2d(1.5, smoothness=2.0, **options), nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(),
        ds.DiffStride2d(1.7, smoothness=1.0, **options), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).double()  # fmt: skip


def loss(model):
    return (model(X) - TARGET).square().mean()


def by_hand(model, change):
    """The loss and the size of the output of the layer, with the stride of a change."""
    twin = copy.deepcopy(model)
    layer = twin.get_submodule(change.layer)
    axes = {"all": [0], "height": [0], "width": [1]}[change.axis]
    with torch.no_grad():
        for axis in axes:
            layer.stride[axis] = change.stride
        sizes = []
        layer.register_forward_hook(lambda module, args, y: sizes.append(y.shape[2 + axes[0]]))
        return loss(twin).item(), sizes[0]


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"window": "outer"}, {"bounds": ((1, None), (1, 1))}])
def test_changes_are_those_of_the_model_and_its_cost(options):
    options = options | ({"shared": True} if "bounds" in options else {})  # one stride, along the height alone
    model = network(**options)
    before = copy.deepcopy(model.state_dict())
    cost = ds.CostModel(model, X)
    found = cost.sensitivity(loss)
    assert found.loss == pytest.approx(loss(model).item())
    axes = {("all",)} if options.get("shared") else {("height",), ("width",)}
    assert {(change.axis,) for change in found.changes} == axes
    slopes = dict(zip(["0", "3"], torch.autograd.grad(loss(model), [model[0].stride, model[3].stride]), strict=True))
    for change in found.changes:
        value, size = by_hand(model, change)
        assert change.loss == pytest.approx(value - found.loss, abs=1e-12)
        assert change.size == size
        axis = 1 if change.axis == "width" else 0
        used = model.get_submodule(change.layer).strides[axis]
        slope = slopes[change.layer][axis].item()
        assert change.predicted == pytest.approx(slope * (change.stride - used))
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.get_submodule(change.layer).stride[axis] = change.stride
        assert change.cost == ds.CostModel(twin, X).exact() - cost.exact()
    present = {"0": model[0].output_size((24, 20)), "3": model[3].output_size(model[0].output_size((24, 20)))}
    for name, sizes in present.items():
        tried = {change.size for change in found.changes if change.layer == name and change.axis in ("all", "height")}
        assert {sizes[0] - 1, sizes[0] + 1} <= tried
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_agreement_is_that_of_scipy():
    pairs = [(0.3, 0.1), (-0.2, 0.4), (0.3, 0.4), (1.0, 0.5), (0.1, -0.3)]
    changes = [Change("ab"[i % 2], "all", 1.0, 8, loss, predicted, -1) for i, (loss, predicted) in enumerate(pairs)]
    found = Sensitivity(1.0, 100, tuple(changes))
    assert found.rank_correlation() == pytest.approx(scipy.stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    own = [pairs[i] for i in (0, 2, 4)]
    assert found.rank_correlation("a") == pytest.approx(scipy.stats.spearmanr(*zip(*own, strict=True)).statistic)
    assert found.sign_agreement() == 3 / 5
    assert found.sign_agreement("b") == 1 / 2
    assert "loss 1.0000" in str(found)


def test_a_loss_without_gradient_predicts_nothing():
    found = ds.CostModel(network(), X).sensitivity(lambda model: loss(model).item())
    assert all(math.isnan(change.predicted) for change in found.changes)


def test_the_strides_that_hurt_least_are_found():
    """The upper half of the band is empty in the input of one branch: its stride is free up to 2."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (ds.DiffStride1d(1.0, window="inner", smoothness=1.0) for _ in "ab")
            self.after_a, self.after_b = (nn.Conv1d(1, 200, 3, padding=1) for _ in "ab")

        def forward(self, smooth, rough):
            return self.after_a(self.a(smooth)), self.after_b(self.b(rough))

    torch.manual_seed(0)
    n = torch.arange(64)
    smooth, rough = (torch.cos(2 * math.pi * f * n / 64)[None, None] for f in (3, 25))
    model = Branches()

    def lost_energy(twin):
        seen = [layer(x).square().mean() for layer, x in ((twin.a, smooth), (twin.b, rough))]
        return sum((0.5 - energy).abs() for energy in seen)

    cost = ds.CostModel(model, (smooth, rough))
    tried = cost.find_strides(lost_energy, 0.7)
    best = min(tried, key=lambda found: found.loss)
    assert ds.strides(model) == best.strides
    assert best.loss == pytest.approx(lost_energy(model).item(), abs=1e-6)
    assert len({tuple(found.strides.values()) for found in tried}) >= 4
    assert all(0.9 <= found.cost / cost.baseline() / 0.7 <= 1.03 for found in tried)
    assert all(stride <= 32 for found in tried for own in found.strides.values() for stride in own)
    assert best.loss < 0.3 * max(found.loss for found in tried)
    assert model.a.strides[0] > 2
    assert model.b.strides == (1.0,)
    with torch.no_grad():
        model.a.stride.fill_(2.0)
        model.b.stride.fill_(1.1)
    moved = cost.find_strides(lost_energy, 0.7)  # tries each stride alone from here, too
    assert any(found.strides["b"] == (pytest.approx(1.1),) and found.strides["a"] > (1.5,) for found in moved)
    assert any(found.strides["a"] == (pytest.approx(2.0),) and found.strides["b"] > (1.05,) for found in moved)
    model.a.stride.data.fill_(1.2)
    with pytest.raises(RuntimeError, match="no loss"):
        cost.find_strides(lambda twin: (_ for _ in ()).throw(RuntimeError("no loss")), 0.7)
    assert ds.strides(model) == {"a": (pytest.approx(1.2),), "b": (1.0,)}
    with pytest.raises(UsageError, match="amount must be between the least and the most"):
        cost.find_strides(lost_energy, 0.001)


def test_combinations_of_the_same_sizes_are_compared_once():
    """With a hard window they are the same network. On small maps many strides give the same sizes."""
    torch.manual_seed(0)
    layers = [ds.DiffStride2d(1.0, window="hard", shared=True) for _ in "abc"]
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
    model = nn.Sequential(*(part for pair in zip(layers, convolutions, strict=True) for part in pair))
    x, seen = torch.randn(2, 3, 8, 8), []

    def recorded(twin):
        sizes, y = [], x
        for part in twin:
            y = part(y)
            sizes.append(y.shape[2:])
        seen.append(tuple(sizes))
        return y.square().mean()

    tried = ds.CostModel(model, x).find_strides(recorded, 0.5, rounds=3)
    assert len(seen) == len(tried) == len(set(seen)) > 3


def test_a_stride_whose_sizes_step_over_the_budget_is_set_below_it():
    """Behind kept strides, 9 samples become 5, 3 and 2, and 8 become 4, 2 and 1: no size is near 0.36 of the cost."""
    convolutions = [nn.Conv2d(64, 64, 3, stride=2, padding=1) for _ in range(3)]
    layer, x = ds.DiffStride2d(1.0, window="hard", shared=True), torch.randn(2, 64, 16, 16)
    model = nn.Sequential(layer, *convolutions)
    cost = ds.CostModel(model, x)
    target = 0.36 * cost.exact()
    (found,) = cost.find_strides(lambda twin: twin(x).square().mean(), target, of="absolute")
    assert layer.output_size(16) == (8, 8)
    assert cost.exact() == found.cost < 0.9 * target


def test_a_screening_loss_decides_what_is_compared():
    """Three combinations at least are compared by the loss, and later ones if they are among the best three so far."""
    torch.manual_seed(0)
    parts = [ds.DiffStride2d(1.0, window="hard", shared=True) if i % 2 == 0 else nn.Conv2d(8, 8, 3) for i in range(8)]
    model, x = nn.Sequential(*parts), torch.randn(2, 8, 32, 32)
    screened, compared = [], []

    def quick(twin):
        screened.append(sum(stride[0] * (i + 1) for i, stride in enumerate(ds.strides(twin).values())))
        return screened[-1]

    def loss(twin):
        compared.append(len(screened) - 1)
        return -screened[-1]

    tried = ds.CostModel(model, x).find_strides(loss, 0.5, screen=quick)
    assert compared == [i for i, value in enumerate(screened) if sum(other < value for other in screened[:i]) < 3]
    assert 3 <= len(tried) == len(compared) < len(screened)
    best = min(tried, key=lambda found: found.loss)
    assert {name: layer.entries for name, layer in learnable_layers(model)} == best.strides


def test_windows_without_a_gradient_agree_with_nothing():
    model = nn.Sequential(ds.DiffStride2d(1.0, window="hard", shared=True), nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 16, 16)
    found = ds.CostModel(model, x).sensitivity(lambda twin: twin(x).square().mean())
    assert found.changes
    assert math.isnan(found.sign_agreement())


def test_a_screening_loss_that_is_not_a_number_is_the_worst():
    torch.manual_seed(0)
    parts = [ds.DiffStride2d(1.0, window="hard", shared=True) if i % 2 == 0 else nn.Conv2d(8, 8, 3) for i in range(8)]
    model, x = nn.Sequential(*parts), torch.randn(2, 8, 32, 32)
    values = [3.0, math.nan, 2.0, 1.0, *(0.5 - i / 100 for i in range(30))]
    given, compared = iter(values), []

    def quick(twin):
        compared.append(next(given))
        return compared[-1]

    tried = ds.CostModel(model, x).find_strides(lambda twin: twin(x).square().mean(), 0.5, screen=quick)
    assert len(tried) == len(compared) > 5  # each is among the best three so far, and the second is one of three
