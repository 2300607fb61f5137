"""Sizes, masks and bounds of one axis: numbers and 1-d tensors, no Module, no validation.

An axis of `N` samples has the frequencies `f` in cycles per axis. A stride `S` keeps those below the edge `N / (2 S)`;
the smoothness `R` is the width of the ramp, in frequencies, at the end of the window.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Window = Literal["outer", "inner", "hard"]
Basis = Literal["dft", "dct"]
Norm = Literal["forward", "ortho", "backward"]

WINDOWS = ("outer", "inner", "hard")
BASES = ("dft", "dct")
AXIS_NAMES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
NORM_EXPONENTS: dict[Norm, float] = {"forward": 0.0, "ortho": 0.5, "backward": 1.0}

# Keeps a float32 stride of 1.1 or 1.6 from falling under the size that its decimal value means.
_SIZE_SLACK = 1e-5
# At the lower bound of the outer window the top frequency is kept up to this: the identity, with a live gradient.
_IDENTITY_GAP = 1e-3


def num_coefficients(size: int, basis: Basis) -> int:
    """Return the number of coefficients of a real signal: `N // 2 + 1` (dft) or `N` (dct)."""
    return size // 2 + 1 if basis == "dft" else size


def top_frequency(size: int, basis: Basis) -> float:
    """Return the highest frequency of the basis in cycles per axis: `N // 2` (dft) or `(N - 1) / 2` (dct)."""
    return size // 2 if basis == "dft" else (size - 1) / 2


def output_size(size: int, stride: float, smoothness: float, window: Window = "outer", size_multiple: int = 1) -> int:
    """Return the size of the output of an axis.

    `N' = min(N, floor(N/S + 2R))` for the outer window (Algorithm 1), and `N' = min(N, max(2, ceil(N/S)))` for the
    others, rounded up to a multiple of `size_multiple`. Where that is above `N`, it is the largest multiple up to `N`,
    or `N` if there is none.
    """
    if window == "outer":
        new = math.floor(size / stride + 2 * smoothness + _SIZE_SLACK)
    else:
        new = max(2, math.ceil(size / stride - _SIZE_SLACK))
    multiple = math.ceil(new / size_multiple) * size_multiple
    return multiple if multiple <= size else size - size % size_multiple or size


def stride_range(
    size: int, smoothness: float, bounds: tuple[float, float | None], window: Window, basis: Basis
) -> tuple[float, float]:
    """Return the `(lower, upper)` to which a stride is clamped on an axis of `size`; where they cross, upper wins.

    `lower` leaves the top frequency `F` of an outer window `1 - 1e-3`: `N / (2 (F - 1e-3 R))`, so that the gradient is
    alive at `S = 1`. `upper = N / 2` leaves two samples.
    """
    lower, upper = bounds
    if window == "outer":
        edge = top_frequency(size, basis) - _IDENTITY_GAP * smoothness
        lower = max(lower, size / (2 * edge)) if edge > 0 else math.inf
    return lower, min(math.inf if upper is None else upper, size / 2)


class _ClampInward(torch.autograd.Function):
    """A clamp whose backward stops only a gradient that would push the stride further outwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(stride: Tensor, lower: float, upper: float) -> Tensor:
        return stride.clamp(min=lower).clamp(max=upper)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        stride, ctx.lower, ctx.upper = inputs
        ctx.save_for_backward(stride)
        ctx.save_for_forward(stride)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (stride,) = ctx.saved_tensors
        (grad,) = grads
        # A descent step moves against the gradient: a positive one lowers the stride.
        outwards = ((stride <= ctx.lower) & (grad > 0)) | ((stride >= ctx.upper) & (grad < 0))
        return grad.masked_fill(outwards, 0), None, None


