"""Attach a layer after a module, which keeps its class, its place, its parameters' names and its attributes."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

CHILD = "diffstride"
Placement = Literal["after", "before"]
"""The order of a convolution or pooling and its downsampling layer: the layer comes after it, or before it."""


def attach(module: nn.Module, layer: nn.Module) -> None:
    """Apply `layer` to the output of `module` from now on, as the child `module.diffstride`.

    Raises:
        ValueError: the module has an attribute of that name.
    """
    if hasattr(module, CHILD):
        raise ValueError(f"module must not have an attribute {CHILD!r} yet, got one in {type(module).__name__}")
    module.add_module(CHILD, layer)
    module.register_forward_hook(_then, prepend=True)  # before hooks of the owner, which see the layer's output


def attached(module: nn.Module) -> nn.Module | None:
    """Return the layer that `attach` put after the module, or None."""
    layer = module._modules.get(CHILD)
    return layer if _then in module._forward_hooks.values() else None


def _then(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return module._modules[CHILD](output)  # type: ignore[misc]
