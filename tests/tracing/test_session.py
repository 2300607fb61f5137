"""Tracing: shapes are expressions that hold at other sizes, and a model is left exactly as found."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride import tracing
from diffstride.errors import UsageError
from tests.helpers import zoo
from tests.helpers.states import random_states, record, same


class Unruly(nn.Module):
    """A forward that writes to all attributes, draws random numbers of every kind, and may fail at the end."""

    def __init__(self, fails=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.drop, self.last = nn.Dropout(0.5), ds.DiffStride2d(2.0)
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.table, self.window, self.fails = [1], {"a": 1}, 7, fails
        self.plain = torch.zeros(3)
        self.conv.register_forward_hook(lambda *_: None)
        self.conv.register_forward_pre_hook(lambda *_: None)
        self.register_forward_hook(lambda *_: None)

    def forward(self, x):
        self.calls += 1
        self.calls = self.calls + 1
        self.seen.append(x.shape)
        self.table["b"] = x.shape[-1]
        self.window = min(self.window, x.shape[-1])
        self.plain = self.plain + 1
        self.new = x
        self.spare = nn.Linear(3, 3)
        self.conv.register_forward_hook(lambda *_: None)
        self.norm.momentum = 0.9
        self.norm.eval()
        random.random()
        np.random.rand()  # noqa: NPY002
        x = self.drop(self.norm(self.conv(x))) + torch.randn(())
        x = self.last(x)
        if self.fails:
            raise RuntimeError("late")
        return x


def unruly(fails):
    model = Unruly(fails)
    model.train()
    model.norm.eval()
    model.last.eval()
    return model


@pytest.mark.parametrize("measure", ["macs", "memory"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_left_exactly_as_found(fails, measure):
    model = unruly(fails)
    before, x = record(model), torch.randn(2, 3, 16, 16)
    drawn = random_states()
    if fails:
        with pytest.raises(UsageError, match=r"the model itself \(Unruly\) raised RuntimeError: late"):
            ds.CostModel(model, x, measure=measure)
    else:
        ds.CostModel(model, x, measure=measure).baseline()
    assert same(record(model), before)
    assert same(random_states(), drawn)
    assert model.seen == [1]
    assert model.table == {"a": 1}
    assert not hasattr(model, "new")
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_planning_leaves_a_model_exactly_as_found(fails):
    model = unruly(fails)
    x, model.last = torch.randn(2, 3, 16, 16), nn.Identity()
    before, drawn = record(model), random_states()
    if fails:
        with pytest.raises(UsageError, match="late"):
            ds.plan(model, x)
    else:
        assert ds.plan(model, x).groups == [["conv"]]
    assert same(record(model), before)
    assert same(random_states(), drawn)


@pytest.mark.long
def test_swins_windows_are_as_before():
    model, inputs = zoo.CASES["swin"].build().train(), zoo.CASES["swin"].inputs(0)
    before = record(model)
    ds.plan(model, inputs)
    assert same(record(model), before)


def symbols_of(session):
    return {key: symbol for symbol, key in session.keys.items() if key[0] == "input"}


TRACED = ["resnet", "convnext", "regnet", "efficientnet", "wav2vec2", "vgg", "densenet", "inception", "unet",
          "resnet-d", "unet-transposed", "resnet-3d", "audio-1d"]  # fmt: skip


@pytest.mark.parametrize("name", TRACED)
def test_shapes_are_expressions_that_hold_at_other_sizes(name):
    """The trace is at inputs(0); its shapes are evaluated at inputs(1) and compared with those of the real model."""
    model, case = zoo.CASES[name].build().eval(), zoo.CASES[name]
    session = tracing.run(model, tracing.ExampleInputs.of(case.inputs(0)), lambda *_: None, symbolic_inputs=True)
    (given,) = case.inputs(1).values() if isinstance(case.inputs(1), dict) else (case.inputs(1),)
    fixed = min(2, given.ndim - 1)
    values = {symbol: given.shape[fixed + axis] for (_, _, axis), symbol in symbols_of(session).items()}
    assert len(values) == given.ndim - fixed
    evaluate = lambda shape: tuple(int(session.expanded(n).xreplace(values)) for n in shape)
    predicted = [(call.module, evaluate(call.output)) for call in session.calls if call.output is not None]
    real = []
    names = {module: n for n, module in model.named_modules()}
    hook = lambda module, args, output: (
        real.append((names[module], tuple(output.shape))) if isinstance(output, torch.Tensor) else None
    )
    for module in names:
        module.register_forward_hook(hook)
    with torch.no_grad():
        zoo.bare_call(model, case.inputs(1))
    assert predicted == real
    assert len({shape[-1] for _, shape in real}) > 2


@dataclass
class Result:
    logits: torch.Tensor
    maps: list


class Particular(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.head = ds.DiffStride2d(2.0, window="inner"), nn.Conv2d(3, 5, 1)

    def forward(self, images, *, masks=None, options):
        y = self.head(self.down(images["left"] if options["side"] == "left" else images["right"]))
        return Result(y, [y, None if masks is None else masks])


@pytest.mark.parametrize("side", ["left", "right"])
def test_positional_and_keyword_arguments_and_outputs_of_any_kind(side):
    images = {"left": torch.randn(1, 3, 8, 8), "right": torch.randn(1, 3, 16, 12)}
    example = ds.ExampleInputs(images, masks=torch.ones(1), options={"side": side})
    cost = ds.CostModel(Particular(), example)
    resampling = {"left": 4 * 8 * 8 + 4 * 8 * 4, "right": 8 * 16 * 12 + 8 * 12 * 6}[side]
    assert cost.exact() == {"left": 4 * 4, "right": 8 * 6}[side] * 15 + 3 * resampling
    named = {"images": images, "options": {"side": side}}
    assert ds.CostModel(Particular(), named).exact() == cost.exact()


class Decides(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_code_that_looks_at_values_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Sequential(nn.ReLU(), Decides()))
    for call in (ds.plan, ds.convert, ds.CostModel):
        with pytest.raises(
            UsageError, match=r"must not decide by the values of tensors, 1\.1 \(Decides\) does"
        ) as caught:
            call(model, torch.randn(1, 3, 8, 8))
        assert "\n" not in str(caught.value)


class LayerDrop(nn.Module):
    """A model that drops layers as the speech models of transformers do."""

    def __init__(self, probability):
        super().__init__()
        self.down, self.layer, self.probability = ds.DiffStride1d(2.0, window="inner"), nn.Conv1d(3, 3, 3), probability

    def forward(self, x):
        x = self.down(x)
        dropped = self.training and torch.rand([]) < self.probability
        return x if dropped else self.layer(x)


def test_layers_that_a_random_number_drops_count_as_if_none_were():
    x = torch.randn(2, 3, 40)
    cost = ds.CostModel(LayerDrop(0.999), x, measure="memory")
    assert cost.exact() == zoo.saved_bytes(LayerDrop(0.0), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).to(dtype)
    x = torch.randn(2, 3, 16, 16, dtype=dtype)
    plan = ds.convert(model, x)
    assert plan.groups == [["0"]]
    memory, macs = ds.CostModel(model, x, measure="memory"), ds.CostModel(model, x)
    assert macs.exact() == plan.macs_after == zoo.products(model, x)[0][""]
    assert memory.exact() == zoo.saved_bytes(model, x)
    assert model[0].weight.dtype == dtype


def test_lazy_modules_must_have_run():
    model = nn.Sequential(nn.LazyConv2d(4, 3, 2), nn.ReLU())
    with pytest.raises(UsageError, match="model must have been run once: it has a lazy module without shapes"):
        ds.plan(model, torch.randn(1, 3, 8, 8))
    assert isinstance(model[0], nn.LazyConv2d)
    model(torch.randn(1, 3, 8, 8))
    assert ds.plan(model, torch.randn(1, 3, 8, 8)).groups == [["0"]]
