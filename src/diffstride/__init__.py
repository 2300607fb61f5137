"""DiffStride: learnable strides for PyTorch (Riad et al., ICLR 2022)."""

from diffstride import functional, nn
from diffstride._version import __version__
from diffstride.convert import Plan, convert, insert, plan
from diffstride.cost import Budget, CostModel, cutoff_frequencies, stride_cost
from diffstride.export import freeze
from diffstride.functional import spectral_resize
from diffstride.nn import (
    DiffStride1d,
    DiffStride2d,
    DiffStride3d,
    DiffStrideConv1d,
    DiffStrideConv2d,
    DiffStrideConv3d,
    Exploration,
    Jitter,
    SpectralPool1d,
    SpectralPool2d,
    SpectralPool3d,
    Sweep,
    clamp_strides_,
    param_groups,
    refresh_sizes,
    replicate_strides,
    strides,
)
from diffstride.tracing import ExampleInputs

__all__ = [
    "Budget",
    "CostModel",
    "DiffStride1d",
    "DiffStride2d",
    "DiffStride3d",
    "DiffStrideConv1d",
    "DiffStrideConv2d",
    "DiffStrideConv3d",
    "ExampleInputs",
    "Exploration",
    "Jitter",
    "Plan",
    "SpectralPool1d",
    "SpectralPool2d",
    "SpectralPool3d",
    "Sweep",
    "__version__",
    "clamp_strides_",
    "convert",
    "cutoff_frequencies",
    "freeze",
    "functional",
    "insert",
    "nn",
    "param_groups",
    "plan",
    "refresh_sizes",
    "replicate_strides",
    "spectral_resize",
    "stride_cost",
    "strides",
]
