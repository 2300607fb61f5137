"""A warning for an optimizer that was made before a conversion, and so does not have the strides."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from diffstride.nn.learnable import LearnableStrides


class _Watch:
    """The layers of a model until an optimizer has their strides."""

    def __init__(self, model: nn.Module, layers: Sequence[LearnableStrides]) -> None:
        # References to layers: torch does not swap parameters that have one.
        self.layers = [weakref.ref(layer) for layer in layers]
        self.weights = {id(parameter) for parameter in model.parameters()} - {id(stride) for stride in self.present}
        self.before: dict[int, int] = {}
        """The versions of strides that had a gradient at the last step."""

    @property
    def present(self) -> list[nn.Parameter]:
        """The strides, none if the model is gone."""
        layers = [layer for ref in self.layers if (layer := ref()) is not None]
        alive = len(layers) == len(self.layers)
        return [stride for layer in layers for stride in layer.stride_parameters] if alive else []

    def ends(self, optimizer: Optimizer) -> bool:
        """Return whether a step of an optimizer ends the watch, with a warning if strides did not move."""
        present = self.present
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not present or any(id(stride) in own for stride in present):
            return True
        versions = {id(s): s._version for s in present if s.grad is not None} if own & self.weights else {}
        still = any(self.before.get(key) == version for key, version in versions.items())
        self.before |= versions
        if still:
            warnings.warn(
                "strides have a gradient and do not move: make the optimizer after convert or insert", stacklevel=5
            )
        return still


_watches: list[_Watch] = []


def warn_of_missing_strides(model: nn.Module, layers: Sequence[LearnableStrides]) -> None:
    """Warn once if strides have a gradient and do not move between two steps of an optimizer of the model's weights."""
    _install()
    _watches[:] = [*(watch for watch in _watches if watch.present), _Watch(model, layers)]


@lru_cache(maxsize=1)
def _install() -> None:
    register_optimizer_step_post_hook(_check)  # for good: torch does not let a hook remove itself


def _check(optimizer: Optimizer, *_: Any) -> None:
    _watches[:] = [watch for watch in _watches if not watch.ends(optimizer)]
