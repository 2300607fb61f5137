"""The options of a learnable layer: their defaults, their checks, and the sizes and operators that follow from them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from diffstride import _validation, geometry
from diffstride.backends import BACKENDS, Backend
from diffstride.geometry import BASES, NORM_EXPONENTS, WINDOWS, Axis, Basis, Norm, Taps, Window

Bounds = tuple[float, float | None]


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The options of a learnable layer, checked once. `DiffStride2d` documents what each of them means."""

    smoothness: float = 4.0
    shared: bool = False
    bounds: Bounds = (1.0, None)
    window: Window = "outer"
    basis: Basis = "dft"
    norm: Norm = "forward"
    size_multiple: int = 1
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        smoothness = _validation.number("smoothness", self.smoothness)
        if not 0 < smoothness < math.inf:
            cure = " (a hard window has no gradient: use SpectralPool)" if smoothness == 0 else ""
            raise ValueError(f"smoothness must be > 0 and finite{cure}, got {self.smoothness}")
        object.__setattr__(self, "smoothness", smoothness)
        object.__setattr__(self, "bounds", _checked_bounds(self.bounds))
        _validation.one_of("window", self.window, WINDOWS)
        check_basis(self.basis, self.norm, self.backend)
        _validation.integer("size_multiple", self.size_multiple, 1)

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from the defaults, by name."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def as_text(self) -> str:
        """The options as text, for an operator of a graph (`from_text` undoes it)."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    @lru_cache(maxsize=64)
    def from_text(text: str) -> LayerOptions:
        """Return the options that `as_text` has written."""
        return LayerOptions(**json.loads(text))

    def axis(self, size: int, new_size: int, taps: Taps | None = None) -> Axis:
        """Return the operator from `size` to `new_size` samples, at a stride given later."""
        lower, upper = geometry.stride_range(size, self.smoothness, self.bounds, self.window, self.basis)
        return Axis(
            n=size,
            size=new_size,
            basis=self.basis,
            gain=geometry.gain(size, new_size, self.norm),
            smoothness=self.smoothness,
            window=self.window,
            lower=lower,
            upper=upper,
            taps=taps,
        )

    def axes(self, spatial: Sequence[int], new_sizes: Sequence[int]) -> list[Axis]:
        """Return the operators of all axes."""
        return [self.axis(n, new) for n, new in zip(spatial, new_sizes, strict=True)]

    def output_sizes(self, spatial: Sequence[int], strides: Sequence[float], owner: object = None) -> tuple[int, ...]:
        """Return the output sizes at raw strides.

        Args:
            spatial: the sizes of the input.
            strides: raw strides on the host, one per axis.
            owner: the layer that errors name.
        """
        _validation.finite_strides("stride", strides, owner)
        new_sizes = []
        for size, stride in zip(spatial, strides, strict=True):
            lower, upper = geometry.stride_range(size, self.smoothness, self.bounds, self.window, self.basis)
            used = min(max(stride, lower), upper)
            new_sizes.append(geometry.output_size(size, used, self.smoothness, self.window, self.size_multiple))
        return tuple(new_sizes)


def check_basis(basis: str, norm: str, backend: str) -> None:
    """Check the options that fixed resampling has, too."""
    _validation.one_of("basis", basis, BASES)
    _validation.one_of("norm", norm, tuple(NORM_EXPONENTS))
    _validation.one_of("backend", backend, BACKENDS)


def _checked_bounds(bounds: Bounds) -> Bounds:
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise TypeError(f"bounds must be a pair (lower, upper), got {bounds!r}")
    lower, upper = bounds
    if not 1 <= lower < math.inf or (upper is not None and not upper >= lower):
        raise ValueError(f"bounds must satisfy 1 <= lower <= upper, got {tuple(bounds)}")
    return float(lower), None if upper is None else float(upper)
