"""The operators: check, ask the geometry, call a backend. The paper's equations, once.

Riad, Teboul, Grangier, Zeghidour, "Learning strides in convolutional neural networks", ICLR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffstride import _validation, geometry
from diffstride.backends import BACKENDS, CHANNELS_LAST, Backend, along_axes, autocast_dtype, is_channels_last
from diffstride.geometry import BASES, NORM_EXPONENTS, WINDOWS, Axis, Basis, Norm, Window

__all__ = ["diffstride", "spectral_pool", "spectral_resize", "stride_mask"]


def stride_mask(
    size: int, stride: Tensor | float, smoothness: float, *, window: Window = "outer", basis: Basis = "dft"
) -> Tensor:
    """The window over the frequencies of an axis (Eq. 3 of the paper), not clamped to the bounds of a layer.

    Outer: `m(f) = clip((R + N/(2S) - f) / R, 0, 1)`. Inner: `m(f) = clip((N/(2S) - f) / w, 0, 1)`,
    `w = min(N/(4S), R)`. `R = 0`: the hard window `f <= N/(2S)`.

    Args:
        size: `N`, the number of samples of the axis.
        stride: `S >= 1`, a float or a 0-d tensor, in which the result is differentiable.
        smoothness: `R >= 0`, the width of the ramp in cycles per axis.
        window: `"outer"` (the paper: the ramp lies outside the band) or `"inner"`.
        basis: `"dft"`: frequencies `0 .. N//2`; `"dct"`: `0, 1/2, .. (N-1)/2`.

    Returns:
        `[N//2 + 1]` (dft) or `[N]` (dct), in the stride's dtype, float32 at least.

    Raises:
        ValueError: a size below 1, a stride below 1 or not finite, a negative smoothness, an unknown window or basis.
    """
    _validation.positive_int("size", size)
    _validation.one_of("window", window, WINDOWS)
    _validation.one_of("basis", basis, BASES)
    _validation.not_negative("smoothness", smoothness)
    if not isinstance(stride, Tensor):
        stride = torch.tensor(_validation.number("stride", stride))
    stride = _validation.axis_strides(stride.reshape(-1))
    if len(stride) != 1:
        raise ValueError(f"stride must be one number, got {len(stride)}")
    if stride.is_cpu:  # on a GPU the check would wait for the device
        _validation.strides_at_least_one("stride", stride.tolist())
    f = geometry.frequencies(basis, geometry.num_coefficients(size, basis), stride)
    return geometry.mask(size, stride[0], float(smoothness), window, f)


def diffstride(
    x: Tensor,
    strides: Tensor | Sequence[float],
    smoothness: float = 4.0,
    *,
    output_size: int | Sequence[int] | None = None,
    bounds: tuple[float, float | None] = (1.0, None),
    window: Window = "outer",
    basis: Basis = "dft",
    norm: Norm = "forward",
    size_multiple: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """Downsample by real-valued strides through a low-pass window (Algorithm 1), differentiable in `x` and `strides`.

    Along each spatial axis, `y = irfft((m * rfft(x))[: N'//2 + 1], n=N')` with the mask of `stride_mask` and
    `N' = min(N, floor(N/S + 2R))` (outer window) or `min(N, max(2, ceil(N/S)))` (inner).

    Args:
        x: `[B, C, *spatial]` or `[C, *spatial]`, floating point; `channels_last` goes in and comes out.
        strides: `[d]`, one per spatial axis (their number is `d`), used clamped to `bounds` and to what an axis
            can take; the clamp's backward passes a gradient that points inwards.
        smoothness: `R > 0`, the width of the ramp in cycles per axis.
        output_size: sizes to use in place of `N'`, so that several branches agree; reads nothing from the device.
        bounds: `(lower, upper)` of the strides, `1 <= lower`; None for no upper bound but `N/2`.
        window: `"outer"` (the paper) or `"inner"` (the ramp inside the band; maps of nominal size).
        basis: `"dft"` (the paper) or `"dct"` (DCT-II, no wrap-around at the borders).
        norm: `"forward"` keeps the mean, `"ortho"` is the paper's Eq. 1, `"backward"` the authors' code.
        size_multiple: rounds `N'` up to a multiple of this, at most `N`.
        backend: `"fft"`, `"matmul"` or `"auto"` (per axis, by its length).

    Returns:
        The downsampled tensor, in the dtype and memory format of `x`.

    Raises:
        TypeError: `x` or `strides` not floating point.
        ValueError: a wrong rank, strides that are not finite, `smoothness` not > 0, an unknown option.
    """
    strides = _validation.axis_strides(strides)
    spatial = _validation.spatial_sizes(x, len(strides))
    smoothness = _validation.positive_smoothness(smoothness)
    bounds = _validation.stride_bounds(bounds)
    _validation.one_of("window", window, WINDOWS)
    _check_options(basis, norm, backend)
    _validation.positive_int("size_multiple", size_multiple)
    settings = Settings(smoothness, bounds, window, basis, norm, size_multiple, backend)
    # With the sizes given, strides on another device need not be read.
    host_strides = tuple(stride.item() for stride in strides) if output_size is None or strides.is_cpu else None
    if output_size is None:
        assert host_strides is not None
        new_sizes = output_sizes(spatial, host_strides, settings)
    else:
        new_sizes = _validation.sizes("output_size", output_size, len(spatial))
        _validation.finite_strides("strides", host_strides or ())
    return downsample(x, strides, host_strides, new_sizes, settings)


class Settings(NamedTuple):
    """The options of a learnable layer, checked; `diffstride` says what they mean."""

    smoothness: float
    bounds: tuple[float, float | None]
    window: Window
    basis: Basis
    norm: Norm
    size_multiple: int
    backend: Backend

    def axis(self, size: int, new_size: int, taps: geometry.Taps | None = None) -> Axis:
        """The operator from `size` to `new_size` samples, but for the stride."""
        return Axis(
            size,
            new_size,
            self.basis,
            geometry.gain(size, new_size, self.norm),
            self.smoothness,
            self.window,
            *geometry.stride_range(size, self.smoothness, self.bounds, self.window, self.basis),
            taps,
        )


def downsample(
    x: Tensor, strides: Tensor, host_strides: Sequence[float] | None, new_sizes: Sequence[int], settings: Settings
) -> Tensor:
    """`diffstride` with everything settled; `host_strides` are the values of `strides` if the host has them."""
    axes = [settings.axis(n, new) for n, new in zip(x.shape[-len(new_sizes) :], new_sizes, strict=True)]
    return along_axes(x, axes, settings.backend, strides, host_strides)


PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
Order = Literal["convolve first", "resample first", "resample the first axis"]


class Convolution(NamedTuple):
    """A convolution of stride 1, checked: taps, padding on either side, dilation of each axis."""

    kernel: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def unchecked_sizes(self, spatial: Sequence[Any]) -> tuple[Any, ...]:
        """The sizes it gives, at stride 1, in whatever kind of number."""
        return tuple(
            n + left + right - d * (k - 1)
            for n, (left, right), d, k in zip(spatial, self.padding, self.dilation, self.kernel, strict=True)
        )

    def sizes(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The sizes it gives, at stride 1."""
        sampled = self.unchecked_sizes(spatial)
        if min(sampled) < 1:
            raise ValueError(f"kernel_size must fit the padded input, got {self.kernel} for sizes {tuple(spatial)}")
        return sampled


