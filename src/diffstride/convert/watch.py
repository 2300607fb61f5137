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


class _Watch:
    """The strides of a model until an optimizer has moved them."""

    def __init__(self, model: nn.Module, strides: Sequence[nn.Parameter]) -> None:
        self.strides = [weakref.ref(stride) for stride in strides]
        self.ids = {id(stride) for stride in strides}
        self.weights = {id(parameter) for parameter in model.parameters()} - self.ids
        self.before: dict[int, int] = {}
        """The versions of strides that had a gradient at the last step."""

    @property
    def present(self) -> list[nn.Parameter]:
        """The strides, none if the model is gone."""
        present = [stride for ref in self.strides if (stride := ref()) is not None]
        return present if len(present) == len(self.strides) else []

    def ends(self, optimizer: Optimizer) -> bool:
        """Return whether a step of an optimizer ends the watch, with a warning if strides did not move."""
        present = self.present
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not present or own & self.ids:
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


def warn_of_missing_strides(model: nn.Module, strides: Sequence[nn.Parameter]) -> None:
    """Warn once if strides have a gradient and do not move between two steps of an optimizer of the model's weights."""
    _install()
    _watches[:] = [*(watch for watch in _watches if watch.present), _Watch(model, strides)]


@lru_cache(maxsize=1)
def _install() -> None:
    register_optimizer_step_post_hook(_check)  # for good: torch does not let a hook remove itself


def _check(optimizer: Optimizer, *_: Any) -> None:
    _watches[:] = [watch for watch in _watches if not watch.ends(optimizer)]
