"""Models that cannot be converted: a message names the module and the cure, and the model stays as it was."""

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride.errors import UsageError
from tests.helpers import zoo
from tests.helpers.states import random_states, record, same
from tests.helpers.zoo import block, head

ESSENCE = {
    "flatten-at-once": [r"0\.0: .*2 \(Linear\)", "2048"],
    "functional-pooling": ["FunctionalPooling", "max_pool2d", r"in its own code", r"nn\.MaxPool2d"],
    "no-downsampling": ["model must have a downsampling that can be converted", "got none"],
}


@pytest.mark.parametrize("call", [ds.plan, ds.convert])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", zoo.BROKEN)
def test_the_error_names_the_reason_and_nothing_changes(name, training, call):
    model = zoo.BROKEN[name].build().train(training)
    next(model.modules()).register_forward_hook(lambda *_: None)
    next(model.children()).train(not training)
    x = zoo.BROKEN[name].inputs(0)
    before, drawn = record(model), random_states()
    with pytest.raises(UsageError) as caught:
        call(model, x)
    for essence in ESSENCE[name]:
        caught.match(essence)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert same(record(model), before)
    assert same(random_states(), drawn)


def test_the_reason_comes_first_and_a_shape_is_no_input():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4 * 64, 5))
    with pytest.raises(
        UsageError, match=r"^0: its map must keep its size for 2 \(Linear\).*256.*no other downsampling"
    ):
        ds.convert(model, torch.zeros(2, 3, 16, 16))
    for shape in (2, 3, 16, 16), [2, 3, 16, 16]:
        for call in ds.plan, ds.insert, ds.CostModel:
            with pytest.raises(UsageError, match=r"got the shape \(2, 3, 16, 16\): try torch.zeros\(2, 3, 16, 16\)"):
                call(model, shape)


def test_a_model_is_converted_once():
    model, x = zoo.vgg(), torch.randn(2, 3, 32, 32)
    ds.convert(model, x)
    before = record(model)
    with pytest.raises(UsageError, match="its strides are learned already"):
        ds.convert(model, x)
    assert same(record(model), before)


def test_the_rest_of_a_model_is_converted_later():
    model, x = zoo.vgg(), torch.randn(2, 3, 32, 32)
    first = ds.convert(model, x, include="2")
    second = ds.convert(model, x)
    assert (first.groups, second.groups) == ([["2"]], [["5"], ["8"]])
    assert second.macs_before == first.macs_after
    assert len(ds.strides(model)) == 3
    assert model(torch.randn(2, 3, 45, 27)).isfinite().all()


class Named(nn.Module):
    """A model whose pooling already has an attribute of the name `diffstride`."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.pool.diffstride = 3
        self.conv, self.head = block(3, 8, 3, 2), nn.Sequential(*head(8))

    def forward(self, x):
        return self.head(self.pool(self.conv(x)))


def test_a_failure_half_way_is_undone():
    model, x = Named(), torch.randn(2, 3, 32, 32)
    before = record(model)
    for call in (ds.plan, ds.convert):
        with pytest.raises(ValueError, match="must not have an attribute 'diffstride'"):
            call(model, x)
        assert same(record(model), before)
    del model.pool.diffstride
    plan = ds.plan(model, x)
    other = Named()
    before = record(other)
    with pytest.raises(UsageError, match="model cannot be converted: module must not have an attribute 'diffstride'"):
        plan.apply(other)
    assert same(record(other), before)


class Asks(nn.Module):
    """A model whose code asks for the class or the children of its convolution."""

    def __init__(self, known):
        super().__init__()
        self.conv, self.head, self.known = nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(*head(8)), known

    def forward(self, x):
        if not self.known(self.conv):
            raise RuntimeError("conv must be a Conv2d")
        return self.head(self.conv(x))


def test_a_model_that_asks_for_its_convolutions_keeps_them():
    model, x = Asks(lambda conv: isinstance(conv, nn.Conv2d)), torch.randn(2, 3, 32, 32)
    conv = model.conv
    (site,) = ds.convert(model, x).sites
    assert not site.fused
    assert model.conv is conv
    assert model.conv(x).shape[-2:] == (16, 16)
    conv.diffstride.stride.data.fill_(4.0)
    assert model.conv(x).shape[-2:] == (8, 8)


def test_a_converted_model_that_does_not_run_is_not_made():
    model, x = Asks(lambda conv: type(conv) is nn.Conv2d and not list(conv.children())), torch.randn(2, 3, 32, 32)
    before = record(model)
    with pytest.raises(
        UsageError, match=r"cannot run the example: .*\(Asks\) raised RuntimeError: conv must be a Conv2d"
    ):
        ds.convert(model, x)
    assert same(record(model), before)
