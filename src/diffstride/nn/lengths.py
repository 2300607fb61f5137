"""Output lengths that a model's code computes from fixed strides, computed from learned ones instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffstride.nn.attach import attached
from diffstride.nn.learnable import LearnableStrides
from diffstride.tracing._torch import FakeTensor


class OutputLengths:
    """A replacement of a method that computes the number of frames for a number of samples.

    Networks for speech compute with such a method which frames of a padded batch are real, from the strides of their
    configuration (`_get_feat_extract_output_lengths` of transformers). Here the number follows from the output sizes of
    the layers. Other arguments of the method decide at which layer the frames are counted. This is the layer whose map,
    at the strides of the configuration, had as many frames as the method returns for the example.
    """

    def __init__(
        self, owner: nn.Module, method: str, layers: Sequence[nn.Module], axis: int, size: int, frames: Sequence[int]
    ) -> None:
        """Make the replacement.

        Args:
            owner: the module that has the method.
            method: the method's name.
            layers: the layers in the order of their calls.
            axis: the axis of the layers' maps that is counted, from 0.
            size: the size of the example along this axis.
            frames: the size of each layer's map for the example, at the strides of the configuration.
        """
        self.owner, self.method, self.layers = owner, method, list(layers)
        self.axis, self.size, self.frames = axis, size, list(frames)
        self.tables: list[Tensor] | None = None

    def __call__(self, input_lengths: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the number of frames for each length, as the method would."""
        original = getattr(type(self.owner), self.method)
        if isinstance(input_lengths, FakeTensor):  # in a trace
            return original(self.owner, input_lengths, *args, **kwargs)
        reached = int(original(self.owner, torch.tensor([self.size]), *args, **kwargs))
        if reached not in self.frames:
            return original(self.owner, input_lengths, *args, **kwargs)
        count = self.frames.index(reached) + 1
        if self.tables is not None:
            table = self.tables[count - 1].to(torch.as_tensor(input_lengths).device)
            found = table[torch.as_tensor(input_lengths).long().clamp(0, len(table) - 1)]
        else:
            lengths = torch.as_tensor(input_lengths)
            counts = {n: self._frames(n, count) for n in set(lengths.flatten().tolist())}
            flat = [counts[n] for n in lengths.flatten().tolist()]
            found = torch.tensor(flat, device=lengths.device).reshape(lengths.shape)
        return found if isinstance(input_lengths, Tensor) else int(found)

    def freeze(self, size: int) -> None:
        """Replace the layers by tables of the numbers of frames for every length up to `size`."""
        size = max(size, self.size)
        self.tables = [
            torch.tensor([self._frames(n, count) for n in range(size + 1)]) for count in range(1, len(self.layers) + 1)
        ]
        self.layers = []

    def _frames(self, n: float, count: int) -> int:
        size = int(n)
        for layer in self.layers[:count]:
            size = _output_size(layer, size, self.axis)
        return size


def _output_size(layer: Any, size: int, axis: int) -> int:
    """Return the output size of a convolution or pooling with the layers attached to it; 0 where nothing fits."""
    if isinstance(layer, LearnableStrides):
        try:
            return layer.output_size(max(1, size))[axis] if size else 0
        except ValueError:  # fewer samples than taps
            return 0
    before, after = attached(layer, "before"), attached(layer)
    if before is not None:
        size = _output_size(before, size, axis)
    kernel, stride, padding, dilation = (
        value[axis] if isinstance(value, tuple) else value
        for value in (layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1))
    )
    if isinstance(padding, str):
        padding = {"same": dilation * (kernel - 1) / 2, "valid": 0}[padding]
    windows = (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1
    if getattr(layer, "ceil_mode", False):  # no window begins behind the input
        size = math.ceil(windows) - ((math.ceil(windows) - 1) * stride >= size + padding)
    else:
        size = math.floor(windows)
    size = max(0, size)
    return size if after is None else _output_size(after, size, axis)
