"""What can be converted, by type of module, and how: the one place to extend for a new type of layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from diffstride.nn import DiffStride1d, DiffStride2d, DiffStride3d, DiffStrideConv1d, DiffStrideConv2d, DiffStrideConv3d
from diffstride.nn.attach import attach
from diffstride.nn.conv import DiffStrideConvNd
from diffstride.nn.diffstride import DiffStrideNd
from diffstride.nn.learnable import LearnableStrides

LAYERS: dict[int, type[DiffStrideNd]] = {1: DiffStride1d, 2: DiffStride2d, 3: DiffStride3d}
CONVOLUTIONS: dict[int, type[DiffStrideConvNd]] = {1: DiffStrideConv1d, 2: DiffStrideConv2d, 3: DiffStrideConv3d}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Look(NamedTuple):
    """What a module is to the converter."""

    ndim: int
    stride: tuple[int, ...]
    pooling: bool = False
    size_offset: tuple[int, ...] | None = None
    """By how many samples the map at stride 1 falls short of one whose every stride-th sample is the module's map."""
    reason: str | None = None
    """Why it must be left alone."""
    extent: tuple[int, ...] = ()
    """Samples from the first tap to the last."""


_handlers: list[tuple[tuple[type[nn.Module], ...], Callable[[Any], Look | None]]] = []


def handles(*types: type[nn.Module]) -> Callable[[Callable[[Any], Look | None]], Callable[[Any], Look | None]]:
    """Register how modules of these types, and those derived from them, are looked at; None: does not downsample."""

    def register(handler: Callable[[Any], Look | None]) -> Callable[[Any], Look | None]:
        _handlers.append((types, handler))
        return handler

    return register


def look(module: nn.Module) -> Look | None:
    """The downsampling that a module does; None if none is known."""
    for types, handler in _handlers:
        if isinstance(module, types):
            return handler(module)
    return None


@handles(LearnableStrides)
def _learnable(module: LearnableStrides) -> Look:
    return Look(module.ndim, (1,) * module.ndim, reason="its strides are learned already")


@handles(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Look | None:
    stride = tuple(module.stride)
    return Look(len(stride), stride, extent=_extent(module, len(stride))) if max(stride) > 1 else None


@handles(*TRANSPOSED)
def _transposed(module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> Look | None:
    stride = tuple(module.stride)
    return Look(len(stride), stride, reason="it is transposed: it upsamples") if max(stride) > 1 else None


@handles(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _pooling(module: Any) -> Look | None:
    ndim = ndim_of(module)
    stride = _tuple(module.stride, ndim)
    if getattr(module, "return_indices", False):
        return Look(ndim, stride, True, reason="it returns indices, which belong to its own grid")
    kernel = _tuple(module.kernel_size, ndim)
    # With ceil_mode a last window may start inside the map and end outside.
    size_offset = tuple(min(s, k) - 1 if module.ceil_mode else 0 for s, k in zip(stride, kernel, strict=True))
    return Look(ndim, stride, True, size_offset, extent=_extent(module, ndim))


@handles(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
@handles(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _adaptive(module: Any) -> Look | None:
    sizes = module.output_size if isinstance(module.output_size, tuple) else (module.output_size,)
    if all(size == 1 for size in sizes):
        return None
    return Look(len(sizes), (1,) * len(sizes), reason=f"its output has the fixed size {module.output_size}")


@handles(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.PixelUnshuffle)
def _others(module: nn.Module) -> Look:
    return Look(0, (), reason="its type is not supported: convolutions, max and average pooling are")


def type_of_pooling(module: nn.Module) -> type[nn.Module]:
    """PyTorch's own class among those that the module's class is derived from."""
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
    """A plain strided convolution as one of stride 1 with `layer`, with the same parameters."""
    unstrided: Any = copy.copy(conv)
    unstrided.stride = (1,) * layer.ndim
    fused = CONVOLUTIONS[layer.ndim].fuse(unstrided, layer)
    return fused.train(conv.training)


def unstride(module: nn.Module, layer: DiffStrideNd) -> None:
    """Take the stride of a module that stays what it is, and put `layer` behind it."""
    attach(module, layer.train(module.training))
    module.stride = (1,) * layer.ndim  # type: ignore[assignment]


def global_pooling(module: Any) -> nn.Module:
    """What pools whole maps as this module does, whatever their size."""
    base = type_of_pooling(module)
    adaptive: type[nn.Module] = getattr(nn, f"Adaptive{base.__name__}")
    return adaptive(1).train(module.training)
