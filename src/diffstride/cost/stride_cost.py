"""The cost term of the paper, Eq. 6."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffstride.geometry import clamp_stride
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.strides import learnable_layers


def stride_cost(model: nn.Module) -> Tensor:
    """Eq. 6: `J = sum_l prod_{i <= l} prod_axes 1 / S_i` over the model's learnable downsamplings.

    In the order in which the layers are registered, a shared layer once. Computation and memory are proportional to it
    where the number of channels is constant. Differentiable in the strides (clamped to the users' bounds); weighed
    into a loss it pushes strides up.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: a model without learnable strides.
    """
    inverse_strides = [(1 / _in_bounds(layer)).prod() for _, layer in learnable_layers(model)]
    if not inverse_strides:
        raise ValueError(f"model must have learnable strides (DiffStride layers), got none in {type(model).__name__}")
    return torch.stack(inverse_strides).cumprod(0).sum()


def _in_bounds(layer: LearnableStrides) -> Tensor:
    lower, upper = layer.bounds
    return clamp_stride(layer.stride, lower, float("inf") if upper is None else upper).expand(layer.ndim)