def conv_downsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: Tensor,
    host_strides: Sequence[float] | None,
    new_sizes: Sequence[int],
    convolution: Convolution,
    settings: Settings,
    order: Order | None = None,
) -> Tensor:
    """A convolution of stride 1, then `downsample`, in the cheapest order.

    With `P` the operator of an axis and `Z_i` the shift of tap `i` (zeros come in), `P conv(x) = sum_i W_i (P Z_i) x`:
    the input is resampled by all `P Z_i`, interleaved, and convolved with stride `kernel`. The bias passes the
    resampling up to its gain at frequency 0.
    """
    ndim = len(new_sizes)
    spatial = tuple(x.shape[-ndim:])
    sampled = convolution.sizes(spatial)
    if order is None:
        out_channels, in_channels = weight.shape[:2]
        order = cheapest_order((out_channels, in_channels), spatial, new_sizes, convolution)
    x = as_autocast(x)
    fused = fused_axes(order, ndim)
    before, after, gain = [], [], 1.0
    for i in range(ndim):
        taps = geometry.Taps(convolution.kernel[i], convolution.dilation[i], convolution.padding[i][0], spatial[i])
        axis = settings.axis(sampled[i], new_sizes[i], taps if i < fused else None)
        before.append(axis if i < fused else None)
        after.append(None if i < fused else axis)
        gain *= axis.gain if i < fused else 1.0
    y = along_axes(x, before, settings.backend, strides, host_strides, scaled=True)
    if fused and y.dtype == torch.float16:
        weight = weight * 2.0**fused  # undoes the headroom that the resampled input keeps
    y = convolve(y, weight, bias if bias is None or gain == 1 else bias * gain, convolution, fused)
    return along_axes(y, after, settings.backend, strides, host_strides)


