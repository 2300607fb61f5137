"""Exploration: what layers do under jitter, and what the schedules set, against the naive formulas."""

import copy
import itertools
import math
import pickle
import statistics

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import diffstride as ds
from diffstride.nn import learnable_layers
from tests.helpers import reference

OPTIONS = [
    {"window": window, "basis": basis, "backend": backend}
    for window in ("outer", "inner")
    for basis in ("dft", "dct")
    for backend in ("matmul", "fft")
]
LAYERS = {1: ds.DiffStride1d, 2: ds.DiffStride2d, 3: ds.DiffStride3d}


def naive(layer, x, strides):
    options = {"window": layer.window, "basis": layer.basis, "norm": layer.norm, "multiple": layer.size_multiple}
    lower, upper = layer.bounds
    bounds = (lower, math.inf if upper is None else upper)
    return reference.diffstride(
        x.numpy(), strides, layer.smoothness, bounds=bounds, size_offset=layer.size_offset, **options
    )


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize(
    ("shape", "strides", "factors"),
    [
        ((2, 1, 17), (2.3,), (0.7,)),
        ((1, 2, 16, 13), (2.0, 3.1), (1.2, 0.6)),
        ((1, 2, 9, 12), (1.5, 2.0), (0.1, 100.0)),  # beyond both bounds of an axis
        ((2, 5, 6, 7), (1.5, 2.0, 1.3), (1.1, 0.8, 1.4)),  # unbatched
        ((1, 1, 3, 2), (1.2, 1.0), (1.1, 2.0)),
    ],
)
def test_a_training_pass_has_the_window_and_the_size_of_the_scaled_stride(options, shape, strides, factors):
    layer = LAYERS[len(strides)](strides, 1.3, dtype=torch.float64, **options)
    layer.set_stride_scale(factors)
    x = torch.randn(shape, dtype=torch.float64)
    used = [s * f for s, f in zip(strides, factors, strict=True)]
    y = layer(x).detach()
    np.testing.assert_allclose(y, naive(layer, x, used), atol=1e-12)
    assert layer.output_size(shape[-len(strides) :], scaled=True) == y.shape[-len(strides) :]


def test_evaluation_and_every_description_of_the_model_are_of_the_parameter():
    layer = ds.DiffStride2d((2.0, 3.0), 1.0, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), layer, nn.Conv2d(2, 2, 3)).double()
    x = torch.randn(1, 1, 24, 20, dtype=torch.float64)
    cost = ds.CostModel(model, x)
    budget = cost.budget(1.0, of="initial")
    memory = ds.CostModel(model, x, "memory")

    def described():
        state = {k: v.tolist() for k, v in model.state_dict().items()}
        costs = ds.stride_cost(model).item(), cost().item(), cost.exact(), memory.exact(), budget.log_error()
        frozen = ds.freeze(model, x)(x)
        sizes = layer.output_size((24, 20)), layer.strides, ds.strides(model)
        return state, costs, sizes, frozen, model.eval()(x)

    before = described()
    layer.set_stride_scale((0.5, 1.7))
    model.train()
    after = described()
    assert after[:3] == before[:3]
    assert torch.equal(after[3], before[3])
    assert torch.equal(after[4], before[4])
    model.train()
    assert ds.freeze(model, x)(x).shape == before[4].shape
    assert model(x).shape != before[4].shape
    layer.set_stride_scale(None)
    assert torch.equal(model(x), before[4])


@pytest.mark.parametrize("options", OPTIONS[::3], ids=lambda o: "-".join(o.values()))
def test_the_gradient_flows_through_the_factor(options):
    x = torch.randn(1, 2, 15, 18, dtype=torch.float64, requires_grad=True)
    factors = (0.8, 1.25)

    def forward(stride, x):
        layer = ds.DiffStride2d(2.0, 2.0, dtype=torch.float64, **options)
        layer.set_stride_scale(factors)
        return torch.func.functional_call(layer, {"stride": stride}, (x,))

    stride = torch.tensor([2.13, 2.41], dtype=torch.float64, requires_grad=True)
    assert gradcheck(forward, (stride, x), eps=1e-7, atol=1e-6)
    # The chain rule: the gradient at the jittered stride, times the factor.
    plain = ds.DiffStride2d((2.13 * 0.8, 2.41 * 1.25), 2.0, dtype=torch.float64, **options)
    weights = torch.randn(plain(x).shape, dtype=torch.float64)
    (expected,) = torch.autograd.grad((plain(x) * weights).sum(), plain.stride)
    (got,) = torch.autograd.grad((forward(stride, x) * weights).sum(), stride)
    torch.testing.assert_close(got, expected * torch.tensor(factors, dtype=torch.float64))


