"""A layer after a module that stays what and where it is: parameters keep their names, readers their attributes."""

from __future__ import annotations

from typing import Any

from torch import nn

CHILD = "diffstride"


def attach(module: nn.Module, layer: nn.Module) -> None:
    """From now on `layer` takes what `module` returns; it becomes the child `module.diffstride`.

    Raises:
        ValueError: a module that has an attribute of that name.
    """
    if hasattr(module, CHILD):
        raise ValueError(f"module must not have an attribute {CHILD!r} yet, got one in {type(module).__name__}")
    module.add_module(CHILD, layer)
    module.register_forward_hook(_then, prepend=True)  # the owner's hooks see what comes out in the end


def attached(module: nn.Module) -> nn.Module | None:
    """The layer that `attach` put after the module."""
    layer = module._modules.get(CHILD)
    return layer if _then in module._forward_hooks.values() else None


def _then(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return module._modules[CHILD](output)  # type: ignore[misc]
