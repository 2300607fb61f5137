"""The module types that can be converted, and how.

A handler takes a module and returns its `Downsampling`, or None if the module does not downsample:

    @handles(MyPooling)
    def _my_pooling(module):
        return Downsampling(stride=module.stride, extent=(module.kernel_size,) * 2)

A registered class must read its stride from `module.stride`, a tuple; a conversion sets it to ones. `is_pooling` is for
classes derived from the poolings of PyTorch only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffstride.nn import DiffStride1d, DiffStride2d, DiffStride3d, DiffStrideConv1d, DiffStrideConv2d, DiffStrideConv3d
from diffstride.nn.attach import Placement
from diffstride.nn.conv import DiffStrideConvNd, is_plain_convolution
from diffstride.nn.diffstride import DiffStrideNd
from diffstride.nn.learnable import LearnableStrides

LAYERS: dict[int, type[DiffStrideNd]] = {1: DiffStride1d, 2: DiffStride2d, 3: DiffStride3d}
CONVOLUTIONS: dict[int, type[DiffStrideConvNd]] = {1: DiffStrideConv1d, 2: DiffStrideConv2d, 3: DiffStrideConv3d}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
STRIDED = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
)  # fmt: skip
"""The types that can be converted."""


@dataclass(frozen=True, kw_only=True)
class Downsampling:
    """The downsampling that a module does."""

    stride: tuple[int, ...]
    extent: tuple[int, ...] = ()
    """Number of samples from the first tap of the kernel to the last."""
    is_pooling: bool = False
    """True for poolings of PyTorch: where the map is a single sample, the pooling becomes adaptive."""
    size_offset: tuple[int, ...] = ()
    """Samples to add to the map at stride 1, so that every S-th of them is the module's own map (`ceil_mode`). Empty:
    none."""
    kept: bool = False
    """True: the module keeps its stride, and the layer starts at 1."""
    placement: Placement = "after"
    """The side of the module on which the layer is."""
    fixed_axes: tuple[int, ...] = ()
    """Axes along which the module keeps its stride and its size is not learned."""
    reason: str = ""
    """Reason why the module must be left alone; empty if it can be converted."""

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.stride)

    @property
    def initial_strides(self) -> tuple[int, ...]:
        """The initial strides of the layer."""
        return tuple(1 if self.kept or axis in self.fixed_axes else s for axis, s in enumerate(self.stride))


Handler = Callable[[Any], Downsampling | None]
_handlers: list[tuple[tuple[type[nn.Module], ...], Handler]] = []


def handles(*types: type[nn.Module]) -> Callable[[Handler], Handler]:
    """Register a handler for modules of these types and of types derived from them."""

    def register(handler: Handler) -> Handler:
        _handlers.append((types, handler))
        return handler

    return register


def downsampling(module: nn.Module) -> Downsampling | None:
    """Return the downsampling that a module does; None if it does none that is known."""
    for types, handler in _handlers:
        if isinstance(module, types):
            return handler(module)
    return _blur_pooling(module)


@handles(LearnableStrides)
def _learnable(module: LearnableStrides) -> Downsampling:
    return Downsampling(stride=(1,) * module.ndim, reason="its strides are learned already")


@handles(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Downsampling | None:
    stride = tuple(module.stride)
    return Downsampling(stride=stride, extent=_extent(module, len(stride))) if max(stride) > 1 else None


@handles(*TRANSPOSED)
def _transposed(module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> Downsampling | None:
    stride = tuple(module.stride)
    return Downsampling(stride=stride, reason="it is transposed: it upsamples") if max(stride) > 1 else None


@handles(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _pooling(module: Any) -> Downsampling:
    ndim = ndim_of(module)
    stride, kernel = _tuple(module.stride, ndim), _tuple(module.kernel_size, ndim)
    indices = getattr(module, "return_indices", False)
    return Downsampling(
        stride=stride,
        extent=_extent(module, ndim),
        is_pooling=True,
        # With ceil_mode the last window may start inside the map and end outside.
        size_offset=tuple(min(s, k) - 1 for s, k in zip(stride, kernel, strict=True)) if module.ceil_mode else (),
        reason="it returns indices, which belong to its own grid" if indices else "",
    )


@handles(
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
def _adaptive(module: Any) -> Downsampling | None:
    sizes = module.output_size if isinstance(module.output_size, tuple) else (module.output_size,)
    if all(size == 1 for size in sizes):
        return None
    return Downsampling(stride=(1,) * len(sizes), reason=f"its output has the fixed size {module.output_size}")


@handles(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.PixelUnshuffle)
def _others(module: nn.Module) -> Downsampling:
    return Downsampling(stride=(), reason="its type is not supported: convolutions, max and average pooling are")


def _blur_pooling(module: Any) -> Downsampling | None:
    """Anti-aliased downsampling of timm, kornia or antialiased-cnns, which have no class in common."""
    kind, stride = type(module).__name__, getattr(module, "stride", None)
    ndim = next((n for n in (1, 2, 3) if f"{n}d" in kind.lower()), 2)
    if "blurpool" not in kind.lower() or not isinstance(stride, int | tuple):
        return None
    return Downsampling(stride=_tuple(stride, ndim), extent=(_WIDEST_BLUR,) * ndim)


_WIDEST_BLUR = 9


def type_of_pooling(module: nn.Module) -> type[nn.Module]:
    """Return the class of PyTorch from which the module's class is derived."""
    return next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))


def ndim_of(module: nn.Module) -> int:
    """Return the number of spatial axes of a convolution or pooling."""
    return int(type_of_pooling(module).__name__[-2])


def _tuple(value: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)


def _extent(module: Any, ndim: int) -> tuple[int, ...]:
    kernel, dilation = _tuple(module.kernel_size, ndim), _tuple(getattr(module, "dilation", 1), ndim)
    return tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))


def is_upsampling(module: nn.Module) -> bool:
    """Return whether a module upsamples by a fixed factor."""
    return isinstance(module, TRANSPOSED) or (isinstance(module, nn.Upsample) and module.scale_factor is not None)


def fuse(conv: nn.Module, layer: DiffStrideNd) -> DiffStrideConvNd:
    """Return a plain strided convolution and `layer` as one module, with the same parameters."""
    unstrided: Any = copy.copy(conv)
    unstrided.stride = (1,) * layer.ndim
    fused = CONVOLUTIONS[layer.ndim].fuse(unstrided, layer)
    return fused.train(conv.training)


def takes_layer_before(module: nn.Module) -> bool:
    """Return whether a layer can come before a module: a plain convolution that keeps the size of its map at stride 1.

    Others would need samples beyond the coarse map. A pooling does not save multiply-accumulates there.
    """
    if not is_plain_convolution(module) or isinstance(module.padding, str):
        return False
    conv: Any = module
    return all(2 * p == e - 1 for p, e in zip(conv.padding, _extent(conv, len(conv.kernel_size)), strict=True))


def global_pooling(module: Any) -> nn.Module:
    """Return a pooling of the same kind for whole maps of any size."""
    adaptive: type[nn.Module] = getattr(nn, f"Adaptive{type_of_pooling(module).__name__}")
    return adaptive(1).train(module.training)
