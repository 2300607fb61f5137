"""The axis operator through `torch.fft`: transform, weigh the kept coefficients, transform back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffstride.geometry import Basis


def apply(x: Tensor, dim: int, size: int, weights: Tensor, basis: Basis) -> Tensor:
    """Resample axis `dim` of `x` to `size` samples; half precision is computed in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(dim, -1)
    weights = weights.to(wide.dtype)
    y = _dft(wide, size, weights) if basis == "dft" else _dct(wide, size, weights)
    return y.movedim(-1, dim).to(x.dtype)


def _dft(x: Tensor, size: int, weights: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x, norm="forward")[..., : len(weights)]
    y: Tensor = torch.fft.irfft(weights * spectrum, n=size, norm="forward")
    return y


def _dct(x: Tensor, size: int, weights: Tensor) -> Tensor:
    """DCT-II as the DFT of the even extension `[x, flip(x)]`, whose centre of symmetry is half a sample off."""
    n, count = x.shape[-1], len(weights)
    spectrum = torch.fft.rfft(torch.cat([x, x.flip(-1)], -1), norm="forward")[..., :count]
    # A shift by half a sample in, and by half a (new) sample out.
    k = torch.arange(count, dtype=x.dtype, device=x.device)
    phase = torch.polar(weights, k * (math.pi / 2) * (1 / size - 1 / n))
    y: Tensor = torch.fft.irfft(phase * spectrum, n=2 * size, norm="forward")
    return y[..., :size]
