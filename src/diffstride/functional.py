"""The public functions: check the arguments, ask the geometry, call a backend.

Riad, Teboul, Grangier, Zeghidour, "Learning strides in convolutional neural networks", ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from diffstride import _graph, _validation, geometry
from diffstride.backends import Backend, Kind, Resampling
from diffstride.geometry import BASES, WINDOWS, Axis, Basis, Norm, Window
from diffstride.options import Bounds, LayerOptions, check_basis

__all__ = ["diffstride", "spectral_pool", "spectral_resize", "stride_mask"]


def stride_mask(
    size: int, stride: Tensor | float, smoothness: float, *, window: Window = "outer", basis: Basis = "dft"
) -> Tensor:
    """Return the window over the frequencies of an axis (Eq. 3 of the paper), not clamped to the bounds of a layer.

    Outer: `m(f) = clip((R + N/(2S) - f) / R, 0, 1)`. Inner: `m(f) = 1 - d (1 - clip((N/(2S) - f) / w, 0, 1))`, with the
    width `w = min(R, N/(4S))` and the depth `d = clip((N/2 - N/(2S)) / w, 0, 1)`: the ramp deepens as frequencies are
    removed. `R = 0`: `f <= N/(2S)`. Hard: 1 up to the highest frequency of `ceil(N/S)` samples, whatever `R`.

    Args:
        size: `N`, the number of samples of the axis.
        stride: `S >= 1`, a float or a 0-d tensor, in which the result is differentiable.
        smoothness: `R >= 0`, the width of the ramp in cycles per axis.
        window: `"outer"` (the paper: the ramp lies outside the band), `"inner"` or `"hard"`.
        basis: `"dft"`: frequencies `0 .. N//2`; `"dct"`: `0, 1/2, .. (N-1)/2`.

    Returns:
        `[N//2 + 1]` (dft) or `[N]` (dct), in the stride's dtype, float32 at least.

    Raises:
        ValueError: `size` or `stride` is below 1, `smoothness` is negative, `window` or `basis` is unknown.
    """
    _validation.integer("size", size, 1)
    _validation.one_of("window", window, WINDOWS)
    _validation.one_of("basis", basis, BASES)
    _validation.not_negative("smoothness", smoothness)
    if not isinstance(stride, Tensor):
        stride = torch.tensor(_validation.number("stride", stride))
    stride = _validation.axis_strides(stride.reshape(1))
    if stride.is_cpu:  # on a GPU the check would wait for the device
        _validation.strides_at_least_one("stride", stride.tolist())
    f = geometry.frequencies(basis, geometry.num_coefficients(size, basis), stride)
    if window == "hard":
        return geometry.hard_mask(size, stride.item(), basis, f)
    return geometry.mask(size, stride[0], float(smoothness), window, f)


def diffstride(
    x: Tensor,
    strides: Tensor | Sequence[float],
    smoothness: float = 4.0,
    *,
    output_size: int | Sequence[int] | None = None,
    bounds: Bounds = (1.0, None),
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
            can take. The clamp's backward passes a gradient that points inwards.
        smoothness: `R > 0`, the width of the ramp in cycles per axis.
        output_size: sizes in place of `N'`, so that several branches agree. Nothing is read from the device.
        bounds: `(lower, upper)` of the strides, `1 <= lower`; None for no upper bound but `N/2`. Or a pair for each
            axis; one with `(1, 1)` stays as it is.
        window: `"outer"` (the paper), `"inner"` (the ramp inside the band; maps of nominal size) or `"hard"` (no ramp).
        basis: `"dft"` (the paper) or `"dct"` (DCT-II, no wrap-around at the borders).
        norm: `"forward"` keeps the mean, `"ortho"` is the paper's Eq. 1, `"backward"` the norm of the authors' code.
        size_multiple: rounds `N'` up to a multiple of this, at most `N`.
        backend: `"fft"`, `"matmul"` or `"auto"` (per axis, by its length).

    Returns:
        The downsampled tensor, in the dtype and memory format of `x`.

    Raises:
        TypeError: `x` or `strides` is not floating point.
        ValueError: a rank is wrong, strides are not finite, `smoothness` is not > 0, an option is unknown.
    """
    strides = _validation.axis_strides(strides)
    spatial = _validation.spatial_sizes(x, len(strides))
    options = LayerOptions(
        smoothness=smoothness, bounds=bounds, window=window, basis=basis, norm=norm, size_multiple=size_multiple,
        backend=backend,
    )  # fmt: skip
    options.check_axes(len(spatial))
    # With the sizes given, strides on another device need not be read.
    host_strides = tuple(stride.item() for stride in strides) if output_size is None or strides.is_cpu else None
    _validation.finite_strides("strides", host_strides or ())
    if output_size is None:
        assert host_strides is not None
        new_sizes = options.output_sizes(spatial, host_strides)
    else:
        new_sizes = _validation.sizes("output_size", output_size, len(spatial))
    return downsample(x, strides, host_strides, new_sizes, options)


