"""Downsampling layers whose strides are trained: one N-d core, thin final classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from diffstride import _graph
from diffstride.backends import Backend, Kind, Resampling
from diffstride.geometry import Basis, Norm, Window
from diffstride.nn._tracers import is_proxy
from diffstride.nn.learnable import LearnableStrides
from diffstride.options import Bounds, LayerOptions


class DiffStrideNd(LearnableStrides):
    """Downsampling by learnable strides; `DiffStride1d`, `DiffStride2d` and `DiffStride3d` fix the number of axes.

    Along each spatial axis of `N` samples the layer keeps the low frequencies under a window whose edge `N/(2S)` moves
    with the stride `S`: `y = irfft((m * rfft(x))[: N'//2 + 1], n=N')` with `m(f) = clip((R + N/(2S) - f)/R, 0, 1)` and
    `N' = min(N, floor(N/S + 2R))` (Riad et al. 2022, Algorithm 1). The strides are trained with the model.

    Shape:
        `[B, C, *spatial]` to `[B, C, *output_size(spatial)]`; also unbatched, `[C, *spatial]`.
    """

    def __init__(
        self,
        stride: float | Sequence[float] = 2.0,
        smoothness: float = 4.0,
        *,
        shared: bool = False,
        bounds: Bounds = (1.0, None),
        window: Window = "outer",
        basis: Basis = "dft",
        norm: Norm = "forward",
        size_multiple: int = 1,
        backend: Backend = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layer.

        Args:
            stride: initial strides >= 1, one number or one per axis (height before width).
            smoothness: `R > 0`, the width of the window's ramp in cycles per axis (frequencies of the DFT).
            shared: one stride for all axes.
            bounds: `(lower, upper)`, to which strides are clamped; upper may be None. Each axis has limits of its own:
                `N/2` above and, for the outer window, just over 1 below, where the gradient is alive. Or a pair for
                each axis: with `((1, None), (1, 1))` the first axis learns and the second stays as it is.
            window: `"outer"` (the paper); `"inner"`: the ramp inside the band and maps of nominal size, `ceil(N/S)`; or
                `"hard"`: the same sizes, and no ramp. It keeps the most detail, but the loss gives strides no gradient.
                Use it where they are found by `CostModel.find_strides`, or held.
            basis: `"dft"` (the paper) or `"dct"`, which does not wrap around at the borders.
            norm: `"forward"` keeps the mean, `"ortho"` is Eq. 1 of the paper, `"backward"` the norm of the authors'
                code.
            size_multiple: round output sizes up to a multiple of this, at most to the input's.
            backend: `"fft"`, `"matmul"` or `"auto"`.
            device: the device of the parameter.
            dtype: the dtype of the parameter; float32 or wider.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a stride is below 1 or outside `bounds`, strides differ with `shared`, or an option is invalid.
        """
        options = LayerOptions(
            smoothness=smoothness, shared=shared, bounds=bounds, window=window, basis=basis, norm=norm,
            size_multiple=size_multiple, backend=backend,
        )  # fmt: skip
        super().__init__(stride, options, device, dtype)

    def reset_parameters(self) -> None:
        """Set the strides back to the initial ones."""
        self.reset_strides()

    def forward(self, x: Tensor) -> Tensor:
        """Downsample `x`."""
        if is_proxy(x):
            return self.as_leaf(x)  # type: ignore[no-any-return]
        if torch.compiler.is_compiling():
            axes = [(n, new, None) for n, new in zip(x.shape[-self.ndim :], self._sizes_in_graph(x), strict=True)]
            return _graph.resample(x, axes, self._options_text, self._strides())
        strides, downsample = self._prepared(x)
        return downsample(x, strides)  # type: ignore[no-any-return]

    def _prepare(self, x: Tensor, spatial: tuple[int, ...], new_sizes: tuple[int, ...]) -> Resampling:
        return Resampling(Kind.of(x), self.options.axes(spatial, new_sizes), self.backend)


@final
class DiffStride1d(DiffStrideNd):
    """Learnable stride along one axis, for `[B, C, L]` or `[C, L]`."""

    ndim = 1


@final
class DiffStride2d(DiffStrideNd):
    """Learnable strides along height and width, for `[B, C, H, W]` or `[C, H, W]`."""

    ndim = 2


@final
class DiffStride3d(DiffStrideNd):
    """Learnable strides along depth, height and width, for `[B, C, D, H, W]` or `[C, D, H, W]`."""

    ndim = 3
