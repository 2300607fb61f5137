"""The axis operator as a dense real matrix `P [size, N]`, `y = P x`."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from diffstride.geometry import Basis, num_coefficients


def apply(x: Tensor, dim: int, size: int, weights: Tensor, basis: Basis) -> Tensor:
    """Resample axis `dim` of `x` to `size` samples.

    The matrix is built in float64 where the device has it: cheap, and out of reach of TF32 and its like.
    """
    exact = weights if weights.device.type == "mps" else weights.double()
    matrix = operator(x.shape[dim], size, exact, basis).to(x.dtype)
    return F.linear(x.movedim(dim, -1), matrix).movedim(-1, dim)


def operator(n: int, size: int, weights: Tensor, basis: Basis) -> Tensor:
    """The matrix `P [size, n]` of one axis.

    dft: `P[j, i] = 1/n sum_f c_f w_f cos(2 pi f (j/size - i/n))`, `c_f = 1` for `f = 0` and `2 f = size`, else 2.
    dct: `P[j, i] = 1/n sum_k c_k w_k cos(pi k (2j+1)/(2 size)) cos(pi k (2i+1)/(2n))`, `c_k = 1` for `k = 0`, else 2.
    """
    count = len(weights)
    multiplicity = torch.full_like(weights, 2 / n)
    multiplicity[0] = 1 / n
    if basis == "dft" and 2 * (count - 1) == size:
        multiplicity[-1] = 1 / n
    weighted = multiplicity * weights
    synthesis, analysis = _waves(size, count, weights, basis), _waves(n, count, weights, basis)
    # One product for cosines and sines together: [size, waves * count] @ [waves * count, n].
    return (synthesis * weighted[:, None]).flatten(0, 1).T @ analysis.flatten(0, 1)


def _waves(n: int, count: int, like: Tensor, basis: Basis) -> Tensor:
    """The first `count` waves of the basis at `n` points: cosines and sines `[2, count, n]` or cosines `[1, ..]`."""
    # Constants are kept between calls, except where tensors only stand for others (tracing, fake tensors).
    keep = n <= _KEPT_UP_TO and type(like) is Tensor and not torch.compiler.is_compiling()
    if keep:  # one table serves every count
        return _kept_table(n, num_coefficients(n, basis), basis, like.dtype, like.device)[:, :count]
    return _table(n, count, basis, like.dtype, like.device)


def _table(n: int, count: int, basis: Basis, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used in training
        k = torch.arange(count, device=device)[:, None]
        i = torch.arange(n, device=device)[None, :]
        # The phase is reduced to one turn in integers: floating point stays exact on long axes.
        if basis == "dft":
            angle = ((k * i) % n).to(dtype) * (2 * math.pi / n)
            return torch.stack([angle.cos(), angle.sin()])
        angle = ((k * (2 * i + 1)) % (4 * n)).to(dtype) * (math.pi / (2 * n))
        return angle.cos()[None]


# At most 64 tables of 512 x 512 float64: 128 MiB at the very worst, a few in practice.
_KEPT_UP_TO = 512
_kept_table = lru_cache(maxsize=64)(_table)
