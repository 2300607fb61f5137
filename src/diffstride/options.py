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

Limits = tuple[float, float | None]
Bounds = Limits | tuple[Limits, ...]


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

    def limits(self, axis: int) -> Limits:
        """Return `(lower, upper)` of the stride of an axis."""
        first = self.bounds[0]
        return self.bounds[axis] if isinstance(first, tuple) else self.bounds  # type: ignore[return-value]

    def check_axes(self, ndim: int) -> None:
        """Check that bounds by axis are those of so many axes."""
        if isinstance(self.bounds[0], tuple) and len(self.bounds) != ndim:
            raise ValueError(f"bounds must be one pair, or {ndim} (one per axis), got {len(self.bounds)}")

    def entry_limits(self, ndim: int) -> list[Limits]:
        """Return `(lower, upper)` for each entry of the parameter. A shared stride moves within those of any axis."""
        limits = [self.limits(axis) for axis in range(ndim)]
        if not self.shared:
            return limits
        moved = [pair for axis, pair in enumerate(limits) if not self.is_left(axis)] or limits
        lowest, highest = zip(*moved, strict=True)
        return [(min(lowest), None if None in highest else max(highest))]

    def is_left(self, axis: int) -> bool:
        """Return whether an axis stays as it is, since its bounds are `(1, 1)`."""
        return self.limits(axis) == (1, 1)

    def stride_range(self, axis: int, size: int) -> tuple[float, float]:
        """Return the `(lower, upper)` to which a stride is clamped on an axis of `size`."""
        return geometry.stride_range(size, self.smoothness, self.limits(axis), self.window, self.basis)

    def axis(self, axis: int, size: int, new_size: int, taps: Taps | None = None) -> Axis | None:
        """Return the operator of an axis from `size` to `new_size` samples, at a stride given later; None for none."""
        if self.is_left(axis) and size == new_size and taps is None:
            return None
        lower, upper = self.stride_range(axis, size)
        return Axis(
            n=size,
            size=new_size,
            basis=self.basis,
            gain=geometry.gain(size, new_size, self.norm),
            smoothness=None if self.window == "hard" else self.smoothness,
            window=self.window,
            lower=lower,
            upper=upper,
            taps=taps,
        )

    def axes(self, spatial: Sequence[int], new_sizes: Sequence[int]) -> list[Axis | None]:
        """Return the operators of all axes."""
        return [self.axis(i, *sizes) for i, sizes in enumerate(zip(spatial, new_sizes, strict=True))]

    def output_sizes(self, spatial: Sequence[int], strides: Sequence[float], owner: object = None) -> tuple[int, ...]:
        """Return the output sizes at raw strides.

        Args:
            spatial: the sizes of the input.
            strides: raw strides on the host, one per axis.
            owner: the layer that errors name.
        """
        _validation.finite_strides("stride", strides, owner)
        new_sizes = []
        for i, (size, stride) in enumerate(zip(spatial, strides, strict=True)):
            lower, upper = self.stride_range(i, size)
            used, multiple = min(max(stride, lower), upper), 1 if self.is_left(i) else self.size_multiple
            new_sizes.append(geometry.output_size(size, used, self.smoothness, self.window, multiple))
        return tuple(new_sizes)


def check_basis(basis: str, norm: str, backend: str) -> None:
    """Check the options that fixed resampling has, too."""
    _validation.one_of("basis", basis, BASES)
    _validation.one_of("norm", norm, tuple(NORM_EXPONENTS))
    _validation.one_of("backend", backend, BACKENDS)


def _checked_bounds(bounds: Bounds) -> Bounds:
    if isinstance(bounds, Sequence) and bounds and all(isinstance(pair, Sequence) for pair in bounds):
        return tuple(map(_checked_limits, bounds))  # type: ignore[arg-type]
    return _checked_limits(bounds)  # type: ignore[arg-type]


def _checked_limits(bounds: Limits) -> Limits:
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise TypeError(f"bounds must be a pair (lower, upper), or a pair for each axis, got {bounds!r}")
    lower, upper = bounds
    if not 1 <= lower < math.inf or (upper is not None and not upper >= lower):
        raise ValueError(f"bounds must satisfy 1 <= lower <= upper, got {tuple(bounds)}")
    return float(lower), None if upper is None else float(upper)
