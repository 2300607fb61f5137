"""A model of any origin made to learn its strides: plan (find, tie, print), then apply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from diffstride.backends import Backend
from diffstride.geometry import Basis, Norm, Window
from diffstride.trace import ExampleInputs

if TYPE_CHECKING:
    from diffstride.convert.plans import Plan

__all__ = ["convert", "plan"]


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    upsample: bool = False,
    smoothness: float = 4.0,
    shared: bool = False,
    bounds: tuple[float, float | None] = (1.0, None),
    window: Window = "inner",
    basis: Basis = "dft",
    norm: Norm = "forward",
    size_multiple: int = 1,
    backend: Backend = "auto",
) -> Plan:
    """What `convert` would do. The model is run on fake tensors alone and left as found."""
    from diffstride.convert.find import Finder

    options = {
        "smoothness": smoothness, "shared": shared, "bounds": bounds, "window": window, "basis": basis, "norm": norm,
        "size_multiple": size_multiple, "backend": backend,
    }  # fmt: skip
    return Finder(model, ExampleInputs.of(example_inputs), include, exclude, upsample, options).find()


def convert(model: nn.Module, example_inputs: Any, **options: Any) -> Plan:
    """Convert."""
    made = plan(model, example_inputs, **options)
    made.apply(model)
    return made
