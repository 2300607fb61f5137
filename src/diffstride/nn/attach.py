"""Attach a layer to a module, which keeps its class, its place, its parameters' names and its attributes."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

CHILD = "diffstride"
Placement = Literal["after", "before"]
"""The order of a convolution or pooling and its downsampling layer: the layer comes after it, or before it."""


def attach(module: nn.Module, layer: nn.Module, placement: Placement = "after") -> None:
    """Apply `layer` to the output of `module` from now on (or to its input), as the child `module.diffstride`.

    Raises:
        ValueError: the module has an attribute of that name.
    """
    if hasattr(module, CHILD):
        raise ValueError(f"module must not have an attribute {CHILD!r} yet, got one in {type(module).__name__}")
    module.add_module(CHILD, layer)
    if placement == "before":
        module.register_forward_pre_hook(_on_input)
    else:
        module.register_forward_hook(_on_output, prepend=True)  # hooks of the owner see the layer's output


def attached(module: nn.Module) -> nn.Module | None:
    """Return the layer that `attach` put before or after the module, or None."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return module._modules.get(CHILD) if any(map(is_attachment, hooks)) else None


def placement_of(module: nn.Module) -> Placement:
    """Return on which side of the module its attached layer is."""
    return "before" if _on_input in module._forward_pre_hooks.values() else "after"


def is_attachment(hook: Any) -> bool:
    """Return whether a hook calls an attached layer."""
    return hook is _on_input or hook is _on_output


def _on_input(module: nn.Module, args: tuple[Any, ...]) -> Any:
    return module._modules[CHILD](*args)  # type: ignore[misc]


def _on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return module._modules[CHILD](output)  # type: ignore[misc]
