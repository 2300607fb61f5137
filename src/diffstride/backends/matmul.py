"""The axis operator as a dense real matrix `P [size, n]`, `y = P x`."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from diffstride.geometry import Axis, Basis, num_coefficients


class DenseOperator:
    """A matrix, applied along an axis; with `axis.taps` the matrix of the shifted operators, interleaved.

    It is built in the precision of the weights, float64 where the device has it, which is cheap and safe from TF32. It
    is applied in `dtype`. `slopes`, if any, are the derivatives of the weights of the coefficients `first ..` on the
    ramp, times their multiplicity.
    """

    def __init__(
        self, axis: Axis, weights: Tensor, dtype: torch.dtype, first: int = 0, slopes: Tensor | None = None
    ) -> None:
        self.axis, self.first, self.slopes = axis, first, slopes
        self.matrix = dense_matrix(axis, weights).to(dtype)
        self.size, self.length = self.matrix.shape

    @property
    def ramp_size(self) -> int:
        """The number of coefficients on the ramp."""
        return len(self._derivative_factors[0])

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """Return `P x` along `dim`."""
        return product(self.matrix, x, dim)

    def on_ramp(self, x: Tensor, dim: int) -> Tensor:
        """Return the coefficients of `x` on the ramp."""
        return product(self._derivative_factors[0], x, dim)

    def apply_and_split(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return `apply` and `on_ramp`."""
        return self.apply(x, dim), self.on_ramp(x, dim)

    def stacked(self, x: Tensor, dim: int) -> Tensor:
        """Return `apply` and below it, along `dim`, `on_ramp`."""
        return product(self._stack, x, dim)

    def adjoint(self, y: Tensor, dim: int) -> Tensor:
        """Return `P^T y` along `dim`."""
        return product(self._transposed, y, dim)

    def adjoint_on_ramp(self, y: Tensor, dim: int) -> Tensor:
        """Return the coefficients of `y` on the ramp times their slopes."""
        return product(self._derivative_factors[1], y, dim)

    def send(self, device: torch.device) -> None:
        """Move all matrices to a device, in one copy that the host does not wait for."""
        learned = self.slopes is not None
        parts = [
            self._stack if learned else self.matrix,
            self._transposed,
            *(self._derivative_factors[1:] if learned else ()),
        ]
        sent = torch.cat([part.reshape(-1) for part in parts]).to(device, non_blocking=True)
        moved = [t.view(p.shape) for t, p in zip(torch.split(sent, [p.numel() for p in parts]), parts, strict=True)]
        self.matrix, self._transposed = moved[0][: self.size], moved[1]
        if learned:
            self._stack, self._derivative_factors = moved[0], (moved[0][self.size :], moved[2])

    @cached_property
    def _transposed(self) -> Tensor:
        return self.matrix.mT.contiguous()

    @cached_property
    def _derivative_factors(self) -> tuple[Tensor, Tensor]:
        """Two thin matrices `A`, `B` with `dP/dS = B^T A`: waves on the ramp at the input, and at the output."""
        assert self.slopes is not None
        thin = _change(self.axis, self.slopes, self.first)
        # Means in place of sums at the input: within the range of float16.
        n = self.axis.n
        return (thin[0] / n).to(self.matrix.dtype), (thin[1] * n).to(self.matrix.dtype)

    @cached_property
    def _stack(self) -> Tensor:
        return torch.cat([self.matrix, self._derivative_factors[0]])


