"""What strides cost: Eq. 6 of the paper, and multiply-accumulates counted by torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffstride.geometry import clamp_stride
from diffstride.nn.conv import DiffStrideConvNd
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.spectral import SpectralPoolNd
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


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Macs(NamedTuple):
    """Multiply-accumulates of one forward pass."""

    model: int
    """Convolutions and linear layers."""
    resampling: int
    """The dense products of the resampling itself (none where it runs as an FFT)."""


@torch.no_grad()
def count_macs(model: nn.Module, *inputs: Any) -> Macs:
    """Count the multiply-accumulates of `model(*inputs)` at the strides now in use, with torch's `FlopCounterMode`.

    The model runs in evaluation mode and is left in the mode it was in.
    """
    convolutions = 0  # of layers that resample and convolve

    def count(layer: DiffStrideConvNd, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal convolutions
        (x,) = inputs
        batch = x.shape[0] if x.ndim == layer.ndim + 2 else 1
        convolutions += batch * layer.convolution_macs(x.shape[-layer.ndim :])

    with evaluation(model):
        model(*inputs)  # builds the operators, whose own products are not those of a forward pass
        handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, DiffStrideConvNd)]
        try:
            with FlopCounterMode(display=False) as counter:
                model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
    total = counter.get_total_flops()
    by_module = counter.get_flop_counts()
    prefix = type(model).__name__
    in_layers = sum(
        sum(by_module.get(f"{prefix}.{name}" if name else prefix, {}).values())
        for name, module in model.named_modules()
        if isinstance(module, (LearnableStrides, SpectralPoolNd))
    )
    resampling = in_layers // 2 - convolutions
    return Macs(total // 2 - resampling, resampling)
