"""The axis operator as a dense real matrix `P [size, n]`, `y = P x`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from diffstride.geometry import Axis, Basis, frequencies, num_coefficients


class DenseOperator:
    """The matrix `P [rows, columns]` of an axis; with `axis.taps` that of the shifted operators, interleaved.

    It is built in float64 where the device has it, which is cheap and safe from TF32, and applied in a dtype of the
    caller. The derivative by the stride is `dP/dS = B^T A`, where both factors are a few waves, those on the ramp of
    the window. Small operators have the derivative as a matrix, too.
    """

    def __init__(
        self, axis: Axis, transposed: Tensor, first: int = 0, slopes: Tensor | Sequence[float] | None = None
    ) -> None:
        """Make the operator.

        Args:
            axis: its sizes and options.
            transposed: `P^T`, in the dtype in which it is applied.
            first: the first coefficient on the ramp.
            slopes: the derivatives of the weights from `first` on times their multiplicities; None where the operator
                is fixed.
        """
        self.axis, self.first, self.slopes = axis, first, slopes
        self.transposed, self.matrix = transposed, transposed.t()
        self.identity: float | None = None
        """The gain, where the operator is the identity up to it."""
        self.stacked: Tensor | None = None
        """The rows of `P^T` and `(dP/dS)^T` in turn, where the derivative is a matrix."""

    @classmethod
    def from_stride(
        cls,
        axis: Axis,
        stride: float | None,
        dtype: torch.dtype,
        device: torch.device,
        *,
        derivative_first: bool = False,
        small: bool = False,
        keep: bool = True,
    ) -> DenseOperator:
        """Build the operator from numbers.

        Args:
            axis: its sizes and options.
            stride: None for a fixed operator.
            dtype: the dtype in which it is applied.
            device: the device on which it is applied.
            derivative_first: the order of the rows in `stacked`.
            small: the operator is for few elements, see `is_small`.
            keep: keep what does not depend on the stride for the next operator.
        """
        slabs = 2 if stride is not None and small and is_short(axis) and dtype != torch.float16 else 1
        analysis, synthesis, multiplicities = _tables(axis, slabs, device, keep)
        if stride is None:
            weights = multiplicities
        else:
            first, mask, slopes = axis.ramp_weights(stride)
            last = first + len(mask)
            behind = [0.0] * (axis.kept - last)
            on_ramp = multiplicities[first:last]
            slopes = [c * slope for c, slope in zip(on_ramp, slopes, strict=True)]
            weights = [*multiplicities[:first], *(c * m for c, m in zip(on_ramp, mask, strict=True)), *behind]
        waves = 2 if axis.basis == "dft" else 1
        numbers = weights * waves
        if slabs == 2:
            derivative = ([0.0] * min(first, axis.kept) + slopes + behind) * waves
            numbers = derivative + numbers if derivative_first else numbers + derivative
        # In one product, and `P^T` and its derivative row by row in turn: the products of backward then need no copies.
        rows = (analysis * _on_device(numbers, analysis)).view(-1, synthesis.shape[0]) @ synthesis
        if axis.taps is not None:  # [length, kernel, slabs, size] to [length, slabs, size, kernel]
            taps = rows.view(axis.taps.length, axis.taps.kernel, slabs, axis.size)
            rows = taps.permute(0, 2, 3, 1).reshape(-1, axis.rows)
        rows = rows.to(dtype)
        if slabs == 1:
            operator = cls(axis, rows)
        else:
            offset = axis.rows if derivative_first else 0
            operator = cls(axis, rows.as_strided((axis.columns, axis.rows), (2 * axis.rows, 1), offset))
            operator.stacked = rows
        if stride is not None:
            operator.first, operator.slopes = first, slopes
        return operator

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """Return `P x` along `dim`; `x` itself for the identity."""
        if self.identity is not None:
            return x if self.identity == 1 else x * self.identity
        return _right(x, self.transposed) if dim == -1 else _left(self.matrix, x, dim)

    def adjoint(self, y: Tensor, dim: int) -> Tensor:
        """Return `P^T y` along `dim`."""
        if self.identity is not None:
            return y if self.identity == 1 else y * self.identity
        return _right(y, self.matrix) if dim == -1 else _left(self.transposed, y, dim)

    @property
    def ramp_size(self) -> int:
        """The number of rows of `A`."""
        assert self.slopes is not None
        return len(self.slopes) * (2 if self.axis.basis == "dft" else 1) + len(self.axis.unshared)

    def apply_and_split(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return `apply` and `on_ramp`."""
        return self.apply(x, dim), self.on_ramp(x, dim)

    def with_ramp(self, x: Tensor, dim: int) -> Tensor:
        """Return `apply` and below it, along `dim`, `on_ramp`."""
        return _right(x, self._with_ramp.t()) if dim == -1 else _left(self._with_ramp, x, dim)

    def on_ramp(self, x: Tensor, dim: int) -> Tensor:
        """Return `A x` along `dim`."""
        left = self._factors[0]
        return _right(x, left.t()) if dim == -1 else _left(left, x, dim)

    def adjoint_on_ramp(self, y: Tensor, dim: int) -> Tensor:
        """Return `B y` along `dim`."""
        left = self._factors[1]
        return _right(y, left.t()) if dim == -1 else _left(left, y, dim)

    def adjoint_and_split(self, y: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return `adjoint` and `adjoint_on_ramp`."""
        return self.adjoint(y, dim), self.adjoint_on_ramp(y, dim)

    @cached_property
    def _with_ramp(self) -> Tensor:
        return torch.cat([self.matrix, self._factors[0]])

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        assert self.slopes is not None
        slopes = self.slopes
        if not isinstance(slopes, Tensor):
            slopes = _on_device(slopes, empty_like_operators(self.transposed.device))
        waves = _change(self.axis, slopes, self.first)
        # Means in place of sums at the input: within the range of float16.
        n, dtype = self.axis.n, self.transposed.dtype
        return (waves[0] / n).to(dtype), (waves[1] * n).to(dtype)


def is_small(elements: int, device: torch.device) -> bool:
    """Return whether the calls of a layer cost more than its arithmetic on so many elements.

    The derivative of an operator of a short axis is then a matrix like the operator, in place of factors of few rows.
    This saves half of the calls and is more arithmetic.
    """
    return elements <= (1 << 16 if device.type == "cpu" else 1 << 22)


def is_short(axis: Axis) -> bool:
    """Return whether an axis is so short that the derivative of its operator may be a matrix."""
    return axis.columns * axis.rows <= 32 * 32


def _left(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return `matrix @ x` along axis `dim < -1` of `x`, without moving an axis in memory."""
    before, n, after = x.shape[:dim], x.shape[dim], x.shape[x.ndim + dim + 1 :]
    planes = math.prod(before)
    product = torch.bmm(matrix.expand(planes, -1, n), x.reshape(planes, n, math.prod(after)))
    return product.view(*before, matrix.shape[0], *after)


def _right(x: Tensor, matrix: Tensor) -> Tensor:
    """Return `x @ matrix`, along the last axis."""
    return _pointwise(x, matrix) if _convolution_is_faster(x, matrix) else torch.matmul(x, matrix)


def _convolution_is_faster(x: Tensor, matrix: Tensor) -> bool:
    # On x86, PyTorch calls MKL for float32 products and oneDNN for convolutions, 0.4-0.9 of the time on AMD.
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and x.numel() * matrix.shape[1] > 1 << 20  # a call costs more
        and _HAS_ONEDNN
        and not torch.is_grad_enabled()
    )


