"""Layers: learnable strides (`DiffStride`) and fixed spectral pooling (`SpectralPool`) in 1-D, 2-D and 3-D."""

from diffstride.nn.conv import DiffStrideConv1d, DiffStrideConv2d, DiffStrideConv3d
from diffstride.nn.diffstride import DiffStride1d, DiffStride2d, DiffStride3d
from diffstride.nn.distributed import replicate_strides
from diffstride.nn.explore import Exploration, Jitter, LayerContext, Sweep
from diffstride.nn.spectral import SpectralPool1d, SpectralPool2d, SpectralPool3d
from diffstride.nn.strides import clamp_strides_, learnable_layers, param_groups, refresh_sizes, strides

__all__ = [
    "DiffStride1d",
    "DiffStride2d",
    "DiffStride3d",
    "DiffStrideConv1d",
    "DiffStrideConv2d",
    "DiffStrideConv3d",
    "Exploration",
    "Jitter",
    "LayerContext",
    "SpectralPool1d",
    "SpectralPool2d",
    "SpectralPool3d",
    "Sweep",
    "clamp_strides_",
    "learnable_layers",
    "param_groups",
    "refresh_sizes",
    "replicate_strides",
    "strides",
]
