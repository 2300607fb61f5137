"""Apply one operator to each of the last axes of a tensor, in the order in which it lies in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffstride.backends.resample import AUTOCAST_DEVICES, Backend, Step, is_dense, no_autocast, resample
from diffstride.geometry import Axis

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def along_axes(
    x: Tensor,
    axes: Sequence[Axis | None],
    backend: Backend,
    strides: Tensor | None = None,
    host_strides: Sequence[float] | None = None,
    scaled: bool = False,
) -> Tensor:
    """Apply one operator to each of the last axes of `x`.

    Args:
        x: a tensor whose dtype and memory format the result has.
        axes: the operators; None leaves an axis as it is.
        backend: `"fft"`, `"matmul"` or `"auto"`.
        strides: raw strides, one per axis; None where all operators are fixed.
        host_strides: their values; None where the host does not have them.
        scaled: leave a float16 result scaled by the factors of `headroom`.
    """
    ndim, channels_last = len(axes), is_channels_last(x)
    steps = [
        Step(
            dim=i - ndim - channels_last,  # channels are the last axis in memory: one further to the left
            axis=axis,
            entry=i,
            raw_stride=None if host_strides is None else host_strides[i],
            dense=is_dense(axis, backend, x.dtype) or x.numel() == 0,  # FFT libraries refuse empty batches
        )
        for i, axis in enumerate(axes)
        if axis is not None
    ]
    if not steps:
        return x
    if channels_last:
        steps.reverse()  # on a CPU, 0.6 to 1.0 times as long as in the other order
    if x.dtype == torch.float16:
        factors = headroom(len(steps), scaled)
        steps = [
            step._replace(axis=step.axis._replace(gain=step.axis.gain * factor))
            for step, factor in zip(steps, factors, strict=True)
        ]
    in_order = x.movedim(-ndim - 1, -1) if channels_last else x.contiguous()
    would_cast = autocast_dtype(x) != x.dtype
    with no_autocast(x):
        y = resample(in_order, strides, steps, would_cast)
    return y.movedim(-1, -ndim - 1) if channels_last else y


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
