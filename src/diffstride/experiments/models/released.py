"""The layer of the authors' program, to compare numbers like with like. It is not the paper's, nor the library's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffstride import _validation


class ReleasedDiffStride2d(nn.Module):
    """Downsampling by learned strides as the public program of Riad et al. does it.

    With `N` samples, stride `S` and smoothness `R`, a window `clip((R + e - p)/R, 0, 1)` weighs the coefficients of
    `rfft2(x)`, and those with a weight above 0 are kept; `irfft2` of them, in torch's "backward" norm, is the output.
    Along the width, `p` is the frequency and the edge is `e = max(W/S, 2)/2 + 1`. Along the height, the edge is
    `max(H/S, 2)/2` and `p` is `f` for the frequency `f >= 0` and `f - 1` for `-f`; for odd heights the window is rolled
    by one place. So an even axis keeps `2 ceil(N/(2S) + R)` samples, at most `N`.

    `forward` writes `max(S, N/(N - R))` to the parameter, as the program does: a stride is lost on an axis of `R`
    samples. `diffstride.functional.diffstride` with strides `H/(H/S + 1)` and `W/(W/S + 2)`, these sizes and
    `norm="backward"` is nearly the same.

    Args:
        stride: initial strides, one number or (height, width).
        smoothness: `R`, the width of the ramp.

    Shape:
        `[B, C, H, W]` to `[B, C, H', W']`.
    """

    def __init__(self, stride: float | tuple[float, float] = 2.0, smoothness: float = 4.0) -> None:
        super().__init__()
        initial = _validation.strides_at_least_one("stride", _validation.per_axis("stride", stride, 2))
        _validation.above_zero("smoothness", smoothness)
        self.smoothness = smoothness
        self.stride = nn.Parameter(torch.tensor(initial))

    def forward(self, x: Tensor) -> Tensor:
        """Downsample `x`."""
        height, width = x.shape[-2:]
        with torch.no_grad():
            for axis, n in enumerate((height, width)):
                least = n / (n - self.smoothness) if n != self.smoothness else torch.inf
                self.stride[axis].clamp_(min=least)
        positions = torch.arange(height // 2 + height % 2, device=x.device)
        vertical = torch.fft.fftshift(torch.cat([positions[height % 2 :].flip(0), positions]))
        horizontal = torch.arange(width // 2 + 1, device=x.device)
        strided = [(n / stride).clamp(min=2.0) for n, stride in zip((height, width), self.stride, strict=True)]
        rows = self._window(strided[0] / 2, vertical)
        columns = self._window(strided[1] / 2 + 1, horizontal)
        spectrum = torch.fft.rfft2(x.float() if x.dtype.itemsize < 4 else x) * rows[:, None] * columns
        kept = spectrum[..., rows > 0, :][..., columns > 0]
        sizes = kept.shape[-2], 2 * (kept.shape[-1] - 1)
        y: Tensor = torch.fft.irfft2(kept, s=sizes)
        return y.to(x.dtype)

    def _window(self, edge: Tensor, positions: Tensor) -> Tensor:
        window: Tensor = (self.smoothness + edge - positions) / self.smoothness
        return window.clamp(0, 1)
