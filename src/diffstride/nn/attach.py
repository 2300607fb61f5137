"""Attach a layer to a module, which keeps its class, its place, its parameters' names and its attributes."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

Placement = Literal["after", "before"]
"""The order of a convolution or pooling and its downsampling layer: the layer comes after it, or before it."""
CHILDREN: dict[Placement, str] = {"after": "diffstride", "before": "diffstride_before"}
"""The names of attached layers."""


def attach(module: nn.Module, layer: nn.Module, placement: Placement = "after") -> None:
    """Apply `layer` to the output of `module` from now on, or to its input.

    The layer becomes the child `diffstride` or `diffstride_before`. An `nn.Sequential` calls its children itself and
    needs one more child alone.

    Raises:
        ValueError: the module has an attribute of that name.
    """
    child = CHILDREN[placement]
    if hasattr(module, child):
        raise ValueError(f"module must not have an attribute {child!r} yet, got one in {type(module).__name__}")
    module.add_module(child, layer)
    if isinstance(module, nn.Sequential):
        assert placement == "after"
    elif placement == "before":
        module.register_forward_pre_hook(_on_input)
    else:
        module.register_forward_hook(_on_output, prepend=True)  # hooks of the owner see the layer's output


def attached(module: nn.Module, placement: Placement = "after") -> nn.Module | None:
    """Return the layer that `attach` put after or before the module, or None."""
    hooks = module._forward_hooks if placement == "after" else module._forward_pre_hooks
    called = isinstance(module, nn.Sequential) or any(map(is_attachment, hooks.values()))
    return module._modules.get(CHILDREN[placement]) if called else None


def is_attachment(hook: Any) -> bool:
    """Return whether a hook calls an attached layer."""
    return hook is _on_input or hook is _on_output


def _on_input(module: nn.Module, args: tuple[Any, ...]) -> Any:
    return module._modules["diffstride_before"](*args)  # type: ignore[misc]


def _on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return module._modules["diffstride"](output)  # type: ignore[misc]
