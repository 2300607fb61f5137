"""Numbers behind pictures of one network: the spectra before its windows, and the sizes of its maps."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffstride import geometry
from diffstride.cost import evaluation
from diffstride.experiments.data import ClassificationData, MultiTask
from diffstride.experiments.data.base import as_dataset
from diffstride.experiments.history import axis_names
from diffstride.nn import learnable_layers
from diffstride.nn.learnable import LearnableStrides


class AxisWindow(NamedTuple):
    """A layer's window along one axis, and the spectrum before it.

    Attributes:
        layer: Name of the layer.
        axis: "height", "width", ...
        spectrum: Mean amplitude before the window at 0, 1, .. N//2 cycles per map.
        initial: Window at these frequencies with the layer's initial stride.
        learned: Window with its present stride.
    """

    layer: str
    axis: str
    spectrum: list[float]
    initial: list[float]
    learned: list[float]


class Resolution(NamedTuple):
    """The spatial sizes of a layer's output, in samples.

    Attributes:
        layer: Name of the layer; "input" for the input of the network.
        initial: Sizes with the initial strides of all layers.
        learned: Sizes with the present strides.
    """

    layer: str
    initial: tuple[int, ...]
    learned: tuple[int, ...]


@torch.no_grad()
def input_windows(network: nn.Module, inputs: Tensor, axes: Sequence[str] = ()) -> list[AxisWindow]:
    """Return the windows of all learnable layers with the spectra before them, in order of execution.

    The spectrum of a fused convolution is that of the convolution's output at stride 1. The network runs in evaluation
    mode and is not changed.

    Args:
        network: Any module with learnable strides.
        inputs: A batch for the network, `[B, C, *spatial]`.
        axes: Names of its spatial axes, if they are not those of images.

    Returns:
        An entry per layer and axis. Layers that share a stride have one entry.
    """
    windows = []
    for name, layer, x, _ in executed(network, inputs):
        x = layer.window_input(x)
        for i, axis in enumerate(axis_names(layer.ndim, axes)):
            size = x.shape[i - layer.ndim]
            windows.append(
                AxisWindow(
                    layer=name,
                    axis=axis,
                    spectrum=mean_amplitude(x, i - layer.ndim).tolist(),
                    initial=_window(layer, size, layer.initial_strides[i]),
                    learned=_window(layer, size, layer.strides[i]),
                )
            )
    return windows


@torch.no_grad()
def resolutions(network: nn.Module, example: Tensor) -> list[Resolution]:
    """Return the output sizes of all learnable layers in order of execution, with initial and with present strides.

    Args:
        network: Any module with learnable strides. It is not changed.
        example: A batch for the network, `[B, C, *spatial]`.

    Returns:
        The sizes of the input, then an entry per layer. Layers that share a stride have one entry.
    """
    untrained = copy.deepcopy(network)
    for _, layer in learnable_layers(untrained):
        layer.reset_strides()
    initial, learned = (
        [(name, tuple(y.shape[-layer.ndim :])) for name, layer, _, y in executed(model, example)]
        for model in (untrained, network)
    )
    size = tuple(example.shape[2:])
    return [
        Resolution("input", size, size),
        *(Resolution(name, before, after) for (name, before), (_, after) in zip(initial, learned, strict=True)),
    ]


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


def _window(layer: LearnableStrides, size: int, stride: float) -> list[float]:
    """Return the window at whole cycles; a window of cosines has frequencies halfway between these too."""
    lower, upper = geometry.stride_range(size, layer.smoothness, layer.bounds, layer.window, layer.basis)
    used = min(max(stride, lower), upper)
    f = torch.arange(size // 2 + 1, dtype=torch.float64)
    values: list[float] = geometry.mask(size, used, layer.smoothness, layer.window, f).tolist()
    return values


class Executed(NamedTuple):
    """A learnable layer with its first input and output."""

    name: str
    layer: LearnableStrides
    x: Tensor
    y: Tensor


def executed(network: nn.Module, inputs: Tensor) -> list[Executed]:
    """Return the learnable layers in order of execution."""
    ran: dict[str, Executed] = {}

    def watch(name: str, layer: LearnableStrides) -> RemovableHandle:
        def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> None:
            (x,) = args or kwargs.values()
            ran.setdefault(name, Executed(name, layer, x, y))

        return layer.register_forward_hook(note, with_kwargs=True)

    handles = [watch(name, layer) for name, layer in learnable_layers(network)]
    try:
        with evaluation(network):
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(ran.values())
