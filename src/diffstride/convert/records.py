"""The records of a plan: the modules that a conversion changes, and how."""

from __future__ import annotations

from dataclasses import dataclass

from diffstride.nn.attach import Placement

INPUT = "(input)"
"""The name of the site at the input of the first convolution of a model that stays as it is."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A downsampling that becomes learnable. Sizes are those on the example inputs, with the initial strides."""

    name: str
    kind: str
    """The module's class."""
    fused: bool
    """True: a `DiffStrideConv` replaces the module. False: the module stays, at stride 1, with a layer attached."""
    stride: tuple[int, ...]
    """The initial strides of the layer."""
    group: int
    """Number of the group. Sites of a group share one stride and one output size."""
    kept: bool = False
    """True: the module keeps its stride, and a layer of stride 1 is attached."""
    placement: Placement = "after"
    """The side of the module on which its layer is."""
    fixed_axes: tuple[int, ...] = ()
    """Axes along which the module keeps its stride, since the model needs a map of that size."""
    size_multiple: int = 1
    """The number of which output sizes are multiples, since the model needs that."""
    shared: bool = False
    """True: all axes have one stride, because the model needs square maps."""
    size_offset: tuple[int, ...] = ()
    """Extra samples that the layer counts: those that `ceil_mode` adds, plus the difference from the largest map of the
    group."""
    input_size: tuple[int, ...] = ()
    size_before: tuple[int, ...] = ()
    size_after: tuple[int, ...] = ()
    macs_before: int = 0
    macs_after: int = 0

    @property
    def key(self) -> str:
        """The name of the site: the module's, or `INPUT` for the layer before the first convolution."""
        return INPUT if self.kept and self.placement == "before" else self.name


@dataclass(frozen=True, kw_only=True)
class Resize:
    """A module whose output is resized.

    An upsampling whose output meets a skip connection takes the size of the output of `source`. A map that later
    modules need at one size, such as a linear layer, takes that `size`.
    """

    name: str
    kind: str
    source: str
    ndim: int
    size: tuple[int | None, ...] = ()
    """Sizes by axis, None for axes that stay as they are; empty where there is a source."""
    kept: bool = False
    """True: the upsampling stays, and resizing follows it. An `nn.Upsample` that does not stay is replaced."""


@dataclass(frozen=True, kw_only=True)
class LengthMethod:
    """A method that computes output lengths. `diffstride.nn.lengths.OutputLengths` replaces it."""

    module: str
    """The module that has the method."""
    method: str
    layers: tuple[str, ...] = ()
    """The layers on the way, in the order of their calls; empty where the way is not known."""
    axis: int = 0
    """The axis of the layers' maps that is counted."""
    size: int = 0
    """The size of the example along this axis."""
    frames: tuple[int, ...] = ()
    """The sizes behind each layer before the conversion."""
