"""Resize to the size of another map of the model, or to a size that never changes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffstride import functional
from diffstride.geometry import Basis, Norm
from diffstride.nn._tracers import Traceable, is_proxy
from diffstride.tracing._torch import in_backward

Sizes = tuple[int, ...]


class ResizeTo(Traceable):
    """A `spectral_resize` to the size that another module's output had in this forward pass, or to a constant size.

    The map of a skip connection exists long before the upsampled map that it meets. A hook of the other module
    (`follow`) stores its size for the present thread, and `forward` takes it.

    Activation checkpointing runs a decoder again while gradients are computed, when other passes may have stored sizes.
    Then the target is the last one for an input of the same size. Two passes whose skip connections differ and whose
    upsampled maps do not (47 and 48 samples at a stride of 2) cannot be checkpointed together.
    """

    def __init__(
        self, ndim: int, *, size: Sequence[int | None] = (), basis: Basis = "dft", norm: Norm = "forward"
    ) -> None:
        """Make the layer.

        Args:
            ndim: the number of spatial axes.
            size: constant sizes by axis, None for axes that stay as they are; empty to `follow` a module.
            basis: as in `spectral_resize`.
            norm: as in `spectral_resize`.
        """
        super().__init__()
        self.ndim = ndim
        self.size = tuple(size)
        self.basis: Basis = basis
        self.norm: Norm = norm
        self._noted: dict[int, Sizes] = {}  # by thread
        self._last: dict[Sizes, Sizes] = {}  # targets by the size of the input
        self._in_graph: Sizes = ()

    def follow(self, module: nn.Module) -> None:
        """Take the size of this module's output from now on."""
        module.register_forward_hook(_Note(self))

    def note(self, size: Sizes) -> None:
        """Store the size of the skip connection in the present pass."""
        if torch.compiler.is_compiling():  # a graph keeps it as a constant
            self._in_graph = size
        elif not in_backward():
            self._noted[threading.get_ident()] = size

    def target(self, spatial: Sequence[int]) -> Sizes:
        """Return the size to which an input of spatial size `spatial` is resized in the present pass.

        Raises:
            RuntimeError: the module that is followed has not run.
        """
        if self.size:
            return tuple(n if new is None else new for n, new in zip(spatial, self.size, strict=True))
        if torch.compiler.is_compiling():
            return self._in_graph
        spatial = tuple(spatial)
        plain = all(type(n) is int for n in spatial)  # not in a trace, whose symbols have no hash
        target = None if in_backward() else self._noted.pop(threading.get_ident(), None)
        if target is None and plain:
            target = self._last.get(spatial)
        if target is None:
            raise RuntimeError("the module that ResizeTo follows must run before it")
        if plain:
            self._last[spatial] = target
        return target

    def forward(self, x: Tensor) -> Tensor:
        """Resize `x`."""
        if is_proxy(x):
            return self.as_leaf(x)  # type: ignore[no-any-return]
        return functional.spectral_resize(x, self.target(x.shape[-self.ndim :]), basis=self.basis, norm=self.norm)

    def extra_repr(self) -> str:
        """Return the options."""
        size = f"size={self.size}, " if self.size else ""
        return f"ndim={self.ndim}, {size}basis={self.basis!r}, norm={self.norm!r}"


class _Note:
    """A forward hook that stores the size of an output in a `ResizeTo`. It is a class so that models can be pickled."""

    def __init__(self, resize: ResizeTo) -> None:
        self.resize = resize

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.resize.note(tuple(output.shape[-self.resize.ndim :]))
