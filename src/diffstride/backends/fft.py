"""The axis operator through `torch.fft`: transform, weigh the kept coefficients, transform back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffstride.geometry import Axis, Basis


class SpectralOperator:
    """`y = irfft((w * rfft(x))[:K], n=size)` along an axis of `n` samples, or the same with the DCT-II.

    `slopes`, if any, are the derivatives of the weights of the coefficients `first ..` on the ramp, times their
    multiplicity.
    """

    def __init__(self, axis: Axis, weights: Tensor, first: int = 0, slopes: Tensor | None = None) -> None:
        assert axis.taps is None, "convolutions are fused into dense operators only"
        self.length, self.size, self.basis = axis.n, axis.size, axis.basis
        self.weights = weights
        self.first, self.slopes = first, slopes
        self.identity: float | None = None
        """The gain, where the operator is the identity up to it."""

    @property
    def ramp_size(self) -> int:
        """The number of coefficients on the ramp, cosines and sines."""
        assert self.slopes is not None
        return len(self.slopes) * (2 if self.basis == "dft" else 1)

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """Return `P x` along `dim`; `x` itself for the identity."""
        if self.identity is not None:
            return x if self.identity == 1 else x * self.identity
        if x.numel() == 0:  # FFT libraries refuse them
            return x.new_empty([*x.shape[:dim], self.size, *x.shape[x.ndim + dim + 1 :]])
        return self._synthesise(_analyse(x, dim, self.basis), self.weights / self.length, self.size, x, dim)

    def apply_and_split(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return `apply` and `on_ramp` from one transform."""
        spectrum = _analyse(x, dim, self.basis)
        y = self._synthesise(spectrum, self.weights / self.length, self.size, x, dim)
        return y, self._on_ramp(spectrum, None, x, dim)

    def on_ramp(self, x: Tensor, dim: int) -> Tensor:
        """Return the coefficients of `x` on the ramp."""
        return self._on_ramp(_analyse(x, dim, self.basis), None, x, dim)

    def adjoint(self, y: Tensor, dim: int) -> Tensor:
        """Return `P^T y` along `dim`."""
        return self._synthesise(_analyse(y, dim, self.basis), self._adjoint_weights(), self.length, y, dim)

    def adjoint_on_ramp(self, y: Tensor, dim: int) -> Tensor:
        """Return the coefficients of `y` on the ramp times their slopes."""
        return self._on_ramp(_analyse(y, dim, self.basis), self.slopes, y, dim)

    def adjoint_and_split(self, y: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return `adjoint` and `adjoint_on_ramp` from one transform."""
        spectrum = _analyse(y, dim, self.basis)
        x = self._synthesise(spectrum, self._adjoint_weights(), self.length, y, dim)
        return x, self._on_ramp(spectrum, self.slopes, y, dim)

    def _adjoint_weights(self) -> Tensor:
        """Return the weights of the transposed operator, which counts the coefficient of Nyquist otherwise."""
        weights = self.weights / self.length
        last = 2 * (len(weights) - 1)
        if self.basis == "dft" and self.length != self.size and last in (self.length, self.size):
            # `irfft` counts it once and every other frequency twice, as did the transform that is transposed.
            weights = torch.cat([weights[:-1], weights[-1:] * (2.0 if last == self.length else 0.5)])
        return weights

    def _synthesise(self, spectrum: Tensor, weights: Tensor, size: int, like: Tensor, dim: int) -> Tensor:
        """Weigh and transform back to `size` samples in the dtype of `like`."""
        weights = weights.to(like.dtype if like.dtype == torch.float64 else torch.float32)
        spectrum = spectrum[..., : len(weights)]
        if self.basis == "dft":
            y = torch.fft.irfft(weights * spectrum, n=size, norm="forward")
        else:  # a shift by half a (new) sample out
            # Not the weights as moduli: `polar` passes no gradient where they are 0, as at the end of a ramp.
            phase = torch.polar(torch.ones_like(weights), _half_turns(weights) / size)
            y = torch.fft.irfft(weights * phase * spectrum, n=2 * size, norm="forward")[..., :size]
        moved: Tensor = y.movedim(-1, dim)
        return moved.to(like.dtype)

    def _on_ramp(self, spectrum: Tensor, slopes: Tensor | None, like: Tensor, dim: int) -> Tensor:
        assert self.slopes is not None
        ramp = spectrum[..., self.first : self.first + len(self.slopes)]
        # Means in place of sums at the input: within the range of float16.
        n = self.length
        ramp = ramp / n if slopes is None else ramp * (n * slopes).to(ramp.real.dtype)
        parts = ramp.real if self.basis == "dct" else torch.cat([ramp.real, ramp.imag], -1)
        return parts.movedim(-1, dim).to(like.dtype)


def _analyse(x: Tensor, dim: int, basis: Basis) -> Tensor:
    """Return `sum_i x_i exp(-2 pi j f i / n)` (dft) or `sum_i x_i cos(pi k (2i + 1) / (2n))` (dct), axis last.

    Half precision is computed in float32. The DCT-II is the DFT of the even extension `[x, flip(x)]`, whose centre of
    symmetry is half a sample off.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(dim, -1)
    n = wide.shape[-1]
    spectrum: Tensor
    if basis == "dft":
        spectrum = torch.fft.rfft(wide)
        return spectrum
    spectrum = torch.fft.rfft(torch.cat([wide, wide.flip(-1)], -1))[..., :n]
    k = torch.empty(n, dtype=wide.dtype, device=wide.device)
    phase = torch.polar(torch.full_like(k, 0.5), -_half_turns(k) / n)
    return spectrum * phase


def _half_turns(like: Tensor) -> Tensor:
    return torch.arange(len(like), dtype=like.dtype, device=like.device) * (math.pi / 2)
