"""An optimizer that was made before a conversion does not have the strides."""

import gc
import warnings

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride.convert import watch

X = torch.randn(2, 3, 16, 16)


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1))


def train(model, *optimizers, steps=3):
    for step in range(steps):
        model.zero_grad()
        model(X).square().mean().backward()
        optimizers[step % len(optimizers)].step()


@pytest.fixture(autouse=True)
def no_watch_is_left():
    """The next step of any optimizer, or the next conversion, ends those of models that are gone."""
    before = list(watch._watches)
    yield
    gc.collect()
    torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1).step()
    assert set(watch._watches) <= set(before)


@pytest.mark.parametrize("change", [ds.convert, ds.insert])
def test_strides_that_an_earlier_optimizer_lacks_are_noticed_once(change):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    change(model, X)
    train(model, optimizer, steps=1)
    with pytest.warns(UserWarning, match="strides have a gradient and do not move"):
        train(model, optimizer, steps=1)
    with warnings.catch_warnings(action="error"):
        train(model, optimizer)


def test_strides_that_move_are_no_reason_for_a_warning():
    """In one optimizer, in two of which each has a part, held, or in a model whose optimizer steps more often."""
    with warnings.catch_warnings(action="error"):
        model = small()
        ds.convert(model, X)
        train(model, torch.optim.SGD(ds.param_groups(model, 0.1)))

        model = small()
        weights = torch.optim.SGD(model.parameters(), lr=0.1)
        ds.convert(model, X)
        strides = torch.optim.Adam([p for name, p in model.named_parameters() if "stride" in name])
        train(model, weights, strides, steps=6)

        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ds.insert(model, X, window="hard")  # found by measured losses
        train(model, optimizer)

        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ds.convert(model, X)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("stride" not in name)
        train(model, optimizer)
        del model

        model, other = small(), small()
        ds.convert(model, X)
        model(X).sum().backward()
        train(other, torch.optim.SGD(other.parameters(), lr=0.1))
