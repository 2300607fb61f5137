"""The numbers behind pictures of one network: what its windows see, and the sizes at which its layers run."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffstride import functional, geometry
from diffstride.cost import evaluation
from diffstride.experiments.data import ClassificationData, MultiTask
from diffstride.experiments.data.base import as_dataset
from diffstride.experiments.history import axis_names
from diffstride.nn import learnable_layers
from diffstride.nn.conv import DiffStrideConvNd
from diffstride.nn.learnable import LearnableStrides


class AxisWindow(NamedTuple):
    """A layer's window along one axis, and what it lets through.

    Attributes:
        layer: name of the layer.
        axis: "height", "width", ...
        spectrum: mean amplitude of what the window sees at 0, 1, .. N//2 cycles per map.
        initial: the window at these frequencies with the stride that the layer was made with.
        learned: the same with its present stride.
    """

    layer: str
    axis: str
    spectrum: list[float]
    initial: list[float]
    learned: list[float]


class Resolution(NamedTuple):
    """Spatial sizes behind a layer, in samples.

    Attributes:
        layer: name of the layer; "input" for what comes into the network.
        initial: sizes with the strides that all layers were made with.
        learned: sizes with the present strides.
    """

    layer: str
    initial: tuple[int, ...]
    learned: tuple[int, ...]


@torch.no_grad()
def input_windows(network: nn.Module, inputs: Tensor, axes: Sequence[str] = ()) -> list[AxisWindow]:
    """The windows of all learnable layers over the spectra that reach them, in order of execution.

    Of a layer that convolves and downsamples in one, the window sees the convolution's output at stride 1. The network
    runs in evaluation mode and is left as it was.

    Args:
        network: any module with learnable strides.
        inputs: a batch as the network takes it, `[B, C, *spatial]`.
        axes: names of its spatial axes, if they are not those of images.

    Returns:
        An entry per layer and axis; layers that share a stride are one.
    """
    found = []
    for name, layer, x, _ in executed(network, inputs):
        if isinstance(layer, DiffStrideConvNd):
            x = functional.convolve(x, layer.weight, layer.bias, layer._convolution)
        for i, (axis, initial, learned) in enumerate(
            zip(axis_names(layer.ndim, axes), layer.initial_strides, layer.strides, strict=True)
        ):
            size = x.shape[i - layer.ndim]
            spectrum = mean_amplitude(x, i - layer.ndim)
            found.append(
                AxisWindow(name, axis, spectrum.tolist(), _window(layer, size, initial), _window(layer, size, learned))
            )
    return found


@torch.no_grad()
def resolutions(network: nn.Module, example: Tensor) -> list[Resolution]:
    """The output sizes of all learnable layers in order of execution, with initial and with present strides.

    Args:
        network: any module with learnable strides; left as it was.
        example: a batch as the network takes it, `[B, C, *spatial]`.

    Returns:
        The sizes of the input, then an entry per layer; layers that share a stride are one.
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
    """Up to `count` inputs spread over the test split of loaded data, `[count, *data.sample_shape]` as networks see."""
    if isinstance(data, MultiTask):
        return torch.cat([sample_inputs(each, math.ceil(count / len(data.tasks))) for each in data.tasks.values()])
    test = as_dataset(data.test_set)
    chosen = list(range(0, len(test), math.ceil(len(test) / count)))
    inputs, _ = data.prepare_batch(test.__getitems__(chosen))
    return inputs[:count]  # of some sounds there are several views


def mean_amplitude(x: Tensor, dim: int) -> Tensor:
    """`|rfft(x)| / N` along `dim`, averaged over all other dimensions: `[N//2 + 1]`, at 0, 1, .. N//2 cycles."""
    amplitude = torch.fft.rfft(x.float(), dim=dim, norm="forward").abs().movedim(dim, -1)
    mean: Tensor = amplitude.flatten(0, -2).mean(0)
    return mean


def _window(layer: LearnableStrides, size: int, stride: float) -> list[float]:
    """The window at whole cycles; one of cosines has frequencies halfway between these too."""
    lower, upper = geometry.stride_range(size, layer.smoothness, layer.bounds, layer.window, layer.basis)
    used = min(max(stride, lower), upper)
    f = torch.arange(size // 2 + 1, dtype=torch.float64)
    values: list[float] = geometry.mask(size, used, layer.smoothness, layer.window, f).tolist()
    return values


class Executed(NamedTuple):
    """A learnable layer that ran, with its first input and output."""

    name: str
    layer: LearnableStrides
    x: Tensor
    y: Tensor


def executed(network: nn.Module, inputs: Tensor) -> list[Executed]:
    """The learnable layers in order of execution."""
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
