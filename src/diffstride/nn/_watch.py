"""Keeps the output sizes that compiled graphs rely on true after every optimizer step."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol
from weakref import WeakSet

from torch.optim.optimizer import register_optimizer_step_post_hook


class HasSizes(Protocol):
    """A layer whose sizes follow from a parameter."""

    def refresh_sizes(self) -> None:
        """Settle them anew."""


_watched: WeakSet[Any] = WeakSet()


def watch(layer: HasSizes) -> None:
    """From now on refresh the layer's sizes after each step of any optimizer, as long as the layer lives."""
    _install()
    _watched.add(layer)


@lru_cache(maxsize=1)  # once per process, and not on import
def _install() -> None:
    register_optimizer_step_post_hook(_refresh)


def _refresh(*_: Any) -> None:
    for layer in list(_watched):
        layer.refresh_sizes()