def product(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return `matrix @ x` along axis `dim < 0` of `x`, without moving an axis in memory."""
    before, n, after = x.shape[:dim], x.shape[dim], x.shape[x.ndim + dim + 1 :]
    size = matrix.shape[0]
    if dim == -1:
        return _pointwise(matrix, x) if _convolution_is_faster(matrix, x) else F.linear(x, matrix)
    planes = x.reshape(math.prod(before), n, math.prod(after))
    return torch.bmm(matrix.expand(planes.shape[0], size, n), planes).reshape(*before, size, *after)


def _convolution_is_faster(matrix: Tensor, x: Tensor) -> bool:
    # On x86, PyTorch calls MKL for float32 products and oneDNN for convolutions, 0.4-0.9 of the time on AMD.
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and x.numel() * len(matrix) > 1 << 20  # a call costs more
        and _HAS_ONEDNN
        and not torch.is_grad_enabled()  # always true within `_Resample.forward`, which runs without grad
        and not torch.compiler.is_compiling()
    )


_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _pointwise(matrix: Tensor, x: Tensor) -> Tensor:
    """Return `x @ matrix.T` as a convolution with a 1x1 kernel, rows as positions, in channels_last."""
    size, n = matrix.shape
    y = F.conv2d(x.reshape(1, -1, 1, n).permute(0, 3, 1, 2), matrix[:, :, None, None])
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], size)


def dense_matrix(axis: Axis, weights: Tensor) -> Tensor:
    """Return the matrix of one axis.

    dft: `P[j, i] = 1/n sum_f c_f w_f cos(2 pi f (j/size - i/n))`, `c_f = 1` for `f = 0` and `2 f = size`, else 2.
    dct: `P[j, i] = 1/n sum_k c_k w_k cos(pi k (2j+1)/(2 size)) cos(pi k (2i+1)/(2n))`, `c_k = 1` for `k = 0`, else 2.
    With taps: `Q[j kernel + t, i] = P[j, i - t dilation + left]`, zero where that is no sample of the convolution.
    """
    weighted = multiplicity(axis, weights) * weights
    synthesis = _waves(axis.size, axis.basis, weights, 0, axis.kept)
    analysis = _waves(axis.n, axis.basis, weights, 0, axis.kept)
    # One product for cosines and sines together: [size, waves * count] @ [waves * count, n].
    matrix = (synthesis * weighted[:, None]).flatten(0, 1).mT @ analysis.flatten(0, 1)
    return matrix if axis.taps is None else _shifted(axis, matrix).flatten(0, 1)


def _change(axis: Axis, slopes: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return `A`, `B` with `dP/dS = B^T A`, of as few rows as there are waves on the ramp.

    A shift turns the phase of a wave, so all taps of a convolution share the waves at the input. The samples near the
    ends that not every tap reads have a row of their own.
    """
    last = first + len(slopes)
    analysis = _waves(axis.n, axis.basis, slopes, first, last)
    synthesis = _waves(axis.size, axis.basis, slopes, first, last) * slopes[:, None]
    if axis.taps is None:
        return analysis.flatten(0, 1), synthesis.flatten(0, 1)
    kernel, dilation, left, length = axis.taps
    taps = torch.arange(kernel, dtype=slopes.dtype, device=slopes.device)
    turns = axis.frequencies(slopes, first, len(slopes))[:, None] * (taps * dilation - left) * (2 * math.pi / axis.n)
    cosine, sine = turns.cos()[:, None], turns.sin()[:, None]  # [r, 1, kernel]
    even, odd = (*synthesis[..., None], torch.zeros_like(synthesis[0, ..., None]))[:2]  # [r, size, 1]
    turned = torch.cat([even * cosine - odd * sine, even * sine + odd * cosine]).flatten(1)
    angle = _angle(axis.n, axis.basis, slopes, first, last, length)
    waves = torch.cat([angle.cos(), angle.sin()])
    outside = axis.unshared
    change = _shifted(axis, synthesis.flatten(0, 1).mT @ analysis.flatten(0, 1)).flatten(0, 1)
    rest = change[:, outside] - turned.mT @ waves[:, outside]
    alone = torch.eye(length, dtype=slopes.dtype, device=slopes.device)[outside]
    return torch.cat([waves, alone]), torch.cat([turned, rest.mT])


def multiplicity(axis: Axis, like: Tensor) -> Tensor:
    """Return `c_k / n`, the multiplicity of every coefficient kept, as a tensor like `like`."""
    factors = like.new_full((axis.kept,), 2 / axis.n)
    factors[0] = 1 / axis.n
    if axis.basis == "dft" and 2 * (axis.kept - 1) == axis.size:
        factors[-1] = 1 / axis.n
    return factors


def _shifted(axis: Axis, rows: Tensor) -> Tensor:
    """Shift `[rows, n]` to `[rows, kernel, length]`, for every tap of the convolution."""
    assert axis.taps is not None
    kernel, dilation, left, length = axis.taps
    taps = []
    for shift in (tap * dilation - left for tap in range(kernel)):
        first, last = max(0, shift), min(length, axis.n + shift)
        seen = rows[:, first - shift : last - shift] if first < last else rows[:, :0]
        first = min(first, length)
        taps.append(F.pad(seen, (first, length - first - seen.shape[1])))
    return torch.stack(taps, 1)


def _waves(n: int, basis: Basis, like: Tensor, first: int, last: int) -> Tensor:
    """Return waves `first .. last - 1` at `n` points: cosines and sines `[2, r, n]` or cosines `[1, r, n]`."""
    # Constants are kept between calls, except for fake tensors and in a graph.
    keep = n <= _CACHE_UP_TO_LENGTH and type(like) is Tensor and not torch.compiler.is_compiling()
    if keep:  # one table serves every count
        return _cached_table(n, 0, num_coefficients(n, basis), basis, like.dtype, like.device)[:, first:last]
    return _table(n, first, last, basis, like.dtype, like.device)


def _table(n: int, first: int, last: int, basis: Basis, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used in training
        angle = _angle(n, basis, torch.empty(0, dtype=dtype, device=device), first, last, n)
        return torch.stack([angle.cos(), angle.sin()] if basis == "dft" else [angle.cos()])


def _angle(n: int, basis: Basis, like: Tensor, first: int, last: int, points: int) -> Tensor:
    """Return `2 pi f i / n` (dft) or `pi k (2 i + 1) / (2 n)` (dct) of waves `first ..` at the first `points`."""
    k = torch.arange(first, last, device=like.device)[:, None]
    i = torch.arange(points, device=like.device)[None, :]
    # The phase is reduced to one turn in integers: floating point stays exact on long axes.
    if basis == "dft":
        return ((k * i) % n).to(like.dtype) * (2 * math.pi / n)
    return ((k * (2 * i + 1)) % (4 * n)).to(like.dtype) * (math.pi / (2 * n))


# At most 64 tables of 512 x 512 float64, 128 MiB.
_CACHE_UP_TO_LENGTH = 512
_cached_table = lru_cache(maxsize=64)(_table)