def downsample(
    x: Tensor, strides: Tensor, host_strides: Sequence[float] | None, new_sizes: Sequence[int], options: LayerOptions
) -> Tensor:
    """Downsample to known sizes; `host_strides` are the values of `strides`, or None if the host does not have them."""
    if torch.compiler.is_compiling():
        axes = [(n, new, None) for n, new in zip(x.shape[-len(new_sizes) :], new_sizes, strict=True)]
        return _graph.resample(x, axes, options.as_text(), strides)
    resampling = Resampling(Kind.of(x), options.axes(x.shape[-len(new_sizes) :], new_sizes), options.backend)
    return resampling(x, strides) if host_strides is None else resampling.at(host_strides)(x, strides)


def spectral_pool(
    x: Tensor,
    strides: Sequence[float] | Tensor,
    *,
    basis: Basis = "dft",
    norm: Norm = "forward",
    backend: Backend = "auto",
) -> Tensor:
    """Keep `floor(N/S)` samples of each axis: spectral pooling (Rippel et al. 2015) with fractional strides.

    Args:
        x: `[B, C, *spatial]` or `[C, *spatial]`.
        strides: one number >= 1 per spatial axis; never clamped.
        basis: `"dft"` or `"dct"`.
        norm: as in `diffstride`.
        backend: as in `diffstride`.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: a stride is below 1 or not finite, or leaves no sample of an axis.
    """
    _validation.a_sequence("strides", strides)
    if isinstance(strides, Tensor):
        strides = strides.tolist()
    strides = _validation.strides_at_least_one("strides", _validation.per_axis("strides", strides, len(strides)))
    return spectral_resize(
        x, pooled_sizes(_validation.spatial_sizes(x, len(strides)), strides), basis=basis, norm=norm, backend=backend
    )


def pooled_sizes(spatial: Sequence[int], strides: Sequence[float]) -> tuple[int, ...]:
    """Return `floor(N/S)` per axis; raise where nothing would be left."""
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
        TypeError: `x` is not floating point, or a size is not an int.
        ValueError: a size is below 1, or the rank is wrong.
    """
    check_basis(basis, norm, backend)
    if isinstance(size, int | Integral):
        size = (int(size),) * max(1, x.ndim - 2)
    _validation.a_sequence("size", size)
    ndim = len(size)
    _validation.spatial_sizes(x, ndim)
    new_sizes = _validation.sizes("size", size, ndim)
    if torch.compiler.is_compiling():
        axes = [(n, new, None) for n, new in zip(x.shape[-ndim:], new_sizes, strict=True)]
        options = f'{{"basis": "{basis}", "norm": "{norm}", "backend": "{backend}"}}'  # no compiler can trace `json`
        return _graph.resample(x, axes, options)
    return Resampling(Kind.of(x), resize_axes(x.shape[-ndim:], new_sizes, basis, norm), backend).at(None)(x, None)


def resize_axes(spatial: Sequence[int], new_sizes: Sequence[int], basis: Basis, norm: Norm) -> list[Axis]:
    """Return the operators of `spectral_resize`."""
    return [Axis(n, new, basis, geometry.gain(n, new, norm)) for n, new in zip(spatial, new_sizes, strict=True)]
