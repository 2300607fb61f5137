"""Apply one operator to each of the last axes of a tensor, in the order in which it lies in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from diffstride.backends.matmul import is_small
from diffstride.backends.resample import (
    AUTOCAST_DEVICES,
    Backend,
    Operators,
    Step,
    backward,
    build_operators,
    is_dense,
    no_autocast,
    resample,
)
from diffstride.geometry import Axis

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Kind(NamedTuple):
    """What operators depend on beside their axes."""

    dtype: torch.dtype
    device: torch.device
    channels_last: bool
    empty: bool
    small: bool
    """True where the host is busier than the device, see `is_small`."""
    keep: bool
    """True where operators can be kept for the next call; False for fake tensors."""

    @classmethod
    def of(cls, x: Tensor) -> Kind:
        """Return the kind of a tensor."""
        keep = type(x) in (Tensor, torch.nn.Parameter)
        elements = x.numel()
        return cls(x.dtype, x.device, is_channels_last(x), elements == 0, is_small(elements, x.device), keep)

    def in_order(self, x: Tensor, ndim: int) -> Tensor:
        """Return `x` as it lies in memory, contiguous."""
        return x.movedim(-ndim - 1, -1).contiguous() if self.channels_last else x.contiguous()

    def restored(self, y: Tensor, ndim: int) -> Tensor:
        """Undo `in_order`."""
        return y.movedim(-1, -ndim - 1) if self.channels_last else y


class Resampling:
    """One operator for each of the last axes of tensors of one kind.

    Where axes have strides, `at` builds their operators, and what depends on the sizes alone is used again.
    """

    def __init__(self, kind: Kind, axes: Sequence[Axis | None], backend: Backend, *, scaled: bool = False) -> None:
        """Prepare the axes.

        Args:
            kind: the kind of the input. The result has its dtype and memory format.
            axes: the operators; None leaves an axis as it is.
            backend: `"fft"`, `"matmul"` or `"auto"`.
            scaled: leave a float16 result scaled by the factors of `headroom`.
        """
        self.ndim, self.kind = len(axes), kind
        steps = [
            Step(
                dim=i - len(axes) - kind.channels_last,  # channels are the last axis in memory: one further to the left
                axis=axis,
                entry=i,
                dense=is_dense(axis, backend, kind.dtype) or kind.empty,  # FFT libraries refuse empty batches
            )
            for i, axis in enumerate(axes)
            if axis is not None
        ]
        if kind.channels_last and _products(steps[::-1]) <= _products(steps):
            steps.reverse()  # on a CPU, 0.6 to 1.0 times as long as in the other order, for equal sizes
        if kind.dtype == torch.float16:
            factors = headroom(len(steps), scaled)
            steps = [
                step._replace(axis=step.axis._replace(gain=step.axis.gain * factor))
                for step, factor in zip(steps, factors, strict=True)
            ]
        self.steps = tuple(steps)

    def at(self, host_strides: Sequence[float] | None) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Return the function of `x` and the raw strides, whose values are these.

        Args:
            host_strides: one per axis; None where all operators are fixed.
        """
        return partial(self, operators=self.operators(host_strides)) if self.steps else _unchanged

    def operators(self, host_strides: Sequence[float] | None) -> Operators:
        """Return the operators at raw strides, for `__call__`."""
        kind = self.kind
        return build_operators(self.steps, host_strides, kind.dtype, kind.device, kind.small, kind.keep)

    def __call__(self, x: Tensor, strides: Tensor | None, operators: Operators | None = None) -> Tensor:
        """Resample `x`, differentiably in the raw strides.

        Args:
            x: a tensor of the kind.
            strides: raw strides, one per axis or one for all; None where all operators are fixed.
            operators: those at these strides; None builds them from the tensor, without reading it.
        """
        with no_autocast(x):
            y = resample(self.kind.in_order(x, self.ndim), strides, self.steps, operators)
        return self.kind.restored(y, self.ndim)

    def backward(
        self, grad: Tensor, x: Tensor | None, strides: Tensor | None, operators: Operators, needs_x: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the input, if it is needed, and of the strides, if `x` is given."""
        with no_autocast(grad):
            of_x, of_strides = backward(
                self.kind.in_order(grad, self.ndim),
                None if x is None else self.kind.in_order(x, self.ndim),
                strides, self.steps, operators, needs_x, x is not None,
            )  # fmt: skip
        return None if of_x is None else self.kind.restored(of_x, self.ndim), of_strides


def _products(steps: Sequence[Step]) -> float:
    """Return the multiply-accumulates of operators in this order over the elements of their input."""
    total, share = 0.0, 1.0
    for step in steps:
        share *= step.axis.rows / step.axis.columns
        total += share * step.axis.columns
    return total


def _unchanged(x: Tensor, strides: Tensor | None) -> Tensor:
    return x


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
