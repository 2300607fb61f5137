"""Apply one operator to each of the last axes of a tensor, in the order in which it lies in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from diffstride.backends.resample import (
    AUTOCAST_DEVICES,
    Backend,
    Operators,
    Step,
    build_operators,
    is_dense,
    no_autocast,
    resample,
)
from diffstride.geometry import Axis

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Resampling:
    """One operator for each of the last axes of tensors of one kind.

    The kind is the shape but for the batch, the dtype, the device and the memory format. Where axes have strides, `at`
    builds their operators, and what depends on the sizes alone is used again.
    """

    def __init__(self, x: Tensor, axes: Sequence[Axis | None], backend: Backend, *, scaled: bool = False) -> None:
        """Prepare the axes.

        Args:
            x: a tensor of the kind. The result has its dtype and memory format.
            axes: the operators; None leaves an axis as it is.
            backend: `"fft"`, `"matmul"` or `"auto"`.
            scaled: leave a float16 result scaled by the factors of `headroom`.
        """
        self.ndim, self.channels_last = len(axes), is_channels_last(x)
        steps = [
            Step(
                dim=i - len(axes) - self.channels_last,  # channels are the last axis in memory: one further to the left
                axis=axis,
                entry=i,
                dense=is_dense(axis, backend, x.dtype) or x.numel() == 0,  # FFT libraries refuse empty batches
            )
            for i, axis in enumerate(axes)
            if axis is not None
        ]
        if self.channels_last:
            steps.reverse()  # on a CPU, 0.6 to 1.0 times as long as in the other order
        if x.dtype == torch.float16:
            factors = headroom(len(steps), scaled)
            steps = [
                step._replace(axis=step.axis._replace(gain=step.axis.gain * factor))
                for step, factor in zip(steps, factors, strict=True)
            ]
        self.steps = tuple(steps)
        self._kind = x.dtype, x.device, type(x) in (Tensor, torch.nn.Parameter)  # operators of fake tensors are not kept

    def at(self, host_strides: Sequence[float] | None) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Return the function of `x` and the raw strides, whose values are these.

        Args:
            host_strides: one per axis; None where all operators are fixed.
        """
        if not self.steps:
            return lambda x, strides: x
        operators = build_operators(self.steps, host_strides, *self._kind)
        return partial(self, operators=operators)

    def __call__(self, x: Tensor, strides: Tensor | None, operators: Operators | None = None) -> Tensor:
        """Resample `x`, differentiably in the raw strides.

        Args:
            x: a tensor of the kind.
            strides: raw strides, one per axis or one for all; None where all operators are fixed.
            operators: those at these strides; None builds them from the tensor, without reading it.
        """
        in_order = x.movedim(-self.ndim - 1, -1) if self.channels_last else x.contiguous()
        with no_autocast(x):
            y = resample(in_order, strides, self.steps, operators)
        return y.movedim(-1, -self.ndim - 1) if self.channels_last else y


def headroom(count: int, scaled: bool = False) -> list[float]:
    """Return the factors by which `count` operators in a row are multiplied in float16.

    A low-pass filter overshoots at edges, by 9 % of a step and more where edges are close. Maps near 65,504 may be
    finite before and after all axes and infinite in between. Halves are exact in floating point.

    Args:
        count: the number of operators that are applied one after another.
        scaled: leave the result scaled by `2**-count`; else the last operator undoes the other factors.
    """
    factors = [0.5] * count
    if factors and not scaled:
        factors[-1] = 2.0 ** (count - 1)
    return factors


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of a batch of planes or volumes are its last axis in memory."""
    memory_format = CHANNELS_LAST.get(x.ndim)
    return memory_format is not None and not x.is_contiguous() and x.is_contiguous(memory_format=memory_format)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution takes `x`."""
    device = x.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
