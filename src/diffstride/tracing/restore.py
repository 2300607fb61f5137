"""Restore a model and the random states after a run."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

if TYPE_CHECKING:
    import sympy

    Expr: TypeAlias = sympy.Expr


@contextmanager
def preserved(model: nn.Module, *, unless_it_succeeds: bool = False) -> Iterator[None]:
    """Put the random state and the model back afterwards: modules, parameters, buffers, hooks, mode.

    Attributes are put back as they were, and containers among them with what they held; tensors are not copied.

    Args:
        model: any module.
        unless_it_succeeds: put the model back only where something is raised inside.
    """
    saved = [(m, dict(vars(m)), {k: _contents(v) for k, v in vars(m).items()}) for m in model.modules()]
    python, cpu = random.getstate(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    numpy = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy else None
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        for module, attributes, contents in saved if not (succeeded and unless_it_succeeds) else ():
            vars(module).clear()
            vars(module).update(attributes)
            for held in contents.values():
                if held:
                    _put_back(held)
        random.setstate(python)
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state_all(gpu)
        if numpy:
            numpy.random.set_state(of_numpy)


def _contents(value: Any, depth: int = 3) -> Any:
    """A container's contents, with those of the containers in it: `(container, copy, [contents ...])`."""
    if depth == 0 or not isinstance(value, (dict, list, set)):
        return None
    inner = value.values() if isinstance(value, dict) else value
    return value, value.copy(), [held for held in (_contents(v, depth - 1) for v in inner) if held]


def _put_back(held: Any) -> None:
    container, copied, inner = held
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(copied)
    for contents in inner:
        _put_back(contents)
