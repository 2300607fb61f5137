"""A warning for an optimizer that was made before a conversion, and so does not have the strides."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from diffstride.nn.learnable import LearnableStrides


def warn_of_missing_strides(model: nn.Module, layers: Sequence[LearnableStrides]) -> None:
    """Warn once if strides have a gradient and do not move between two steps of an optimizer of the model's weights."""
    # References to layers: torch does not swap parameters that have one. They are cleared where the watch ends.
    references = [weakref.ref(layer) for layer in layers]
    weights = {id(p) for p in model.parameters()} - {id(s) for layer in layers for s in layer.stride_parameters}
    before: dict[int, int] = {}  # the versions of strides that had a gradient at the last step

    def check(optimizer: Optimizer, *_: Any) -> None:
        if not references:
            return
        alive = [layer for reference in references if (layer := reference()) is not None]
        strides = [stride for layer in alive for stride in layer.stride_parameters]
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if len(alive) < len(references) or any(id(stride) in own for stride in strides):
            references.clear()
        elif own & weights:
            versions = {id(s): s._version for s in strides if s.grad is not None}
            if any(before.get(key) == version for key, version in versions.items()):
                references.clear()
                message = "strides have a gradient and do not move: make the optimizer after convert or insert"
                warnings.warn(message, stacklevel=3)
            before.update(versions)

    register_optimizer_step_post_hook(check)
