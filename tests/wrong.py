"""What is asked of every answer to wrong input: used by tests/test_wrong_*.py."""

import importlib
import inspect
import traceback
from pathlib import Path

import pytest
import torch

import diffstride

SOURCE = Path(diffstride.__file__).parent


def public(rooms):
    """What users are offered to call, by name: what `__all__` lists, or what is defined there without an underscore.

    Left out: errors, which nobody makes but the library; named tuples, which are results; modules.
    """
    found = {}
    for room in map(importlib.import_module, rooms):
        for name in getattr(room, "__all__", vars(room)):
            value = getattr(room, name)
            if not inspect.isfunction(value) and not inspect.isclass(value):
                continue
            if inspect.isclass(value) and issubclass(value, (Exception, tuple)):
                continue
            if hasattr(room, "__all__") or (value.__module__ == room.__name__ and not name.startswith("_")):
                found.setdefault(value, f"{room.__name__}.{name}".removeprefix("diffstride."))
    return {name: value for value, name in found.items()}


def state(model):
    """Everything about a model that a failed call could have changed."""
    modules = [
        (name, type(m), m.training, {k: len(v) for k, v in vars(m).items() if k.endswith("_hooks")}, m.extra_repr())
        for name, m in model.named_modules()
    ]
    return modules, {k: v.clone() for k, v in model.state_dict().items()}, [p.grad for p in model.parameters()]


def same(before, after):
    modules, values, grads = before
    return (
        modules == after[0]
        and values.keys() == after[1].keys()
        and all(torch.equal(v.nan_to_num(-1), after[1][k].nan_to_num(-1)) for k, v in values.items())
        and grads == after[2]
    )


def content(folder):
    """All names below a folder, with the bytes of those that are files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def without_bars(said):
    """What was said on stderr; rich before 14.3 ends a progress bar that nobody sees with an empty line there."""
    return said.lstrip("\n")


def refuses(call, error, message, tmp_path, models):
    """`call` is answered by one line, said by the library itself; nothing is changed, on disk or in `models`.

    A call that takes an argument is given a folder that has a file, `file`, and a folder, `full`.
    """
    folder = tmp_path / "folder"
    (folder / "full").mkdir(parents=True)
    (folder / "file").write_bytes(b"what was there")
    files = content(tmp_path)
    before = {name: state(model) for name, model in models.items()}
    with pytest.raises(error, match=message) as caught:
        call(*[folder] * len(inspect.signature(call).parameters))
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 400
    assert Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename).is_relative_to(SOURCE)
    assert content(tmp_path) == files
    for name, model in models.items():
        assert same(before[name], state(model)), f"{name} was changed"
