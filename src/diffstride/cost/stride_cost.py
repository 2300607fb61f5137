"""The cost term of the paper, Eq. 6."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffstride.geometry import clamp_stride
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.strides import learnable_layers


def stride_cost(model: nn.Module) -> Tensor:
    """Return Eq. 6, `J = sum_l prod_{i <= l} prod_axes 1 / S_i`, over the model's learnable downsamplings.

    The layers count in the order in which they are registered, those that share a stride once. Computation and memory
    are proportional to `J` where the number of channels is constant. As a term of a loss it pushes strides up.

    Returns:
        A 0-d tensor, differentiable in the strides, which are clamped to the layers' `bounds`.

    Raises:
        ValueError: the model has no learnable strides.
    """
    inverse_strides = [(1 / _in_bounds(layer)).prod() for _, layer in learnable_layers(model)]
    if not inverse_strides:
        raise ValueError(f"model must have learnable strides (DiffStride layers), got none in {type(model).__name__}")
    return torch.stack(inverse_strides).cumprod(0).sum()


def _in_bounds(layer: LearnableStrides) -> Tensor:
    raw, limits = layer.stride.expand(layer.ndim), [layer.options.limits(axis) for axis in range(layer.ndim)]
    pairs = zip(raw, limits, strict=True)
    return torch.stack([clamp_stride(stride, lower, upper or math.inf) for stride, (lower, upper) in pairs])
