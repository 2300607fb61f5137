"""The operator of a long axis as products with small matrices, for frozen models.

The matrix of an axis of 16,000 samples that become 8,000 would have 128 million entries. Nearly all of them belong to
pairs of a sample and a position that are far from each other. There, the operator's kernel is smooth but for the wave
at the edge of the window, so that blocks of the matrix have low rank (a uniform hierarchical matrix of one level).

Samples and positions are cut into `M` blocks. Each block of positions sees the samples of its own block and of both
neighbours through a dense matrix, and all others through a few numbers per block:

    z_J = V_J^T x_J,    s = C^T z,    y_I = D_I^T [x_(I-1), x_I, x_(I+1)] + U_I^T s_I

This takes `3 N N' / M + (M r)^2` numbers and as many multiply-accumulates per channel, with ranks `r` of about 8. An
FFT takes fewer operations, but ONNX runtimes have slow and inexact ones, and quantization does not know them.
"""

from __future__ import annotations

import itertools
import math
from typing import Self

import torch
from torch import Tensor, nn

from diffstride.backends.fft import SpectralOperator
from diffstride.geometry import Axis

LONGEST = 1 << 16
"""The longest axis: its matrices have 50 million entries and take two minutes to find."""

_TOLERANCE = 1e-8
"""Singular values of far blocks below this, relative to the operator's largest, are left out."""
_MOST = 64
"""More than the ranks that occur."""


class LongAxis(nn.Module):
    """`y = P x` along the last axis, by products with small matrices."""

    windows: Tensor
    near: Tensor
    """`D` and `V`, side by side."""
    core: Tensor
    synthesis: Tensor
    outputs: Tensor

    def __init__(self, axis: Axis, weights: Tensor) -> None:
        """Compress the operator.

        Args:
            axis: the operator, without taps.
            weights: its weights in float64.
        """
        super().__init__()
        self.size = axis.size
        operator = SpectralOperator(axis, weights)
        # The number for which the matrices are smallest at a rank of 8.
        self.blocks = blocks = max(4, round(math.cbrt(3 * axis.n * axis.size / 128)))
        starts, ends = _bounds(axis.n, blocks), _bounds(axis.size, blocks)
        longest, self.length = _longest(starts), _longest(ends)
        windows, outputs = torch.zeros(blocks, 3 * longest, dtype=torch.long), []
        near = torch.zeros(blocks, 3 * longest, self.length, dtype=torch.float64)
        bases, far = [], []
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(axis.size, _MOST, generator=generator, dtype=torch.float64)
        for j in range(blocks):
            samples = torch.arange(starts[j], starts[j + 1])
            rows = operator.apply(nn.functional.one_hot(samples, axis.n).double(), -1)  # those of P^T
            for side in (-1, 0, 1):
                i = (j - side) % blocks  # sees this block on that side
                first = (side + 1) * longest
                windows[i, first : first + len(samples)] = samples
                positions = slice(ends[i], ends[i + 1])
                near[i, first : first + len(samples), : ends[i + 1] - ends[i]] = rows[:, positions]
            for i in (j - 1, j, j + 1):
                rows[:, ends[i % blocks] : ends[i % blocks + 1]] = 0
            bases.append(_range(rows @ sketch))
            far.append(bases[-1].mT @ rows)
            outputs.append(j * self.length + torch.arange(ends[j + 1] - ends[j]))
        rank = max(basis.shape[1] for basis in bases)
        analysis = torch.zeros(blocks, 3 * longest, rank, dtype=torch.float64)
        for j, basis in enumerate(bases):
            analysis[j, longest : longest + len(basis), : basis.shape[1]] = basis
        stacked = torch.cat([nn.functional.pad(part, (0, 0, 0, rank - len(part))) for part in far])  # [M r, N']
        sketch = torch.randn(len(stacked), _MOST, generator=generator, dtype=torch.float64)
        parts = [stacked[:, ends[i] : ends[i + 1]] for i in range(blocks)]
        bases = [_range(part.mT @ sketch) for part in parts]
        self.rank = max(basis.shape[1] for basis in bases)
        synthesis = torch.zeros(blocks, self.rank, self.length, dtype=torch.float64)
        core = torch.zeros(len(stacked), blocks, self.rank, dtype=torch.float64)
        for i, (part, basis) in enumerate(zip(parts, bases, strict=True)):
            synthesis[i, : basis.shape[1], : len(basis)] = basis.mT
            core[:, i, : basis.shape[1]] = part @ basis
        self.register_buffer("windows", windows.flatten())
        self.register_buffer("near", torch.cat([near, analysis], -1))
        self.register_buffer("core", core.flatten(1))
        self.register_buffer("synthesis", synthesis)
        self.register_buffer("outputs", torch.cat(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return `P x`."""
        rows = x.flatten(0, -2)
        seen = rows.index_select(1, self.windows).view(-1, self.blocks, len(self.windows) // self.blocks)
        found = torch.bmm(seen.transpose(0, 1), self.near)
        near, parts = found[..., : self.length], found[..., self.length :]
        far = (parts.transpose(0, 1).flatten(1) @ self.core).view(-1, self.blocks, self.rank)
        y = near + torch.bmm(far.transpose(0, 1), self.synthesis)
        resampled: Tensor = y.transpose(0, 1).flatten(1).index_select(1, self.outputs)
        return resampled.view(x.shape[:-1] + (self.size,))  # noqa: RUF005  torch.fx cannot iterate over a shape

    def scaled(self, factor: float) -> Self:
        """Multiply the operator by a number."""
        self.near[..., : self.length] *= factor
        self.synthesis *= factor
        return self


def _bounds(n: int, blocks: int) -> list[int]:
    return [i * n // blocks for i in range(blocks + 1)]


def _longest(bounds: list[int]) -> int:
    return max(b - a for a, b in itertools.pairwise(bounds))


def _range(samples: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns, without those below the tolerance."""
    basis: Tensor
    basis, sizes, _ = torch.linalg.svd(samples, full_matrices=False)
    count = int((sizes > _TOLERANCE * math.sqrt(_MOST)).sum())
    return basis[:, : max(1, count)]