class _ClampInwardEager(_ClampInward):
    """The clamp with forward mode, which `torch.compile` does not take."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        # The direction of descent is unknown in forward mode: outside the bounds nothing moves.
        (stride,) = ctx.saved_tensors
        return tangent.masked_fill((stride < ctx.lower) | (stride > ctx.upper), 0)


def clamp_stride(stride: Tensor, lower: float, upper: float) -> Tensor:
    """Clamp to `[lower, upper]`, where upper wins; gradients that point back inside pass, others stop."""
    function = _ClampInward if torch.compiler.is_compiling() else _ClampInwardEager
    clamped: Tensor = function.apply(stride, lower, upper)  # type: ignore[no-untyped-call]
    return clamped


class Taps(NamedTuple):
    """A convolution of `kernel` taps before the window: tap `i` reads sample `m + i dilation - left` of `length`."""

    kernel: int
    dilation: int
    left: int
    length: int


class Axis(NamedTuple):
    """One axis: `n` samples become `size`, at a stride given later.

    `P[j, i] = sum_k c_k w_k s_k(j) a_k(i)` with the weights `w` (mask times gain) and `c` from
    `backends.matmul.multiplicity`. `a` are the waves at `n` points, `s` those at `size` points. With `taps` it becomes
    `kernel` shifted operators, interleaved.
    """

    n: int
    size: int
    basis: Basis
    gain: float
    smoothness: float | None = None  # None: no window, every coefficient passes
    window: Window = "outer"
    lower: float = 1.0
    upper: float = math.inf
    taps: Taps | None = None

    @property
    def kept(self) -> int:
        """The number of coefficients kept."""
        return num_coefficients(min(self.n, self.size), self.basis)

    def clamp(self, stride: float) -> float:
        """Return the stride in use; upper wins."""
        return min(max(stride, self.lower), self.upper)

    def is_identity(self, stride: float | None) -> bool:
        """Return whether all coefficients keep their weight: at equal sizes, with no window (or a hard one) or an inner
        one at 1.
        """
        if self.n != self.size or self.taps is not None:
            return False
        return self.smoothness is None or stride is None or (self.window == "inner" and self.clamp(stride) == 1)

    def weights(self, stride: Tensor | float | None, like: Tensor) -> Tensor:
        """Return the factors of the coefficients: the mask at the clamped stride times the gain.

        When the axis grows, the Nyquist coefficient of an even `N` is halved, since it stands for `+N/2` and `-N/2`
        alike (the rule of `scipy.signal.resample`).
        """
        f = frequencies(self.basis, self.kept, like)
        if self.smoothness is None or stride is None:
            weights = torch.full_like(f, self.gain)
        else:
            weights = mask(self.n, stride, self.smoothness, self.window, f) * self.gain
        if self._nyquist_splits:
            weights = torch.cat([weights[:-1], weights[-1:] / 2])
        return weights

    @property
    def multiplicities(self) -> list[float]:
        """The factors `c_k / n` of the coefficients, times the gain; without those of the window."""
        factors = [self.gain / self.n, *[2 * self.gain / self.n] * (self.kept - 1)]
        if self.basis == "dft" and 2 * (self.kept - 1) == self.size:
            factors[-1] = self.gain / self.n
        if self._nyquist_splits:
            factors[-1] /= 2
        return factors

    def ramp_weights(self, stride: float) -> tuple[int, list[float], list[float]]:
        """Return the first coefficient on the ramp, and the mask and its slope `dm/dS` there, from numbers.

        The mask is 1 before the ramp and 0 behind it. `mask` and `mask_slope` give the same from tensors.
        """
        first, last = self.ramp(stride)
        if self.smoothness is None:
            return first, [], []
        per_cycle = 1 if self.basis == "dft" else 2
        f = [k / per_cycle for k in range(first, last)]
        if self.window == "outer":
            edge = self.n / (2 * stride)
            masks = [1 + (edge - frequency) / self.smoothness for frequency in f]
            slopes = [-edge / (stride * self.smoothness)] * len(f)
            return first, [min(max(m, 0.0), 1.0) for m in masks], slopes
        edge, width, depth, deepens = _inner(self.n, stride, self.smoothness)
        scales = edge / 2 <= self.smoothness
        masks, slopes = [], []
        for frequency in f:
            ramp = min(max((edge - frequency) / width, 0.0), 1.0)
            masks.append(1 - depth * (1 - ramp))
            falls = 0.0 if frequency > edge else 2 * frequency / (edge * stride) if scales else edge / (stride * width)
            slopes.append(-depth * falls - deepens * (1 - ramp))
        return first, masks, slopes

    def ramp(self, stride: float) -> tuple[int, int]:
        """Return the first coefficient on the ramp, both its ends included, and the one after the last."""
        if self.smoothness is None:
            return self.kept, self.kept
        low = self.n / (2 * stride)
        high = low + self.smoothness
        if self.window == "inner":
            edge, width, _, deepens = _inner(self.n, stride, self.smoothness)
            low, high = edge - width, math.inf if deepens else edge
        per_cycle = 1 if self.basis == "dft" else 2
        first = math.ceil(low * per_cycle)
        last = self.kept if high == math.inf else math.floor(high * per_cycle) + 1
        return first, max(first, min(last, self.kept))

    def slopes(self, stride: Tensor | float, like: Tensor, first: int, last: int) -> Tensor:
        """Return `d weights / d S` of the coefficients `first .. last - 1`, which are on the ramp."""
        f = frequencies(self.basis, last - first, like, first)
        if self.smoothness is None:
            return f
        slopes = mask_slope(self.n, stride, self.smoothness, self.window, f) * self.gain
        if self._nyquist_splits and last == self.kept and first < last:
            slopes = torch.cat([slopes[:-1], slopes[-1:] / 2])
        return slopes

    @property
    def rows(self) -> int:
        """The number of samples that the operator gives; with taps, those of every tap."""
        return self.size if self.taps is None else self.taps.kernel * self.size

    @property
    def columns(self) -> int:
        """The number of samples that the operator takes."""
        return self.n if self.taps is None else self.taps.length

    @property
    def unshared(self) -> list[int]:
        """The samples near the ends that not every tap reads."""
        if self.taps is None:
            return []
        kernel, dilation, left, length = self.taps
        return [i for i in range(length) if not (kernel - 1) * dilation - left <= i < self.n - left]

    def ramp_size(self, stride: float) -> int:
        """Return how many coefficients of the input the gradient of a raw stride depends on."""
        first, last = self.ramp(self.clamp(stride))
        return (last - first) * (2 if self.basis == "dft" else 1) + len(self.unshared)

    @property
    def _nyquist_splits(self) -> bool:
        return self.basis == "dft" and self.size > self.n and self.n % 2 == 0


def frequencies(basis: Basis, count: int, like: Tensor, first: int = 0) -> Tensor:
    """Return the frequencies of `count` coefficients from `first` on in cycles per axis, as a tensor like `like`."""
    k = torch.arange(first, first + count, dtype=like.dtype, device=like.device)
    return k if basis == "dft" else k / 2


def clip(x: Tensor, lower: float, upper: float) -> Tensor:
    """Clamp with a gradient at both ends, where that of `torch.clamp` stops from torch 2.14 on."""
    return torch.where(x < lower, lower, torch.where(x > upper, upper, x))


def mask(size: int, stride: Tensor | float, smoothness: float, window: Window, f: Tensor) -> Tensor:
    """Return the window at the frequencies `f`, differentiable in a 0-d `stride`.

    - Outer (Eq. 3): `m(f) = clip((R + N/(2S) - f) / R, 0, 1)`.
    - Inner: `m(f) = 1 - d (1 - clip((N/(2S) - f) / w, 0, 1))` with the width `w = min(R, N/(4S))` and the depth
      `d = clip((N/2 - N/(2S)) / w, 0, 1)`. It is 1 everywhere at `S = 1`, and the ramp is full from `S = 1.5` at the
      latest.
    - `R = 0`: `f <= N/(2S)`.

    At the ends of the ramp the gradient counts.
    """
    edge = size / (2 * stride)
    if smoothness == 0:
        return (f <= edge + _SIZE_SLACK).to(f.dtype)
    if window == "inner":
        width: Any
        depth: Any
        if isinstance(stride, Tensor):
            width = clip(size / (4 * stride), 0, smoothness)
            depth = clip((size / 2 - edge) / width, 0, 1)
        else:
            _, width, depth, _ = _inner(size, stride, smoothness)
        found: Tensor = 1 - depth * (1 - clip((edge - f) / width, 0, 1))
        return found
    # Written so that a frequency exactly at an end of the ramp gives exactly 1 or 0 in floating point.
    return clip(1 + (edge - f) / smoothness, 0, 1)


def hard_mask(size: int, stride: float, basis: Basis, f: Tensor) -> Tensor:
    """Return the hard window at the frequencies `f`: 1 for those that the samples of the output can hold."""
    return (f <= top_frequency(output_size(size, stride, 0.0, "hard"), basis)).to(f.dtype)


def mask_slope(size: int, stride: Tensor | float, smoothness: float, window: Window, f: Tensor) -> Tensor:
    """Return `dm/dS` on the ramp, differentiable in a 0-d `stride`."""
    edge = size / (2 * stride)
    if window == "outer":
        return torch.ones_like(f) * (-edge / (stride * smoothness))
    scales = edge / 2 <= smoothness  # the width is a half of the edge and moves with it
    width = edge / 2 if scales else smoothness
    falls = 2 * f / (edge * stride) if scales else torch.ones_like(f) * (edge / (stride * width))
    falls = torch.where(f > edge, 0.0, falls)
    depth = (size / 2 - edge) / width
    if depth > 1:
        return -falls
    deepens = 2.0 if scales else edge / (stride * width)
    return -depth * falls - deepens * (1 - clip((edge - f) / width, 0, 1))


def _inner(size: int, stride: float, smoothness: float) -> tuple[float, float, float, float]:
    """Return the edge of the inner window, the width and depth of its ramp, and the slope of the depth by the stride.

    The depth is the number of frequencies removed over the width, at most 1.
    """
    edge = size / (2 * stride)
    width = min(edge / 2, smoothness)
    depth = (size / 2 - edge) / width
    deepens = 2.0 if edge / 2 <= smoothness else edge / (stride * width)
    return edge, width, min(depth, 1.0), deepens if depth <= 1 else 0.0


def gain(size: int, new_size: int, norm: Norm) -> float:
    """Return the norm's factor of the mean-keeping result: 1, `sqrt(N/N')` or `N/N'`."""
    return math.pow(size / new_size, NORM_EXPONENTS[norm])
