"""Support for torch's tracers: a layer is a leaf for `torch.fx`, and `torch.jit` is refused."""

from __future__ import annotations

from typing import Any, Self

from torch import fx, nn

from diffstride._validation import FREEZE_FIRST
from diffstride.errors import UsageError


def is_proxy(x: object) -> bool:
    """Return whether `torch.fx` is tracing with `x` as a tensor."""
    return isinstance(x, fx.Proxy)


class Traceable(nn.Module):
    """The base of all layers, whose `forward` no tracer enters."""

    def as_leaf(self, x: Any) -> Any:
        """Return the node of a `torch.fx` graph that calls this layer, as it calls those of `torch.nn`."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def __prepare_scriptable__(self) -> Self:
        """Refuse `torch.jit.script`, which calls this method."""
        raise UsageError(
            f"torch.jit cannot compile {type(self).__name__}, whose sizes follow from strides: {FREEZE_FIRST}"
        )
