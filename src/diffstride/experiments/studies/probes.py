"""Numbers behind pictures of one network: its windows, the spectra before them, and samples of its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffstride import geometry
from diffstride.cost import evaluation
from diffstride.experiments.data import ClassificationData, MultiTask
from diffstride.experiments.data.base import as_dataset
from diffstride.experiments.figures.training import WindowPanel
from diffstride.experiments.history import axis_names
from diffstride.nn import learnable_layers
from diffstride.nn._fused import convolver
from diffstride.nn.conv import DiffStrideConvNd
from diffstride.nn.learnable import LearnableStrides


@torch.no_grad()
def input_windows(network: nn.Module, inputs: Tensor, axes: Sequence[str] = ()) -> list[WindowPanel]:
    """Return the learned and the initial windows of all learnable layers over the spectra before them.

    The spectrum of a fused convolution is that of the convolution's output at stride 1. The network runs in evaluation
    mode and is not changed.

    Args:
        network: Any module with learnable strides.
        inputs: A batch for the network, `[B, C, *spatial]`.
        axes: Names of its spatial axes, if they are not those of images.

    Returns:
        An entry per layer and axis, in order of execution. Layers that share a stride have one entry.
    """
    panels = []
    for name, (layer, x, _) in executed(network, inputs).items():
        if isinstance(layer, DiffStrideConvNd):
            x = convolver(layer.convolution)(x, layer.weight, layer.bias)
        for i, axis in enumerate(axis_names(layer.ndim, axes)):
            if layer.options.is_left(i):
                continue
            size = x.shape[i - layer.ndim]
            strides = {"learned window": layer.strides[i], "initial window": layer.initial_strides[i]}
            windows = {end: _window(layer, i, size, stride) for end, stride in strides.items()}
            panels.append(WindowPanel(f"{name}, {axis}", mean_amplitude(x, i - layer.ndim).tolist(), windows))
    return panels


def sample_inputs(data: ClassificationData, count: int = 64) -> Tensor:
    """Return up to `count` inputs spread over the test split of loaded data, `[count, *data.sample_shape]`."""
    if isinstance(data, MultiTask):
        return torch.cat([sample_inputs(each, math.ceil(count / len(data.tasks))) for each in data.tasks.values()])
    test = as_dataset(data.test_set)
    chosen = list(range(0, len(test), math.ceil(len(test) / count)))
    inputs, _ = data.prepare_batch(test.__getitems__(chosen))
    return inputs[:count]  # a sound may have several views


def mean_amplitude(x: Tensor, dim: int) -> Tensor:
    """Return `|rfft(x)| / N` along `dim`, averaged over all other dimensions: `[N//2 + 1]`, at 0, 1, .. N//2 cycles."""
    amplitude = torch.fft.rfft(x.float(), dim=dim, norm="forward").abs().movedim(dim, -1)
    mean: Tensor = amplitude.flatten(0, -2).mean(0)
    return mean


def _window(layer: LearnableStrides, axis: int, size: int, stride: float) -> list[float]:
    """Return the window at whole cycles; a window of cosines has frequencies halfway between these too."""
    lower, upper = layer.options.stride_range(axis, size)
    used = min(max(stride, lower), upper)
    f = torch.arange(size // 2 + 1, dtype=torch.float64)
    if layer.window == "hard":
        found = geometry.hard_mask(size, used, layer.basis, f)
    else:
        found = geometry.mask(size, used, layer.smoothness, layer.window, f)
    return [*found.tolist()]


def executed(network: nn.Module, inputs: Tensor) -> dict[str, tuple[LearnableStrides, Tensor, Tensor]]:
    """Return the learnable layers in order of execution, each with its first input and output."""
    ran: dict[str, tuple[LearnableStrides, Tensor, Tensor]] = {}

    def note(name: str, layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> None:
        (x,) = args or kwargs.values()
        ran.setdefault(name, (layer, x, y))

    with ExitStack() as stack:
        for name, layer in learnable_layers(network):
            stack.enter_context(layer.register_forward_hook(partial(note, name), with_kwargs=True))
        stack.enter_context(evaluation(network))
        network(inputs)
    return ran
