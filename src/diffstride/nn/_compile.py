"""Refresh the output sizes that compiled graphs rely on after every optimizer step."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from diffstride.nn.learnable import LearnableStrides


_watched: WeakSet[LearnableStrides] = WeakSet()


def watch(layer: LearnableStrides) -> None:
    """Refresh the layer's sizes after each step of any optimizer, as long as the layer lives."""
    _install()
    _watched.add(layer)


@lru_cache(maxsize=1)  # once per process, and not on import
def _install() -> None:
    register_optimizer_step_post_hook(_refresh)


def _refresh(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    written = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in list(_watched):
        if any(id(p) in written for p in layer.parameters()):
            layer.refresh_sizes()


def refresh_sharers(layer: LearnableStrides) -> None:
    """Refresh every watched layer that has the stride of this one."""
    for other in list(_watched):
        if other.stride_id == layer.stride_id:
            other.refresh_sizes()
