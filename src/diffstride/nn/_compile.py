"""Refresh the output sizes that compiled graphs rely on after every optimizer step."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from diffstride import _graph

if TYPE_CHECKING:
    from diffstride.nn.learnable import LearnableStrides


@lru_cache(maxsize=1)  # once per process, and not on import
def refresh_after_steps() -> None:
    """Refresh the sizes in graphs after each step of an optimizer that has a parameter of one of their layers."""
    register_optimizer_step_post_hook(_refresh)


def _refresh(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    written = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers: list[Any] = _graph.layers()
    _graph.refresh([layer for layer in layers if any(id(p) in written for p in layer.parameters())])


def refresh_sharers(layer: LearnableStrides) -> None:
    """Refresh the sizes in the graphs of every layer that has the stride of this one."""
    layers: list[Any] = _graph.layers()
    _graph.refresh([other for other in layers if other.stride_id == layer.stride_id])
