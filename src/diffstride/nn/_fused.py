"""The schedule of a convolution and a resampling: which axes are resampled first, how it runs, and what it costs.

With `P` the operator of an axis and `Z_i` the shift of the convolution's tap `i` (zeros come in),
`P conv(x) = sum_i W_i (P Z_i) x`. So a fused axis is resampled by all `P Z_i`, interleaved, and then convolved with
stride `kernel`. The bias passes the resampling up to its gain at frequency 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffstride import _graph
from diffstride.backends import (
    CHANNELS_LAST,
    Backend,
    Kind,
    Resampling,
    autocast_dtype,
    is_channels_last,
    is_dense,
    is_small,
    keeps_ramps,
)
from diffstride.geometry import Axis, Taps
from diffstride.options import LayerOptions

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

# The cost of resampling per element that it produces, in multiply-accumulates of a convolution: its own products, one
# per sample of the axis, and this much for memory. Measured on a CPU, about the same in float32 and bfloat16
# (`diffstride bench convolutions`).
_MACS_PER_ELEMENT = 100
# The convolution comes first unless another order costs less than this share of it.
_WORTH_IT = 0.85


class Convolution(NamedTuple):
    """The arguments of a convolution, one per axis; padding is a pair of sides."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    def full_sizes(self, spatial: Sequence[Any]) -> tuple[Any, ...]:
        """Return the output sizes at stride 1, for sizes in any kind of number."""
        return tuple(
            n + left + right - d * (k - 1)
            for n, (left, right), d, k in zip(spatial, self.padding, self.dilation, self.kernel, strict=True)
        )

    def interleaved(self, fused_axes: int) -> Convolution:
        """Return the convolution for an input in which every tap has samples of its own on the first axes."""
        return self._replace(
            padding=(*((0, 0),) * fused_axes, *self.padding[fused_axes:]),
            dilation=(*(1,) * fused_axes, *self.dilation[fused_axes:]),
            stride=(*self.kernel[:fused_axes], *self.stride[fused_axes:]),
        )

    def macs(self, sizes: Sequence[Any]) -> Any:
        """Return the multiply-accumulates on one input for these output sizes."""
        weights = self.out_channels * (self.in_channels // self.groups) * math.prod(self.kernel)
        return weights * math.prod(sizes)


def convolver(convolution: Convolution) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return the function of input, weight and bias that convolves, in the memory format of the input."""
    sides, mode, ndim = convolution.padding, convolution.padding_mode, len(convolution.kernel)
    stride, dilation, groups = convolution.stride, convolution.dilation, convolution.groups
    plain = mode == "zeros" and all(left == right for left, right in sides)
    flat = [side for pair in reversed(sides) for side in pair]
    padding = [left for left, _ in sides] if plain else 0
    conv: Callable[..., Tensor] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if plain and ndim < 3:
            return conv(x, weight, bias, stride, padding, dilation, groups)
        channels_last = is_channels_last(x)
        if not plain:
            x = F.pad(x, flat, "constant" if mode == "zeros" else mode)
        y = conv(x, weight, bias, stride, padding, dilation, groups)
        # PyTorch loses the format in 3-D in float64 and float16 on a CPU, and after circular padding.
        return y.contiguous(memory_format=CHANNELS_LAST[y.ndim]) if channels_last else y

    return convolve


def as_autocast(x: Tensor) -> Tensor:
    """Return `x` in the dtype in which a convolution takes it."""
    return x.to(autocast_dtype(x))


@dataclass(frozen=True)
class Schedule:
    """The operators of a layer in their order: `before` the convolution, the convolution, and `after` it."""

    before: tuple[Axis | None, ...]
    """The operators of the input's axes; None leaves an axis as it is."""
    after: tuple[Axis | None, ...]
    """The operators of the convolution's axes, in the same way."""
    backend: Backend
    convolution: Convolution | None = None
    """The convolution as it runs, strided on fused axes; None in a layer that only resamples."""
    bias_gain: float = 1.0
    """The factor of the bias, which comes before the operators in `after` alone."""

    @property
    def fused_axes(self) -> int:
        """The number of axes that are resampled before the convolution; they are the first ones."""
        return len(self.before) - self.before.count(None)

    def run_in_graph(self, x: Tensor, weight: Tensor, bias: Tensor | None, strides: Tensor, options: str) -> Tensor:
        """Resample and convolve `x` in a graph of `torch.compile`; `options` are those of the layer as text."""
        assert self.convolution is not None
        y = _graph.resample(x, _described(self.before), options, strides, scaled=True)
        if y.dtype == torch.float16 and self.fused_axes:
            weight = weight * 2.0**self.fused_axes  # undoes the headroom that the resampled input keeps
        bias = bias if bias is None or self.bias_gain == 1 else bias * self.bias_gain
        y = convolver(self.convolution)(y, weight, bias)
        return _graph.resample(y, _described(self.after), options, strides)

    def convolved_sizes(self, spatial: Sequence[Any], new_sizes: Sequence[Any]) -> list[Any]:
        """Return the sizes between the convolution and the operators in `after`, in any kind of number."""
        fused = self.fused_axes
        full = spatial if self.convolution is None else self.convolution.full_sizes(spatial)
        return [*new_sizes[:fused], *full[fused:]]

    def macs(self, spatial: Sequence[Any], new_sizes: Sequence[Any]) -> Any:
        """Return the convolution's multiply-accumulates on one input, for sizes in any kind of number."""
        return 0 if self.convolution is None else self.convolution.macs(self.convolved_sizes(spatial, new_sizes))

    def resampling_macs(
        self, channels: int, spatial: Sequence[Any], new_sizes: Sequence[Any], strides: Sequence[float]
    ) -> Any:
        """Return the multiply-accumulates of the dense operators on one input with so many channels.

        Sizes are any kind of number, and strides raw ones. FFTs are not counted.
        """
        after = dense_macs(self.after, self.backend, self.convolved_sizes(spatial, new_sizes), new_sizes, strides)
        if self.convolution is None:
            return channels * after
        interleaved = [taps * n for taps, n in zip(self.convolution.kernel, new_sizes, strict=True)]
        before = dense_macs(self.before, self.backend, spatial, interleaved, strides)
        return channels * before + self.convolution.out_channels * after

    def are_small(
        self, batch: int, channels: int, spatial: Sequence[int], new_sizes: Sequence[int], device: torch.device
    ) -> tuple[bool, bool]:
        """Return whether the operators before and after the convolution work on few elements."""
        out_channels = channels if self.convolution is None else self.convolution.out_channels
        between = math.prod(self.convolved_sizes(spatial, new_sizes))
        elements = batch * channels * math.prod(spatial), batch * out_channels * between
        return is_small(elements[0], device), is_small(elements[1], device)

    def saved_elements(
        self,
        channels: int,
        spatial: Sequence[Any],
        new_sizes: Sequence[Any],
        strides: Sequence[float],
        *,
        learning: bool,
        weight_learning: bool,
        small: tuple[bool, bool],
    ) -> Any:
        """Return the number of elements saved for backward on one input, without the input itself.

        Args:
            channels: the channels of the input.
            spatial: its sizes, in any kind of number.
            new_sizes: the sizes of the output, in any kind of number.
            strides: the raw strides.
            learning: True where the strides get a gradient.
            weight_learning: True where the convolution's weight gets one.
            small: True where the operators before and after the convolution work on few elements (`are_small`).
        """
        fused = self.fused_axes
        out_channels, elements = channels, 0
        resampled = [*spatial]
        if self.convolution is not None:
            out_channels = self.convolution.out_channels
            resampled[:fused] = [k * n for k, n in zip(self.convolution.kernel, new_sizes[:fused], strict=False)]
            if learning and fused < len(self.after):  # the result of the convolution
                elements = elements + out_channels * math.prod(self.convolved_sizes(spatial, new_sizes))
            if weight_learning and fused:  # the convolution saves its input
                elements = elements + channels * math.prod(resampled)
        if learning:
            before, after = small
            elements = elements + channels * _on_ramps(self.before, strides, resampled, before)
            elements = elements + out_channels * _on_ramps(self.after, strides, new_sizes, after)
        return elements


def _on_ramps(axes: Sequence[Axis | None], strides: Sequence[float], output: Sequence[Any], small: bool) -> Any:
    """Return how many coefficients on ramps are saved per channel; `output` are the sizes after the operators."""
    sizes = {i: axis.ramp_size(strides[i]) for i, axis in enumerate(axes) if axis is not None}
    if not keeps_ramps([axis for axis in axes if axis is not None], [*sizes.values()], small):
        return 0
    return sum(count * math.prod([n for j, n in enumerate(output) if j != i]) for i, count in sizes.items())


def _described(axes: Sequence[Axis | None]) -> list[Any]:
    return [a if a is None else (a.n, a.size, None if a.taps is None else a.taps[:3]) for a in axes]


class ConvDownsample:
    """A schedule for inputs of one kind (see `Resampling`)."""

    def __init__(self, schedule: Schedule, x: Tensor, recompute: bool = False) -> None:
        """Prepare the operators.

        Args:
            schedule: their order.
            x: an input of the kind, in the dtype of the convolution.
            recompute: resample the input again in backward, in place of keeping it for the weight's gradient.
        """
        assert schedule.convolution is not None
        self.recompute = recompute and schedule.fused_axes > 0
        self.schedule, self.convolve = schedule, convolver(schedule.convolution)
        self.before = Resampling(Kind.of(x), schedule.before, schedule.backend, scaled=True)
        # Undoes the headroom that the resampled input keeps.
        self.weight_gain = 2.0**schedule.fused_axes if x.dtype == torch.float16 else 1.0

    def at(self, host_strides: Sequence[float]) -> Callable[..., Tensor]:
        """Return the function of `x`, weight, bias and the raw strides, whose values are these."""
        before, after = self.before.at(host_strides), None
        bias_gain = self.schedule.bias_gain

        def conv_downsample(x: Tensor, weight: Tensor, bias: Tensor | None, strides: Tensor) -> Tensor:
            nonlocal after
            if self.weight_gain != 1:
                weight = weight * self.weight_gain
            if bias is not None and bias_gain != 1:
                bias = bias * bias_gain
            with self._saving(resampled := before(x, strides), lambda: before(x, strides)):
                y = self.convolve(resampled, weight, bias)
            if after is None:  # the kind of its input is that of the convolution's result
                after = Resampling(Kind.of(y), self.schedule.after, self.schedule.backend).at(host_strides)
            return after(y, strides)

        return conv_downsample

    def _saving(self, resampled: Tensor, again: Callable[[], Tensor]) -> AbstractContextManager[Any]:
        """Return a context in which autograd saves nothing of `resampled` if it is to be computed `again`."""
        if not self.recompute or torch._C._are_functorch_transforms_active():  # which allow no hooks
            return _NOTHING
        address = resampled.data_ptr()
        return torch.autograd.graph.saved_tensors_hooks(
            lambda saved: None if saved.data_ptr() == address else saved,
            lambda saved: again() if saved is None else saved,
        )


_NOTHING: AbstractContextManager[Any] = nullcontext()


def dense_macs(
    axes: Sequence[Axis | None],
    backend: Backend,
    sizes: Sequence[Any],
    new_sizes: Sequence[Any],
    strides: Sequence[float | None],
) -> Any:
    """Return the multiply-accumulates of float32 operators of the axes, for sizes in any kind of number.

    The axes are resampled in their order, as contiguous maps are. FFTs and the identity cost nothing.
    """
    total, present = 0, list(sizes)
    for i, (axis, n, new, stride) in enumerate(zip(axes, sizes, new_sizes, strides, strict=True)):
        if axis is not None:
            present[i] = new
            if is_dense(axis, backend, torch.float32) and not axis.is_identity(stride):
                total += math.prod(present) * n
    return total


def make_schedule(
    convolution: Convolution | None,
    options: LayerOptions,
    spatial: Sequence[int],
    new_sizes: Sequence[int],
    fused_axes: int | None = None,
) -> Schedule:
    """Build the schedule that takes an input of sizes `spatial` to `new_sizes`.

    Args:
        convolution: at stride 1; None for a layer that only resamples.
        options: options of the layer.
        spatial: the sizes of the input.
        new_sizes: the sizes of the output.
        fused_axes: 0, 1 or all; None takes the cheapest.
    """
    none: tuple[None, ...] = (None,) * len(new_sizes)
    if convolution is None:
        return Schedule(none, tuple(options.axes(spatial, new_sizes)), options.backend)
    if fused_axes is None and options.window != "outer" and convolution.full_sizes(spatial) == tuple(new_sizes):
        fused_axes = 0  # at stride 1 nothing is resampled
    fused = cheapest_fused_axes(convolution, spatial, new_sizes) if fused_axes is None else fused_axes
    axes = []
    for i, (n, new) in enumerate(zip(convolution.full_sizes(spatial), new_sizes, strict=True)):
        taps = Taps(convolution.kernel[i], convolution.dilation[i], convolution.padding[i][0], spatial[i])
        axes.append(options.axis(i, n, new, taps if i < fused else None))
    return Schedule(
        before=(*axes[:fused], *none[fused:]),
        after=(*none[:fused], *axes[fused:]),
        backend=options.backend,
        convolution=convolution.interleaved(fused),
        bias_gain=math.prod([axis.gain for axis in axes[:fused] if axis is not None]),
    )


def cheapest_fused_axes(convolution: Convolution, spatial: Sequence[int], new_sizes: Sequence[int]) -> int:
    """Return how many axes to resample before the convolution: 0, 1 or all, by what both cost together."""
    if convolution.padding_mode != "zeros":
        return 0
    ndim = len(spatial)
    plain, first, every = [_work(convolution, fused, spatial, new_sizes) for fused in (0, 1, ndim)]
    if min(first, every) > _WORTH_IT * plain:
        return 0
    return ndim if every <= first else 1


def _work(convolution: Convolution, fused: int, spatial: Sequence[int], new_sizes: Sequence[int]) -> int:
    """Return the cost of the convolution and of the resampling where `fused` axes are resampled before it."""
    full = convolution.full_sizes(spatial)
    size = [*spatial]
    work = 0
    for i in range(fused):
        size[i] = convolution.kernel[i] * new_sizes[i]
        work += convolution.in_channels * math.prod(size) * (_MACS_PER_ELEMENT + spatial[i])
    size = [*new_sizes[:fused], *full[fused:]]
    work += int(convolution.macs(size))
    for i in range(fused, len(size)):
        size[i] = new_sizes[i]
        # Long axes go to FFTs, which the shifted operators above cannot.
        work += convolution.out_channels * math.prod(size) * (_MACS_PER_ELEMENT + min(full[i], 128))
    return work
