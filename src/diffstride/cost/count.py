"""Multiply-accumulates of one forward pass, counted by torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffstride.nn.conv import DiffStrideConvNd
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.resize import ResizeTo
from diffstride.nn.spectral import SpectralPoolNd
from diffstride.tracing import on_examples


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and every module back into its mode afterwards."""
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
    """The dense products of the resampling itself; FFTs are not counted."""


@torch.no_grad()
def count_macs(model: nn.Module, *inputs: Any) -> Macs:
    """Count the multiply-accumulates of `model(*inputs)` at the strides now in use, with torch's `FlopCounterMode`.

    The model runs in evaluation mode and is put back into its mode.

    Raises:
        UsageError: the model does not run on these inputs.
    """
    convolutions = 0  # of layers that resample and convolve

    def count(layer: DiffStrideConvNd, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        nonlocal convolutions
        (x,) = *args, *kwargs.values()
        batch = x.shape[0] if x.ndim == layer.ndim + 2 else 1
        spatial, new_sizes = x.shape[-layer.ndim :], output.shape[-layer.ndim :]
        convolutions += batch * layer.schedule(spatial, new_sizes).macs(spatial, new_sizes)

    with evaluation(model), on_examples(model):
        model(*inputs)  # builds the operators, whose products are not part of a forward pass
        layers = [module for module in model.modules() if isinstance(module, DiffStrideConvNd)]
        handles = [layer.register_forward_hook(count, with_kwargs=True) for layer in layers]
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
        if isinstance(module, (LearnableStrides, SpectralPoolNd, ResizeTo))
    )
    resampling = in_layers // 2 - convolutions
    return Macs(total // 2 - resampling, resampling)