def as_autocast(x: Tensor) -> Tensor:
    """In the dtype in which a convolution would take it."""
    return x.to(autocast_dtype(x))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    convolution: Convolution,
    fused: int = 0,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The convolution, where `fused` axes come interleaved: each tap has its own sample. Other axes may be strided."""
    kernel, padding, dilation, groups, mode = convolution
    ndim = len(kernel)
    stride = [k if i < fused else s for i, (k, s) in enumerate(zip(kernel, strides or [1] * ndim, strict=True))]
    dilation = tuple(1 if i < fused else d for i, d in enumerate(dilation))
    sides = [(0, 0) if i < fused else p for i, p in enumerate(padding)]
    plain = mode == "zeros" and all(left == right for left, right in sides)
    channels_last = is_channels_last(x)
    if not plain:
        if mode in ("reflect", "circular"):
            _check_mirror(sides, x.shape[-ndim:], mode)
        flat = [side for pair in reversed(sides) for side in pair]
        x = F.pad(x, flat, "constant" if mode == "zeros" else mode)
    conv: Callable[..., Tensor] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]
    y = conv(x, weight, bias, stride, [left for left, _ in sides] if plain else 0, dilation, groups)
    # In 3-D in float64 and float16 on a CPU, and after circular padding, PyTorch leaves the format.
    return y.contiguous(memory_format=CHANNELS_LAST[y.ndim]) if channels_last else y


def _check_mirror(sides: Sequence[tuple[int, int]], spatial: Sequence[int], mode: str) -> None:
    """What lies outside is made of what lies inside, once: all samples, but for the border's own when mirrored."""
    for size, side in zip(spatial, sides, strict=True):
        most = size - 1 if mode == "reflect" else size
        if max(side) > most:
            raise ValueError(f"padding must be <= {most} for {size} samples with padding_mode={mode!r}, got {side}")


# What resampling costs per element that it produces, in multiply-accumulates of a convolution: its own products, one
# per sample of the axis, and this much for memory; and how much cheaper an order must look before the plain one is
# left. Measured on a CPU, about the same in float32 and bfloat16 (`diffstride bench convolutions`).
_MACS_PER_ELEMENT = 100
_WORTH_IT = 0.85


def cheapest_order(
    channels: tuple[int, int], spatial: Sequence[int], new_sizes: Sequence[int], convolution: Convolution
) -> Order:
    """Whether to convolve or to resample first, by what both cost together; `channels` are `[out, in / groups]`."""
    if convolution.padding_mode != "zeros":
        return "convolve first"
    plain, *others = (
        sum(convolution_work(fused, channels, spatial, new_sizes, convolution)) for fused in (0, 1, len(spatial))
    )
    if min(others) > _WORTH_IT * plain:
        return "convolve first"
    return "resample first" if others[-1] <= others[0] else "resample the first axis"


def convolution_macs(
    channels: tuple[int, int], spatial: Sequence[int], new_sizes: Sequence[int], convolution: Convolution
) -> int:
    """Multiply-accumulates of the convolution on one input, in the order that `conv_downsample` takes."""
    fused = fused_axes(cheapest_order(channels, spatial, new_sizes, convolution), len(spatial))
    return convolution_work(fused, channels, spatial, new_sizes, convolution)[0]


def fused_axes(order: Order, ndim: int) -> int:
    return {"convolve first": 0, "resample the first axis": 1, "resample first": ndim}[order]


def convolution_work(
    fused: int,
    channels: tuple[int, int],
    spatial: Sequence[int],
    new_sizes: Sequence[int],
    convolution: Convolution,
) -> tuple[int, int]:
    """MACs of the convolution, and the cost of resampling, where `fused` axes are resampled before it."""
    out_channels, in_channels = channels[0], channels[1] * convolution.groups
    sampled = convolution.unchecked_sizes(spatial)
    resampling = 0
    size = list(spatial)
    for i in range(fused):
        size[i] = convolution.kernel[i] * new_sizes[i]
        resampling += in_channels * math.prod(size) * (_MACS_PER_ELEMENT + spatial[i])
    size = [*new_sizes[:fused], *sampled[fused:]]
    macs = math.prod(channels) * math.prod(convolution.kernel) * math.prod(size)
    for i in range(fused, len(size)):
        size[i] = new_sizes[i]
        # Long axes go to FFTs, which the shifted operators above cannot.
        resampling += out_channels * math.prod(size) * (_MACS_PER_ELEMENT + min(sampled[i], 128))
    return macs, resampling