def test_one_factor_for_a_shared_stride_and_one_for_all_layers_that_share_it():
    square = ds.DiffStride2d(2.0, 1.0, shared=True)
    square.set_stride_scale([1.5])
    assert square(torch.randn(1, 1, 20, 20)).shape[-2:] == (8, 8)  # 20/3 + 2
    a, b = ds.DiffStride2d(2.0, 1.0), ds.DiffStride2d(2.0, 1.0)
    b.stride = a.stride
    model = nn.ModuleDict({"a": a, "b": b, "other": ds.DiffStride2d(2.0, 1.0)})
    ds.Jitter(0.3).set_strides(model, 3, 100)
    assert a.stride_scale == b.stride_scale != model["other"].stride_scale
    x = torch.randn(1, 1, 20, 24)
    assert torch.equal(a(x), b(x))
    assert torch.equal(a(x), a(x))  # for every use in that step


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_jitter_moves_and_is_copied_with_its_layer(duplicate):
    layer = ds.DiffStride2d((2.0, 3.0), 1.0)
    layer.set_stride_scale((0.83456789, 1.2))
    x = torch.randn(1, 1, 20, 24)
    twin = duplicate(layer)
    assert torch.equal(twin(x), layer(x))
    twin.set_stride_scale(None)
    assert not torch.equal(twin(x), layer(x)[..., : twin(x).shape[-2], : twin(x).shape[-1]])
    half = duplicate(layer).half()
    assert half._stride_scale.dtype == torch.float32
    assert half._stride_scale[0].item() == pytest.approx(0.83456789, abs=1e-7)
    wide = duplicate(layer).double()
    assert wide(x.double()).shape == layer(x).shape
    assert set(layer.state_dict()) == {"stride"}
    layer.load_state_dict(ds.DiffStride2d(2.0).state_dict())
    assert layer.stride_scale == (0.83456789, 1.2)


def three_layers():
    return nn.Sequential(ds.DiffStride2d((2.0, 1.0), 1.0), ds.DiffStride1d(4.0, 1.0), ds.DiffStride2d(9.0, shared=True))


def set_factors(exploration, model, step, steps, **options):
    exploration.set_strides(model, step, steps, **options)
    return [layer.stride_scale for _, layer in learnable_layers(model)]


def test_jitter_is_a_function_of_seed_step_and_name_and_touches_no_random_state():
    model = three_layers()
    state = torch.get_rng_state()
    jitter = ds.Jitter(0.2)
    first = set_factors(jitter, model, 5, 100, seed=3)
    others = [set_factors(jitter, model, *key, seed=seed) for key, seed in [((6, 100), 3), ((5, 100), 4)]]
    assert torch.equal(torch.get_rng_state(), state)
    assert set_factors(jitter, model, 5, 100, seed=3) == first
    drawn = [f for layer in [*first, *others[0], *others[1]] for f in layer]
    assert len(set(drawn)) == len(drawn) == 12
    with torch.no_grad():
        model[0].stride.fill_(7.0)  # the noise does not depend on what was learned
    assert set_factors(jitter, model, 5, 100, seed=3) == first
    renamed = nn.Sequential(nn.Identity(), *three_layers())
    assert set_factors(jitter, renamed, 5, 100, seed=3) != first


