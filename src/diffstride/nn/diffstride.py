"""Downsampling layers whose strides are trained: one N-d core, thin final classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from diffstride import _check, functional
from diffstride.backends import BACKENDS, Backend
from diffstride.geometry import BASES, NORM_EXPONENTS, WINDOWS, Basis, Norm, Window
from diffstride.nn._parameter import StrideParameter, host_values


class DiffStrideNd(nn.Module):
    """Downsampling by learnable strides; `DiffStride1d`, `DiffStride2d` and `DiffStride3d` fix the number of axes.

    Along each spatial axis of `N` samples the layer keeps the low frequencies under a window whose edge `N/(2S)` moves
    with the stride `S`: `y = irfft((m * rfft(x))[: N'//2 + 1], n=N')` with `m(f) = clip((R + N/(2S) - f)/R, 0, 1)` and
    `N' = min(N, floor(N/S + 2R))` (Riad et al. 2022, Algorithm 1). The strides are trained with the model.

    Shape:
        `[B, C, *spatial]` to `[B, C, *output_size(spatial)]`; unbatched `[C, *spatial]` likewise.
    """

    ndim: ClassVar[int]
    stride: nn.Parameter

    def __init__(
        self,
        stride: float | Sequence[float] = 2.0,
        smoothness: float = 4.0,
        *,
        shared: bool = False,
        bounds: tuple[float, float | None] = (1.0, None),
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
            bounds: `(lower, upper)` within which strides are used; upper may be None. An axis further limits them to
                `N/2` above and, for the outer window, to just over 1 below, where the gradient is alive.
            window: `"outer"` (the paper) or `"inner"`: the ramp inside the band and maps of nominal size, `ceil(N/S)`.
            basis: `"dft"` (the paper) or `"dct"`, which does not wrap around at the borders.
            norm: `"forward"` keeps the mean, `"ortho"` is Eq. 1 of the paper, `"backward"` the authors' code.
            size_multiple: round output sizes up to a multiple of this (at most the input's), for friendlier shapes.
            backend: `"fft"`, `"matmul"` or `"auto"`.
            device: of the parameter.
            dtype: of the parameter; never narrower than float32.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a stride below 1 or outside `bounds`, unequal strides with `shared`, `smoothness` not > 0.
        """
        super().__init__()
        initial = _check.strides_at_least_one("stride", _check.per_axis("stride", stride, self.ndim))
        self.smoothness = _check.positive_smoothness(smoothness)
        self.bounds = lower, upper = _check.stride_bounds(bounds)
        if not all(lower <= s and (upper is None or s <= upper) for s in initial):
            raise ValueError(f"stride must lie within bounds {self.bounds}, got {initial}")
        self.shared = _check.boolean("shared", shared)
        if shared and len(set(initial)) > 1:
            raise ValueError(f"stride must be one number when shared=True, got {initial}")
        self.window: Window = _check.one_of("window", window, WINDOWS)  # type: ignore[assignment]
        self.basis: Basis = _check.one_of("basis", basis, BASES)  # type: ignore[assignment]
        self.norm: Norm = _check.one_of("norm", norm, tuple(NORM_EXPONENTS))  # type: ignore[assignment]
        self.size_multiple = _check.positive_int("size_multiple", size_multiple)
        self.backend: Backend = _check.one_of("backend", backend, BACKENDS)  # type: ignore[assignment]
        self._initial = initial[:1] if shared else initial
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.stride = StrideParameter(torch.empty(len(self._initial), device=device, dtype=wide))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the strides back to those that the layer was constructed with."""
        with torch.no_grad():
            self.stride.copy_(torch.tensor(self._initial, dtype=self.stride.dtype))

    @property
    def strides(self) -> tuple[float, ...]:
        """The strides in use, one per axis, clamped to `bounds`."""
        lower, upper = self.bounds
        return tuple(min(max(s, lower), s if upper is None else upper) for s in self._raw_strides())

    def output_size(self, size: int | Sequence[int]) -> tuple[int, ...]:
        """The spatial sizes that an input of spatial `size` comes out with."""
        return functional.output_sizes(
            _check.sizes("size", size, self.ndim),
            self._raw_strides(),
            self.smoothness,
            self.bounds,
            self.window,
            self.basis,
            self.size_multiple,
            owner=self,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Downsample `x`."""
        spatial = _check.spatial_sizes(x, self.ndim)
        known = self._raw_strides()
        return functional.windowed(
            x,
            self.stride.expand(self.ndim),
            known,
            self.output_size(spatial),
            self.smoothness,
            self.bounds,
            self.window,
            self.basis,
            self.norm,
            self.backend,
        )

    def _raw_strides(self) -> tuple[float, ...]:
        values = host_values(self.stride)
        return values * self.ndim if self.shared else values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert; a stride stays float32 where a model goes to half precision."""

        def keep_wide(t: Tensor) -> Tensor:
            new = fn(t)
            narrow = new.is_floating_point() and torch.finfo(new.dtype).bits < 32
            return t.to(new.device) if narrow else new

        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        self._keep_tracked()  # a move off the meta device makes a new parameter
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._keep_tracked()

    def _keep_tracked(self) -> None:
        stride = self._parameters.get("stride")
        if type(stride) is nn.Parameter:  # not where a parametrization or a sharded tensor has its place
            self.stride = StrideParameter(stride.detach(), stride.requires_grad)

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, with the present strides."""
        values = "meta" if self.stride.is_meta else ", ".join(f"{s:.4g}" for s in self._raw_strides())
        parts = [f"stride=({values})", f"smoothness={self.smoothness:g}"]
        defaults = {
            "shared": False,
            "bounds": (1.0, None),
            "window": "outer",
            "basis": "dft",
            "norm": "forward",
            "size_multiple": 1,
            "backend": "auto",
        }
        parts += [f"{k}={getattr(self, k)!r}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join(parts)


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
