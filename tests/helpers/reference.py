"""The operators once more: naive sums in float64 with numpy, written from the formulas, importing nothing of ours."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

NORM_EXPONENT = {"forward": 0.0, "ortho": 0.5, "backward": 1.0}


def mask(size, stride, smoothness, window="outer", basis="dft"):
    """One value per frequency 0, 1, .. N//2 (dft) or 0, 1/2, .. (N-1)/2 (dct)."""
    frequencies = list(range(size // 2 + 1)) if basis == "dft" else [k / 2 for k in range(size)]
    edge = size / (2 * stride)
    values = []
    for f in frequencies:
        if window == "hard":  # those that the new samples cannot hold are left out by `resample_axis`
            values.append(1.0)
        elif smoothness == 0:
            values.append(1.0 if f <= edge + 1e-5 else 0.0)
        elif window == "inner":
            width = min(size / (4 * stride), smoothness)
            values.append(1 - depth(size, stride, smoothness) * (1 - min(max((edge - f) / width, 0.0), 1.0)))
        else:
            values.append(min(max((smoothness + edge - f) / smoothness, 0.0), 1.0))
    return values


def depth(size, stride, smoothness):
    """The depth of an inner ramp: the frequencies that are removed over its width, at most 1."""
    removed = size / 2 - size / (2 * stride)
    return min(removed / min(size / (4 * stride), smoothness), 1.0)


def output_size(size, stride, smoothness, window="outer", multiple=1):
    """Samples left, the 1e-5 included."""
    if window in ("inner", "hard"):
        new = max(2, math.ceil(size / stride - 1e-5))
    else:
        new = math.floor(size / stride + 2 * smoothness + 1e-5)
    while new % multiple:
        new += 1
    while new > size:
        new -= multiple
    return new if new > 0 else size


def stride_range(size, smoothness, window="outer", basis="dft", bounds=(1.0, math.inf)):
    """Return the bounds of a stride on an axis of `size`. Where they cross, the upper one wins."""
    lower, upper = bounds
    if window == "outer":
        top = size // 2 if basis == "dft" else (size - 1) / 2
        room = 2 * (top - 1e-3 * smoothness)
        lower = max(lower, size / room) if room > 0 else math.inf
    return lower, min(upper, size / 2)


def clamped(size, stride, smoothness, window="outer", basis="dft", bounds=(1.0, math.inf)):
    """The stride that a learnable layer uses on an axis of `size`."""
    lower, upper = stride_range(size, smoothness, window, basis, bounds)
    if stride < lower:
        stride = lower
    if stride > upper:
        stride = upper
    return stride


def ramp(size, stride, smoothness, window="outer"):
    """The frequencies between which the mask moves with the stride."""
    edge = size / (2 * stride)
    if window == "hard":
        return math.inf, -math.inf
    if window == "outer":
        return edge, edge + smoothness
    deepens = size / 2 - edge <= min(edge / 2, smoothness)
    return edge - min(edge / 2, smoothness), (math.inf if deepens else edge)


def mask_slope(size, stride, smoothness, window="outer", basis="dft"):
    """How `mask` moves with the stride, one value per frequency; the ends of the ramp are part of it."""
    frequencies = list(range(size // 2 + 1)) if basis == "dft" else [k / 2 for k in range(size)]
    edge = size / (2 * stride)
    edge_slope = -size / (2 * stride**2)
    low, high = ramp(size, stride, smoothness, window)
    values = []
    for f in frequencies:
        if not low <= f <= high:
            values.append(0.0)
        elif window == "outer":
            values.append(edge_slope / smoothness)
        else:  # the product rule for m = 1 - d (1 - r)
            width = min(edge / 2, smoothness)
            width_slope = edge_slope / 2 if edge / 2 <= smoothness else 0.0
            r, r_slope = 0.0, 0.0
            if f <= edge:
                r = (edge - f) / width
                r_slope = (edge_slope * width - (edge - f) * width_slope) / width**2
            removed = size / 2 - edge
            d, d_slope = 1.0, 0.0
            if removed <= width:
                d = removed / width
                d_slope = (-edge_slope * width - removed * width_slope) / width**2
            values.append(d * r_slope - d_slope * (1 - r))
    return values


def inwards(gradient, stride, lower, upper):
    """Return the part of a gradient that the clamp passes: descent must not move further out of the range."""
    if (stride <= lower and gradient > 0) or (stride >= upper and gradient < 0):
        return 0.0
    return gradient


def resample_axis(x, new, weights, basis="dft", norm="forward"):
    """The last axis, from N samples to `new`; `weights[i]` multiplies the i-th frequency. Sums over all frequencies."""
    x = np.asarray(x, dtype=np.float64)
    size = x.shape[-1]
    i = np.arange(size)
    j = np.arange(new)
    y = np.zeros((*x.shape[:-1], new))
    if basis == "dct":
        for k in range(min(size, new)):
            coefficient = np.sum(x * np.cos(np.pi * k * (2 * i + 1) / (2 * size)), -1, keepdims=True) / size
            y += (1 if k == 0 else 2) * weights[k] * coefficient * np.cos(np.pi * k * (2 * j + 1) / (2 * new))
    else:
        z = y.astype(complex)
        for f in range(-(size // 2), size // 2 + 1):
            if 2 * abs(f) > new:
                continue
            coefficient = np.sum(x * np.exp(-2j * np.pi * f * i / size), -1, keepdims=True) / size
            weight = weights[abs(f)]
            if 2 * abs(f) == size or 2 * abs(f) == new:
                weight = weight / 2  # +N/2 and -N/2 are one frequency: half each
            z += weight * coefficient * np.exp(2j * np.pi * f * j / new)
        assert np.allclose(z.imag, 0, atol=1e-9 * (1 + np.abs(x).max(initial=0)) * (1 + np.abs(weights).max()))
        y = z.real
    return y * (size / new) ** NORM_EXPONENT[norm]


def matrix(size, new, weights, basis="dft", norm="forward"):
    """`[new, size]`: what `resample_axis` makes of every unit vector."""
    return resample_axis(np.eye(size), new, weights, basis, norm).T


def along_axes(matrices, x):
    """Each matrix along one of the last axes."""
    for axis, one in enumerate(matrices, np.ndim(x) - len(matrices)):
        x = np.moveaxis(np.tensordot(one, x, (1, axis)), 0, axis)
    return x


def resample(x, news, weights, basis="dft", norm="forward"):
    """The last `len(news)` axes of an array of any number of dimensions, one after another."""
    x = np.asarray(x, dtype=np.float64)
    for axis, (new, weight) in enumerate(zip(news, weights, strict=True), x.ndim - len(news)):
        x = np.moveaxis(resample_axis(np.moveaxis(x, axis, -1), new, weight, basis, norm), -1, axis)
    return x


def diffstride(
    x,
    strides,
    smoothness,
    window="outer",
    basis="dft",
    norm="forward",
    multiple=1,
    bounds=(1.0, math.inf),
    size_offset=None,
):
    """The learnable layer on the last `len(strides)` axes; sizes are those of axes of `size_offset` more samples."""
    news, weights = [], []
    sizes = np.shape(x)[-len(strides) :]
    for size, stride, more in zip(sizes, strides, size_offset or [0] * len(strides), strict=True):
        larger = clamped(size + more, stride, smoothness, window, basis, bounds)
        news.append(output_size(size + more, larger, smoothness, window, multiple))
        used = clamped(size, stride, smoothness, window, basis, bounds)
        weights.append(mask(size, used, smoothness, window, basis))
    return resample(x, news, weights, basis, norm)


def spectral_pool(x, strides, basis="dft", norm="forward"):
    """The fixed pool on the last `len(strides)` axes."""
    sizes = np.shape(x)[-len(strides) :]
    news = [output_size(n, s, 0) for n, s in zip(sizes, strides, strict=True)]
    weights = [mask(n, s, 0, basis=basis) for n, s in zip(sizes, strides, strict=True)]
    return resample(x, news, weights, basis, norm)


def spectral_resize(x, news, basis="dft", norm="forward"):
    """Any sizes, up or down."""
    sizes = np.shape(x)[-len(news) :]
    ones = [[1.0] * (n // 2 + 1 if basis == "dft" else n) for n in sizes]
    return resample(x, news, ones, basis, norm)


def convolve(x, weight, bias=None, padding=0, dilation=1, groups=1, padding_mode="zeros"):
    """Stride 1, `[B, C, *spatial]`; one number or one per axis for dilation, one or one per axis and side for padding.

    One tap after another, each a product of `[out, in]` with the samples it sees.
    """
    x, weight = np.asarray(x, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    at, windows = _taps(x.shape[2:], weight.shape[2:], padding, dilation, padding_mode)
    samples = _with_zero(x)[..., at]
    y = 0.0
    for tap, window in windows:
        seen = samples[(..., *window)]
        y = y + np.concatenate(
            [
                np.einsum("oc,bc...->bo...", w, s)
                for w, s in zip(np.split(weight[(..., *tap)], groups), np.split(seen, groups, 1), strict=True)
            ],
            axis=1,
        )
    return y if bias is None else y + np.asarray(bias).reshape(-1, *[1] * (x.ndim - 2))


def convolve_adjoint(x, weight, upstream, padding=0, dilation=1, groups=1, padding_mode="zeros"):
    """Gradients of `x`, `weight` and `bias` where that of the result is `upstream`: every tap of `convolve` again."""
    x, weight = np.asarray(x, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    at, windows = _taps(x.shape[2:], weight.shape[2:], padding, dilation, padding_mode)
    flat = _with_zero(x)
    samples = flat[..., at]
    of_samples, of_flat, of_weight = np.zeros_like(samples), np.zeros_like(flat), np.zeros_like(weight)
    summed = (0, *range(2, x.ndim))
    parts = list(zip(np.split(upstream, groups, 1), np.split(np.arange(len(weight)), groups), strict=True))
    for tap, window in windows:
        seen = np.split(samples[(..., *window)], groups, 1)
        for (g, rows), s in zip(parts, seen, strict=True):
            of_weight[(rows, slice(None), *tap)] = np.tensordot(g, s, (summed, summed))
        of_samples[(..., *window)] += np.concatenate(
            [np.einsum("oc,bo...->bc...", weight[(rows, slice(None), *tap)], g) for g, rows in parts], axis=1
        )
    np.add.at(of_flat, (..., at), of_samples)
    return of_flat[..., :-1].reshape(x.shape), of_weight, upstream.sum(summed)


def _with_zero(x):
    """`[B, C, *spatial]` to `[B, C, samples + 1]`: the last one is the zero that padding reads."""
    flat = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    return np.concatenate([flat, np.zeros((*x.shape[:2], 1))], axis=-1)


def _taps(spatial, kernel, padding, dilation, padding_mode):
    """Which sample lies where once padded (-1: none, a zero), and for each tap the part of it that the tap sees."""
    padding = [(p, p) if isinstance(p, int) else p for p in _per_axis(padding, len(kernel))]
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[padding_mode]
    constant = {"constant_values": -1} if mode == "constant" else {}
    at = np.pad(np.arange(math.prod(spatial)).reshape(spatial), padding, mode, **constant)
    dilation = _per_axis(dilation, len(kernel))
    sizes = [n - d * (k - 1) for n, d, k in zip(at.shape, dilation, kernel, strict=True)]
    return at, [
        (tap, tuple(slice(t * d, t * d + n) for t, d, n in zip(tap, dilation, sizes, strict=True)))
        for tap in product(*map(range, kernel))
    ]


def _per_axis(value, ndim):
    return (value,) * ndim if isinstance(value, int) else value
