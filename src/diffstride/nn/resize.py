"""Resizing to a size that the model's own maps have, for upsampling that must meet a skip connection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffstride import functional
from diffstride.geometry import Basis, Norm


class ResizeTo(nn.Module):
    """`spectral_resize` to the size that another module's output had in this forward pass.

    The map of a skip connection is made long before the upsampled map that it meets, and nothing hands its size on: a
    hook of the other module (`follow`) notes it.
    """

    size: tuple[int, ...] | None = None

    def __init__(self, ndim: int, *, basis: Basis = "dft", norm: Norm = "forward") -> None:
        """Make the layer.

        Args:
            ndim: spatial axes.
            basis: as in `spectral_resize`.
            norm: as in `spectral_resize`.
        """
        super().__init__()
        self.ndim = ndim
        self.basis: Basis = basis
        self.norm: Norm = norm

    def follow(self, module: nn.Module) -> None:
        """From now on take the size of what this module returns."""
        module.register_forward_hook(_Note(self))

    def forward(self, x: Tensor) -> Tensor:
        """Resize `x`."""
        if self.size is None:
            raise RuntimeError("the module that ResizeTo follows must run before it")
        return functional.spectral_resize(x, self.size, basis=self.basis, norm=self.norm)

    def extra_repr(self) -> str:
        """The options."""
        return f"ndim={self.ndim}, basis={self.basis!r}, norm={self.norm!r}"


class _Note:
    """A forward hook that hands the size of an output to a `ResizeTo`; a class, so that models can be pickled."""

    def __init__(self, resize: ResizeTo) -> None:
        self.resize = resize

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.resize.size = tuple(output.shape[-self.resize.ndim :])
