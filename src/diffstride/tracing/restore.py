"""Restore a model and the random states after a run."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module, *, only_on_error: bool = False) -> Iterator[None]:
    """Restore the random states and the model at the end: modules, parameters, buffers, hooks, mode.

    Attributes become what they were, and containers among them hold what they held. Tensors are not copied.

    Args:
        model: any module.
        only_on_error: restore the model only if an exception is raised inside.
    """
    saved = [(m, dict(vars(m)), [_contents(value) for value in vars(m).values()]) for m in model.modules()]
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    succeeded = False
    try:
        with torch.random.fork_rng(gpus):
            yield
        succeeded = True
    finally:
        for module, attributes, contents in saved if not (succeeded and only_on_error) else ():
            vars(module).clear()
            vars(module).update(attributes)
            _restore(contents)
        random.setstate(python)
        if numpy:
            numpy.random.set_state(numpy_state)


def _contents(value: Any, depth: int = 3) -> Any:
    """Return a container, a copy of it, and the same for the containers in it; None for anything else."""
    if depth == 0 or not isinstance(value, (dict, list, set)):
        return None
    inner = value.values() if isinstance(value, dict) else value
    return value, value.copy(), [_contents(v, depth - 1) for v in inner]


def _restore(contents: list[Any]) -> None:
    for container, copied, inner in filter(None, contents):
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(copied)
        _restore(inner)
