"""Answers to torch's tracers: a layer is a leaf for `torch.fx`, and `torch.jit` is referred to `diffstride.freeze`."""

from __future__ import annotations

from typing import Any, Self

from torch import fx, nn

from diffstride._validation import FREEZE_FIRST
from diffstride.errors import UsageError


def is_proxy(x: object) -> bool:
    """Return whether `torch.fx` is tracing, and `x` stands for a tensor to come."""
    return isinstance(x, fx.Proxy)


class Traceable(nn.Module):
    """Base of the layers, whose `forward` no tracer needs to see inside."""

    def as_leaf(self, x: Any) -> Any:
        """Return the node of a `torch.fx` graph that calls this layer, as it calls those of `torch.nn`."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def __prepare_scriptable__(self) -> Self:
        """Refuse `torch.jit.script`, which asks for a stand-in here."""
        raise UsageError(
            f"torch.jit cannot compile {type(self).__name__}, whose sizes follow from strides: {FREEZE_FIRST}"
        )
