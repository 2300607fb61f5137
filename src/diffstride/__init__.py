"""DiffStride: learnable strides for PyTorch (Riad et al., ICLR 2022)."""

from diffstride import functional, nn
from diffstride._version import __version__
from diffstride.cost import stride_cost
from diffstride.export import freeze
from diffstride.functional import spectral_resize
from diffstride.nn import (
    DiffStride1d,
    DiffStride2d,
    DiffStride3d,
    DiffStrideConv1d,
    DiffStrideConv2d,
    DiffStrideConv3d,
    SpectralPool1d,
    SpectralPool2d,
    SpectralPool3d,
    clamp_strides_,
    param_groups,
    refresh_sizes,
    strides,
)

__all__ = [
    "DiffStride1d",
    "DiffStride2d",
    "DiffStride3d",
    "DiffStrideConv1d",
    "DiffStrideConv2d",
    "DiffStrideConv3d",
    "SpectralPool1d",
    "SpectralPool2d",
    "SpectralPool3d",
    "__version__",
    "clamp_strides_",
    "freeze",
    "functional",
    "nn",
    "param_groups",
    "refresh_sizes",
    "spectral_resize",
    "stride_cost",
    "strides",
]