def test_the_logarithm_of_jitter_is_normal_with_a_deviation_that_falls_in_a_straight_line_to_zero():
    model, steps, until = nn.Sequential(ds.DiffStride2d(2.0)), 4000, 0.5
    logs = [
        [math.log(f) for f in set_factors(ds.Jitter(0.2, until), model, step, steps)[0]] for step in range(steps // 2)
    ]
    for axis in (0, 1):
        standard = [entries[axis] / (0.2 * (1 - 2 * step / steps)) for step, entries in enumerate(logs)]
        assert statistics.fmean(standard) == pytest.approx(0, abs=4 / math.sqrt(len(standard)))
        assert statistics.stdev(standard) == pytest.approx(1, abs=0.07)
        within = sum(abs(z) < 1 for z in standard) / len(standard)
        assert within == pytest.approx(0.6827, abs=0.05)
        following = statistics.correlation(standard[:-1], standard[1:])
        assert abs(following) < 4 / math.sqrt(len(standard))
    assert abs(statistics.correlation(*zip(*logs, strict=True))) < 4 / math.sqrt(len(logs))
    assert set_factors(ds.Jitter(0.2, until), model, steps // 2, steps) == [None]
    assert set_factors(ds.Jitter(0.2, 1.0), model, steps - 1, steps) != [None]


def test_a_sweep_gives_each_layer_its_turn_and_closes_at_an_even_rate():
    model = three_layers()
    sweep, steps = ds.Sweep(0.5, until=0.6), 1000
    seen = [set_factors(sweep, model, step, steps) for step in range(steps)]
    for step, factors in enumerate(seen):
        for place, ((_, layer), got) in enumerate(zip(learnable_layers(model), factors, strict=True)):
            if not 200 * place <= step < 200 * (place + 1):  # 0.6 * 1000 steps for three layers
                assert got is None
                continue
            exponent = 0.5 - 0.5 * (step - 200 * place) / 200
            assert got == pytest.approx([1 / s**exponent for s in layer.strides[: len(layer.stride)]])
    assert seen[0][0][1] == 1.0  # a stride of 1 hides nothing
    assert seen[200][1] == pytest.approx((0.5,))  # from 4 to its square root


def test_an_open_layer_takes_the_share_of_samples_that_its_larger_map_leaves():
    model = three_layers()
    sweep = ds.Sweep(0.5, until=0.6)
    sizes = {"0": (32, 20), "1": (64,), "2": (200, 100)}
    sweep.set_strides(model, 0, 1000)
    # floor(32/2 + 2) = 18 and, open, floor(32/sqrt(2) + 2) = 24 rows; the columns stay.
    assert sweep.batch_fraction(model, sizes) == pytest.approx(18 / 24)
    assert sweep.batch_fraction(model, {}) == ds.Sweep.LEAST_FRACTION
    assert sweep.batch_fraction(model.eval(), sizes) == 1
    model.train()
    sweep.set_strides(model, 200, 1000)
    assert sweep.batch_fraction(model, sizes) == pytest.approx((64 / 4 + 2) / (64 / 2 + 2))
    sweep.set_strides(model, 400, 1000)
    # (200/9 + 8)(100/9 + 8) over (200/3 + 8)(100/3 + 8)
    assert sweep.batch_fraction(model, sizes) == ds.Sweep.LEAST_FRACTION > 30 * 19 / (74 * 41)
    sweep.set_strides(model, 600, 1000)
    assert sweep.batch_fraction(model, sizes) == 1
    ds.Jitter().set_strides(model, 0, 1000)
    assert ds.Jitter().batch_fraction(model, sizes) == 1


def test_frozen_strides_do_not_take_part():
    model = three_layers()
    model[1].stride.requires_grad_(False)
    assert set_factors(ds.Jitter(), model, 0, 10)[1] is None
    sweep = [set_factors(ds.Sweep(until=0.6), model, step, 10) for step in range(6)]
    assert all(factors[1] is None for factors in sweep)
    assert [next(i for i, f in enumerate(factors) if f) for factors in sweep] == [0, 0, 0, 2, 2, 2]


def tone(cycles, samples=32, count=64):
    """Half of the signals have a tone, all have one that means nothing."""
    generator = torch.Generator().manual_seed(0)
    phases = 2 * math.pi * torch.rand(2, count, 1, generator=generator)
    t = 2 * math.pi * torch.arange(samples) / samples
    labels = torch.arange(count) % 2
    return (torch.cos(2 * t + phases[0]) + labels[:, None] * torch.cos(cycles * t + phases[1]))[:, None], labels


@pytest.mark.parametrize("explored", [False, True])
def test_a_sweep_frees_a_stride_from_a_start_that_sees_nothing(explored):
    """At S = 8 the support is 32/16 + 2 = 4 cycles; the tone is at 7, and a stride up to 3.2 sees it."""
    x, labels = tone(7)
    layer, readout, steps = ds.DiffStride1d(8.0, 2.0), nn.Linear(1, 1), 200
    groups = ds.param_groups(nn.Sequential(layer, readout), 0.1, stride_lr=0.3)
    optimizer = torch.optim.SGD(groups, momentum=0.9)

    def energy():
        return layer(x).square().mean((1, 2))[:, None]

    for step in range(steps):
        if explored:
            ds.Sweep(until=0.7).set_strides(layer, step, steps)
        noisy = energy() + 0.1 * torch.randn(len(x), 1)  # so that an attenuated tone is worth less
        loss = (readout(noisy)[:, 0] - labels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.stride, 1.0)
        optimizer.step()
        ds.clamp_strides_(layer)
    (stride,) = layer.strides
    with torch.no_grad():
        right = (readout(energy())[:, 0] > 0.5).long() == labels
    if explored:
        assert 16 / stride + 2 > 7
        assert right.float().mean() > 0.95
    else:
        assert stride == pytest.approx(8.0, abs=0.3)  # the tone at 2 cycles passes whole: no gradient at all
        assert right.float().mean() < 0.6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ds.Jitter(math.nan), "sigma must be > 0 and <= 10, got nan"),
        (lambda: ds.Jitter(until=0), "until must be > 0 and <= 1, got 0"),
        (lambda: ds.Sweep(1.1), "depth must be > 0 and <= 1, got 1.1"),
        (lambda: ds.Sweep().set_strides(three_layers(), 0, 0), "steps must be >= 1, got 0"),
        (lambda: ds.Sweep().set_strides(lost(), 0, 10), r"stride must be finite, got nan, nan in DiffStride2d\("),
        (lambda: ds.DiffStride2d().set_stride_scale((1.0,)), "factors must have 2 entries"),
        (lambda: ds.DiffStride2d().set_stride_scale((1.0, 0.0)), "factors must be > 0 and finite, got 1, 0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mistake_leaves_the_jitter_as_it_was():
    layer = ds.DiffStride2d()
    layer.set_stride_scale((1.5, 1.2))
    with pytest.raises(ValueError, match="factors"):
        layer.set_stride_scale((1.0, -1.0))
    assert layer.stride_scale == (1.5, 1.2)
    with pytest.raises(TypeError, match="sigma must be a number"):
        ds.Jitter("much")


def lost():
    layer = ds.DiffStride2d()
    layer.stride.data.fill_(math.nan)
    return layer


def test_a_backward_pass_may_wait_until_other_factors_are_set():
    layer = ds.DiffStride2d(2.0, 1.0)
    x = torch.randn(1, 1, 20, 20)
    layer.set_stride_scale((0.8, 1.2))
    (expected,) = torch.autograd.grad(layer(x).square().sum(), layer.stride)
    loss = layer(x).square().sum()
    layer.set_stride_scale((1.3, 0.7))
    (got,) = torch.autograd.grad(loss, layer.stride)
    assert torch.equal(got, expected)
    with torch.inference_mode():
        layer.set_stride_scale((0.8, 1.2))
    assert torch.equal(torch.autograd.grad(layer(x).square().sum(), layer.stride)[0], expected)


def test_parametrized_strides_have_factors_of_their_own():
    model = nn.Sequential(*[ds.DiffStride2d(2.0, 1.0) for _ in range(4)])
    for layer in model:
        nn.utils.parametrize.register_parametrization(layer, "stride", nn.Identity())
    ds.Jitter().set_strides(model, 0, 10)
    assert len({layer.stride_scale for layer in model}) == 4
    assert list(ds.strides(model)) == ["0", "1", "2", "3"]


@pytest.mark.filterwarnings("ignore")  # torch's own, when it imports its compiler
def test_a_compiled_model_draws_what_it_draws_uncompiled():
    model = three_layers()
    plain = set_factors(ds.Jitter(), model, 2, 10)
    assert set_factors(ds.Jitter(), torch.compile(model), 2, 10) == plain


def test_every_layer_of_a_converted_model_explores_and_branches_still_meet():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.shortcut = nn.Conv2d(3, 4, 1, stride=2)
            self.after = nn.Conv2d(4, 4, 3, stride=2, padding=1)

        def forward(self, x):
            return self.after((self.main(x) + self.shortcut(x)).relu()).mean((-2, -1))

    model, x = Residual(), torch.randn(2, 3, 33, 30)
    ds.convert(model, x)
    jitter, sweep = ds.Jitter(0.3), ds.Sweep()
    shapes = set()
    for exploration, step in itertools.product((jitter, sweep), range(12)):
        exploration.set_strides(model, step, 20)
        assert model.main.stride_scale == model.shortcut.stride_scale
        assert model(x).shape == (2, 4)
        shapes.add(model.main(x).shape)
    assert len(shapes) > 4


def test_factors_that_one_layer_refuses_change_no_layer():
    class Faulty(ds.Exploration):
        def factors(self, context):
            return [1.5] * len(context.strides) if context.index == 0 else [-1.0]

    model = nn.Sequential(ds.DiffStride2d(2.0), ds.DiffStride2d(2.0))
    with pytest.raises(ValueError, match=r"factors must have 2 entries"):
        Faulty().set_strides(model, 0, 10)
    assert [layer.stride_scale for layer in model] == [None, None]
