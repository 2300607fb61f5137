"""Baselines of the benchmark: DiffStride written with `torch.fft` in three ways, and a copy of memory.

They use none of the library's code. All three take `N' = min(N, floor(N/S + 2R))` samples along height and width under
the mask `m(f) = clip((R + N/(2S) - f) / R, 0, 1)`. They keep the mean, leave strides unclamped, compute half precision
in float32 and return the dtype and memory format of their input. They agree where there is no energy at `N'/2` of an
even `N'`: there, the transforms over both axes at once keep one of the rows `+N'/2` and `-N'/2`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def move_data(x: Tensor) -> Tensor:
    """Return a copy of `x`, whose gradient is copied too: each is read and written once."""
    y = x.clone()
    y.register_hook(torch.clone)  # type: ignore[no-untyped-call]
    return y


class _Windowed(nn.Module):
    """A layer with two strides of 2 at first, height before width, and the width `R` of the ramp."""

    def __init__(self, smoothness: float = 4.0) -> None:
        super().__init__()
        self.strides = nn.Parameter(torch.full((2,), 2.0))
        self.smoothness = smoothness

    def forward(self, x: Tensor) -> Tensor:
        """Downsample `[B, C, H, W]` to `[B, C, H', W']`."""
        sizes = [
            min(n, math.floor(n / s + 2 * self.smoothness + 1e-5))
            for n, s in zip(x.shape[-2:], self.strides.tolist(), strict=True)
        ]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = self._resample(wide, sizes[0], sizes[1]).to(x.dtype)
        return y.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)

    def _resample(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return `[B, C, height, width]`, in single or double precision, by the transforms of the class."""
        raise NotImplementedError

    def mask(self, axis: int, n: int, f: Tensor) -> Tensor:
        """Return `m` at the frequencies `f` of an axis (0: height, 1: width) of `n` samples."""
        edge = n / (2 * self.strides[axis])
        return ((self.smoothness + edge - f) / self.smoothness).clamp(0, 1)


class AxisByAxisFFT(_Windowed):
    """The best layer with FFTs: one axis after the other, with a real transform, a slice and a real mask.

    Width comes first, so that the transforms along the height, across memory, have fewer columns.
    """

    def _resample(self, x: Tensor, height: int, width: int) -> Tensor:
        for axis, new in ((1, width), (0, height)):
            dim = axis - 2
            n, kept = x.shape[dim], new // 2 + 1
            mask = self.mask(axis, n, torch.arange(kept, device=x.device))
            spectrum = torch.fft.rfft(x, dim=dim, norm="forward").narrow(dim, 0, kept)
            x = torch.fft.irfft(spectrum * (mask[:, None] if axis == 0 else mask), n=new, dim=dim, norm="forward")
        return x


class JointFFT(_Windowed):
    """A layer that transforms both axes at once, and drops columns before the transform along the height."""

    def _resample(self, x: Tensor, height: int, width: int) -> Tensor:
        rows, columns = x.shape[-2:]
        horizontal = self.mask(1, columns, torch.arange(width // 2 + 1, device=x.device))
        f = torch.arange(height, device=x.device)
        vertical = self.mask(0, rows, torch.minimum(f, height - f))
        spectrum = torch.fft.rfft(x, norm="forward")[..., : width // 2 + 1]
        spectrum = torch.fft.fft(spectrum, dim=-2, norm="forward")
        spectrum = torch.cat([spectrum[..., : (height + 1) // 2, :], spectrum[..., rows - height // 2 :, :]], -2)
        spectrum = torch.fft.ifft(spectrum * (vertical[:, None] * horizontal), dim=-2, norm="forward")
        y: Tensor = torch.fft.irfft(spectrum, n=width, norm="forward")
        return y


class NaiveFFT(_Windowed):
    """The steps of the authors' program, as in public PyTorch ports, with our windows and sizes.

    It costs what theirs costs, and gives other results.

    One transform of both axes is followed by a complex mask over the whole spectrum for each axis, the vertical one
    shifted into the transform's order. Then the frequencies to keep are gathered by index.
    """

    def _resample(self, x: Tensor, height: int, width: int) -> Tensor:
        rows, columns = x.shape[-2:]
        spectrum = torch.fft.rfft2(x, norm="forward")
        f = torch.arange(columns // 2 + 1, device=x.device)
        horizontal = self.mask(1, columns, f).to(spectrum.dtype)
        f = torch.arange(-(rows // 2), rows - rows // 2, device=x.device)
        vertical = torch.fft.ifftshift(self.mask(0, rows, f.abs()).to(spectrum.dtype))
        spectrum = spectrum * horizontal
        spectrum = spectrum * vertical[:, None]
        f = torch.arange(-(height // 2), height - height // 2, device=x.device)
        spectrum = spectrum[:, :, torch.fft.ifftshift(f) % rows, :]
        spectrum = spectrum[:, :, :, torch.arange(width // 2 + 1, device=x.device)]
        y: Tensor = torch.fft.irfft2(spectrum, s=(height, width), norm="forward")
        return y
