"""Checks of the error that a mistake raises."""

import traceback
from pathlib import Path

import pytest
import torch

import diffstride

SOURCE = Path(diffstride.__file__).parent


def state(model):
    """Return everything about a model that a failed call could have changed."""
    modules = [
        (name, type(m), m.training, {k: len(v) for k, v in vars(m).items() if k.endswith("_hooks")}, m.extra_repr())
        for name, m in model.named_modules()
    ]
    return modules, {k: v.clone() for k, v in model.state_dict().items()}, [p.grad for p in model.parameters()]


def same(before, after):
    """Return whether two states of a model are equal."""
    modules, values, grads = before
    return (
        modules == after[0]
        and values.keys() == after[1].keys()
        and all(torch.equal(v.nan_to_num(-1), after[1][k].nan_to_num(-1)) for k, v in values.items())
        and grads == after[2]
    )


def content(folder):
    """Return all names below a folder, with the bytes of those that are files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def without_bars(text):
    """Return stderr without the empty line with which rich before 14.3 ends an invisible progress bar."""
    return text.lstrip("\n")


def refuses(call, names, folder, models):
    """Check that a call raises one line of the library's own that has all `names`, and changes nothing.

    The files of the folder, the models and the state of the random numbers stay as they are.
    """
    files, random = content(folder), torch.get_rng_state()
    before = [state(model) for model in models]
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert all(name in message for name in names), message
    assert Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename).is_relative_to(SOURCE)
    assert content(folder) == files
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(same, before, map(state, models)))
