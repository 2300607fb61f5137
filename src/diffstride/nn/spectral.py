"""Fixed spectral pooling, the baseline with fractional strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from torch import Tensor

from diffstride import _validation, functional
from diffstride.backends import Backend
from diffstride.geometry import Basis, Norm
from diffstride.nn._tracers import Traceable, is_proxy
from diffstride.options import check_basis


class SpectralPoolNd(Traceable):
    """Spectral pooling (Rippel et al. 2015): keep the lowest frequencies, `floor(N/S)` samples of each axis.

    No parameters; the window is hard. Strides are never clamped: one that leaves no sample of an axis raises.
    """

    ndim: ClassVar[int]

    def __init__(
        self,
        stride: float | Sequence[float],
        *,
        basis: Basis = "dft",
        norm: Norm = "forward",
        backend: Backend = "auto",
    ) -> None:
        """Make the layer.

        Args:
            stride: one number >= 1, or one per axis; it may be fractional.
            basis: `"dft"` or `"dct"`.
            norm: `"forward"` keeps the mean; `"ortho"` and `"backward"` as in `torch.fft`.
            backend: `"fft"`, `"matmul"` or `"auto"`.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a stride is below 1 or not finite, or an option is unknown.
        """
        super().__init__()
        self.strides = _validation.strides_at_least_one("stride", _validation.per_axis("stride", stride, self.ndim))
        check_basis(basis, norm, backend)
        self.basis, self.norm, self.backend = basis, norm, backend

    def output_size(self, size: int | Sequence[int]) -> tuple[int, ...]:
        """Return the spatial sizes of the output for an input of spatial `size`."""
        return functional.pooled_sizes(_validation.sizes("size", size, self.ndim), self.strides)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample `x`."""
        if is_proxy(x):
            return self.as_leaf(x)  # type: ignore[no-any-return]
        return functional.spectral_pool(x, self.strides, basis=self.basis, norm=self.norm, backend=self.backend)

    def extra_repr(self) -> str:
        """Return the strides and options."""
        return f"stride={self.strides}, basis={self.basis!r}, norm={self.norm!r}, backend={self.backend!r}"


@final
class SpectralPool1d(SpectralPoolNd):
    """Fixed spectral pooling along one axis, for `[B, C, L]` or `[C, L]`."""

    ndim = 1


@final
class SpectralPool2d(SpectralPoolNd):
    """Fixed spectral pooling along height and width, for `[B, C, H, W]` or `[C, H, W]`."""

    ndim = 2


@final
class SpectralPool3d(SpectralPoolNd):
    """Fixed spectral pooling along three axes, for `[B, C, D, H, W]` or `[C, D, H, W]`."""

    ndim = 3
