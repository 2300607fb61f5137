"""The records of a plan: the modules that a conversion changes, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffstride.convert.lengths import LengthMethod


@dataclass(frozen=True)
class Site:
    """A downsampling that becomes learnable. Sizes are those at the example's, with the initial strides."""

    name: str
    kind: str
    """The module's class."""
    fused: bool
    """Whether a `DiffStrideConv` takes its place; else the module stays, at stride 1, with a layer behind it."""
    stride: tuple[int, ...]
    group: int
    """Sites of a group share one stride and one output size."""
    shared: bool = False
    """One stride for all axes, since the model needs square maps."""
    size_offset: tuple[int, ...] = ()
    """By how many samples the map at stride 1 falls short of the largest in the group."""
    input_size: tuple[int, ...] = ()
    size_before: tuple[int, ...] = ()
    size_after: tuple[int, ...] = ()
    macs_before: int = 0
    macs_after: int = 0


@dataclass(frozen=True)
class Resize:
    """An upsampling whose output meets a skip connection: it takes the size of what `source` returns."""

    name: str
    kind: str
    source: str
    ndim: int


@dataclass(frozen=True, kw_only=True)
class Edits:
    """The changes that a conversion makes to a model."""

    model: str
    """The model's class."""
    sites: tuple[Site, ...]
    resizes: tuple[Resize, ...]
    global_poolings: tuple[str, ...]
    """Poolings of whole maps by a kernel of fixed size. They become adaptive, so that they follow the map's size."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the layers."""
    lengths: tuple[LengthMethod, ...] = ()
    """Methods of the model that compute output lengths."""