_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _pointwise(x: Tensor, matrix: Tensor) -> Tensor:
    """Return `x @ matrix` as a convolution with a 1x1 kernel, rows as positions, in channels_last."""
    n, size = matrix.shape
    y = F.conv2d(x.reshape(1, -1, 1, n).permute(0, 3, 1, 2), matrix.t()[:, :, None, None])
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], size)


def _on_device(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as a tensor, by a copy for which the host does not wait."""
    made = torch.tensor(numbers, dtype=like.dtype)
    return made if like.is_cpu else made.to(like.device, non_blocking=True)


def _build_tables(axis: Axis, slabs: int, device: torch.device) -> tuple[Tensor, Tensor, list[float]]:
    """Return all of an operator that does not depend on its stride: waves at its input, at its output, and `c_k / n`.

    Returns:
        The waves `[columns or columns * kernel, slabs * waves]` at the input, once for each slab, `[waves, size]` at
        the output, and a number for each frequency.
    """
    like = empty_like_operators(device)
    waves = _waves(axis.n, axis.basis, like, 0, axis.kept).flatten(0, 1)
    analysis = waves.t() if axis.taps is None else _shifted(axis, waves).permute(2, 1, 0).flatten(0, 1)
    synthesis = _waves(axis.size, axis.basis, like, 0, axis.kept).flatten(0, 1)
    return analysis.repeat(1, slabs), synthesis, axis.multiplicities


_kept_tables = lru_cache(maxsize=64)(_build_tables)


def _tables(axis: Axis, slabs: int, device: torch.device, keep: bool) -> tuple[Tensor, Tensor, list[float]]:
    kernel = 1 if axis.taps is None else axis.taps.kernel
    keep = keep and slabs * axis.columns * kernel * axis.kept <= _KEEP_TABLES_UP_TO
    return (_kept_tables if keep else _build_tables)(axis, slabs, device)


# At most 64 pairs of tables of 2 MiB.
_KEEP_TABLES_UP_TO = 512 * 257


def empty_like_operators(device: torch.device) -> Tensor:
    """Return an empty tensor of the precision in which windows and matrices are built on a device."""
    return torch.empty((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


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
    f = frequencies(axis.basis, len(slopes), slopes, first)[:, None]
    turns = f * (taps * dilation - left) * (2 * math.pi / axis.n)
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