def output_sizes(
    spatial: Sequence[int], strides: Sequence[float], settings: Settings, owner: object = None
) -> tuple[int, ...]:
    """The sizes that `diffstride` gives: host numbers in, ints out. `owner` is the layer to name in errors."""
    smoothness, bounds, window, basis, _, size_multiple, _ = settings
    _validation.finite_strides("stride", strides, owner)
    _validation.positive_int("size_multiple", size_multiple)
    new_sizes = []
    for size, stride in zip(spatial, strides, strict=True):
        lower, upper = geometry.stride_range(size, smoothness, bounds, window, basis)
        used = min(max(stride, lower), upper)
        new_sizes.append(geometry.output_size(size, used, smoothness, window, size_multiple))
    return tuple(new_sizes)


def spectral_pool(
    x: Tensor,
    strides: Sequence[float] | Tensor,
    *,
    basis: Basis = "dft",
    norm: Norm = "forward",
    backend: Backend = "auto",
) -> Tensor:
    """Fixed spectral pooling (Rippel et al. 2015) with fractional strides: keep `floor(N/S)` samples of each axis.

    Args:
        x: `[B, C, *spatial]` or `[C, *spatial]`.
        strides: one number >= 1 per spatial axis; never clamped.
        basis: `"dft"` or `"dct"`.
        norm: as in `diffstride`.
        backend: as in `diffstride`.

    Raises:
        TypeError: `x` not floating point.
        ValueError: a stride below 1 or not finite, or one that leaves no sample of an axis.
    """
    _validation.a_sequence("strides", strides)
    if isinstance(strides, Tensor):
        strides = strides.tolist()
    strides = _validation.strides_at_least_one("strides", _validation.per_axis("strides", strides, len(strides)))
    return spectral_resize(
        x, pooled_sizes(_validation.spatial_sizes(x, len(strides)), strides), basis=basis, norm=norm, backend=backend
    )


def pooled_sizes(spatial: Sequence[int], strides: Sequence[float]) -> tuple[int, ...]:
    """`floor(N/S)` per axis; raises where nothing would be left."""
    new_sizes = tuple(geometry.output_size(size, stride, 0.0) for size, stride in zip(spatial, strides, strict=True))
    if 0 in new_sizes:
        raise ValueError(f"strides must be <= the input's sizes {tuple(spatial)}, got {tuple(strides)}")
    return new_sizes


def spectral_resize(
    x: Tensor,
    size: int | Sequence[int],
    *,
    basis: Basis = "dft",
    norm: Norm = "forward",
    backend: Backend = "auto",
) -> Tensor:
    """Resize every spatial axis to any size, down by cropping the spectrum or up by padding it with zeros.

    Upwards, the Nyquist coefficient of an even `N` is halved and mirrored (the rule of `scipy.signal.resample`).
    Signals whose frequencies lie below half of every size involved pass unchanged.

    Args:
        x: `[B, C, *spatial]`, or `[C, *spatial]` when `size` is a sequence of one entry fewer than `x.ndim`.
        size: one int per spatial axis; an int alone stands for every axis of a batched `x`.
        basis: `"dft"` aligns sample 0, `"dct"` aligns half-samples.
        norm: as in `diffstride`.
        backend: as in `diffstride`.

    Raises:
        TypeError: `x` not floating point, a size that is not an int.
        ValueError: a size below 1, a wrong rank.
    """
    _check_options(basis, norm, backend)
    if isinstance(size, int) and not isinstance(size, bool):
        size = (size,) * max(1, getattr(x, "ndim", 0) - 2)
    _validation.a_sequence("size", size)
    ndim = len(size)  # type: ignore[arg-type]
    _validation.spatial_sizes(x, ndim)
    new_sizes = _validation.sizes("size", size, ndim)
    axes = [Axis(n, new, basis, geometry.gain(n, new, norm)) for n, new in zip(x.shape[-ndim:], new_sizes, strict=True)]
    return along_axes(x, axes, backend)


def _check_options(basis: Basis, norm: Norm, backend: Backend) -> None:
    _validation.one_of("basis", basis, BASES)
    _validation.one_of("norm", norm, tuple(NORM_EXPONENTS))
    _validation.one_of("backend", backend, BACKENDS)
