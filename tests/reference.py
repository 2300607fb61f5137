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
        if smoothness == 0:
            values.append(1.0 if f <= edge + 1e-5 else 0.0)
        elif window == "inner":
            width = min(size / (4 * stride), smoothness)
            values.append(min(max((edge - f) / width, 0.0), 1.0))
        else:
            values.append(min(max((smoothness + edge - f) / smoothness, 0.0), 1.0))
    return values


def output_size(size, stride, smoothness, window="outer", multiple=1):
    """Samples left, the 1e-5 included."""
    if window == "inner":
        new = max(2, math.ceil(size / stride - 1e-5))
    else:
        new = math.floor(size / stride + 2 * smoothness + 1e-5)
    while new % multiple:
        new += 1
    return min(size, new)


def clamped(size, stride, smoothness, window="outer", basis="dft", bounds=(1.0, math.inf)):
    """The stride that a learnable layer uses on an axis of `size`."""
    lower, upper = bounds
    upper = min(upper, size / 2)
    if window == "outer":
        top = size // 2 if basis == "dft" else (size - 1) / 2
        room = 2 * (top - 1e-3 * smoothness)
        lower = max(lower, size / room) if room > 0 else math.inf
    if stride < lower:
        stride = lower
    if stride > upper:
        stride = upper
    return stride


def resample_axis(x, new, weights, basis="dft", norm="forward"):
    """Vector of N samples to `new` samples; `weights[i]` multiplies the i-th frequency. Sums over all frequencies."""
    size = len(x)
    i = np.arange(size)
    j = np.arange(new)
    y = np.zeros(new)
    if basis == "dct":
        for k in range(min(size, new)):
            coefficient = np.sum(x * np.cos(np.pi * k * (2 * i + 1) / (2 * size))) / size
            y += (1 if k == 0 else 2) * weights[k] * coefficient * np.cos(np.pi * k * (2 * j + 1) / (2 * new))
    else:
        spectrum = {
            f: np.sum(x * np.exp(-2j * np.pi * f * i / size)) / size for f in range(-(size // 2), size // 2 + 1)
        }
        z = np.zeros(new, dtype=complex)
        for f, value in spectrum.items():
            if 2 * abs(f) > new:
                continue
            weight = weights[abs(f)]
            if 2 * abs(f) == size or 2 * abs(f) == new:
                weight = weight / 2  # +N/2 and -N/2 are one frequency: half each
            z += weight * value * np.exp(2j * np.pi * f * j / new)
        assert np.allclose(z.imag, 0, atol=1e-9 * (1 + np.abs(x).max()))
        y = z.real
    return y * (size / new) ** NORM_EXPONENT[norm]


def resample(x, news, weights, basis="dft", norm="forward"):
    """The last `len(news)` axes of an array of any number of dimensions, one after another."""
    x = np.asarray(x, dtype=np.float64)
    first = x.ndim - len(news)
    for a, (new, weight) in enumerate(zip(news, weights, strict=True)):
        axis = first + a
        shape = [*x.shape[:axis], new, *x.shape[axis + 1 :]]
        y = np.empty(shape)
        others = [range(n) for d, n in enumerate(x.shape) if d != axis]
        for index in product(*others):
            where = (*index[:axis], slice(None), *index[axis:])
            y[where] = resample_axis(x[where], new, weight, basis, norm)
        x = y
    return x


def diffstride(
    x, strides, smoothness, window="outer", basis="dft", norm="forward", multiple=1, bounds=(1.0, math.inf), excess=None
):
    """The learnable layer on the last `len(strides)` axes; sizes are those of axes of `excess` more samples."""
    news, weights = [], []
    sizes = np.shape(x)[-len(strides) :]
    for size, stride, more in zip(sizes, strides, excess or [0] * len(strides), strict=True):
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


def convolve(x, weight, bias=None, padding=0, dilation=1, groups=1):
    """Stride 1, zeros outside: `[B, C, *spatial]`, one number or one per axis for padding and dilation."""
    x, weight = np.asarray(x, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    ndim = x.ndim - 2
    padding = (padding,) * ndim if isinstance(padding, int) else padding
    dilation = (dilation,) * ndim if isinstance(dilation, int) else dilation
    out_channels, per_group = weight.shape[:2]
    kernel = weight.shape[2:]
    spatial = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(x.shape[2:], padding, dilation, kernel, strict=True)]
    y = np.zeros((x.shape[0], out_channels, *spatial))
    for o in range(out_channels):
        first = o // (out_channels // groups) * per_group
        for c in range(per_group):
            for tap in product(*map(range, kernel)):
                for place in product(*map(range, spatial)):
                    at = [m + t * d - p for m, t, d, p in zip(place, tap, dilation, padding, strict=True)]
                    if all(0 <= i < n for i, n in zip(at, x.shape[2:], strict=True)):
                        y[(slice(None), o, *place)] += weight[(o, c, *tap)] * x[(slice(None), first + c, *at)]
        if bias is not None:
            y[:, o] += float(bias[o])
    return y
