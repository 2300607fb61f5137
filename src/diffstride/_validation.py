"""Checks of arguments: every message names the argument, the bound and the value."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from diffstride._text import did_you_mean, short_repr
from diffstride.errors import UsageError

Number = int | float  # numpy's scalars pass too
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float64, float32, bfloat16 or float16"
FREEZE_FIRST = "give it diffstride.freeze(model, example_inputs)"


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def one_of(name: str, value: str, choices: Collection[str]) -> str:
    """Return `value` if it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        near = did_you_mean(value, choices)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {short_repr(value)}{near}")
    return value


def per_axis(name: str, value: Number | Sequence[Number], ndim: int) -> tuple[Number, ...]:
    """Return one number per axis, from a number or from a sequence of `ndim` numbers."""
    if _is_number(value):
        return (value,) * ndim  # type: ignore[return-value]
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Sequence) or not all(map(_is_number, value)):
        raise TypeError(f"{name} must be a number or a sequence of {ndim} numbers, got {short_repr(value)}")
    if len(value) != ndim:
        raise ValueError(
            f"{name} must have {ndim} entries (one per axis), got {len(value)}: {short_repr(tuple(value))}"
        )
    return tuple(value)


def strides_at_least_one(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Check that every stride is a finite number >= 1."""
    finite_strides(name, values)
    if not all(v >= 1 for v in values):
        raise ValueError(f"{name} must be >= 1, got {_show(values)}")
    return tuple(float(v) for v in values)


def finite_strides(name: str, values: Sequence[float], owner: object = None) -> None:
    """Check that every stride is finite; `owner` is the layer that the error names."""
    if not all(math.isfinite(v) for v in values):
        of = "" if owner is None else f" in {owner!r}"
        raise ValueError(f"{name} must be finite, got {_show(values)}{of}")


def positive(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Check that every value is a finite number > 0."""
    if not all(0 < v < math.inf for v in values):
        raise ValueError(f"{name} must be > 0 and finite, got {_show(values)}")
    return tuple(float(v) for v in values)


def number(name: str, value: float) -> float:
    """Check that `value` is a number."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {short_repr(value)}")
    return float(value)


def above_zero(name: str, value: float) -> float:
    """Check that `value` is a finite number > 0."""
    return positive(name, [number(name, value)])[0]


def not_negative(name: str, value: float) -> float:
    """Check that `value` is a finite number >= 0."""
    if not 0 <= number(name, value) < math.inf:
        raise ValueError(f"{name} must be >= 0, got {value}")
    return float(value)


def positive_up_to(name: str, value: float, most: float) -> float:
    """Check that `value` is in (0, most]."""
    if not 0 < number(name, value) <= most:
        raise ValueError(f"{name} must be > 0 and <= {most:g}, got {value}")
    return float(value)


def integer(name: str, value: object, least: int | None = None) -> int:
    """Check that `value` is an int, `least` at least."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {short_repr(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return int(value)


def sizes(name: str, value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return one positive int per axis, from an int or a sequence."""
    return tuple(integer(name, v, 1) for v in per_axis(name, value, ndim))


def a_sequence(name: str, value: object) -> None:
    """Check that `value` has entries, one per axis, where a number alone would not show how many axes there are."""
    if isinstance(value, str) or not isinstance(value, (Sequence, Tensor)) or not getattr(value, "ndim", 1):
        raise TypeError(f"{name} must be a sequence with one number per axis, got {short_repr(value)}")
    if not len(value):
        raise ValueError(f"{name} must have one entry per spatial axis, got none")


def spatial_sizes(x: Tensor, ndim: int) -> tuple[int, ...]:
    """Return the sizes of the `ndim` spatial axes of `[B, C, *spatial]` or `[C, *spatial]`; check dtype and rank."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:  # torch has no arithmetic for floats of eight bits
        given = x.dtype if isinstance(x, Tensor) else short_repr(x)
        raise TypeError(f"input must be a tensor, and must be floating point ({FLOAT_NAMES}), got {given}")
    if x.ndim not in (ndim + 1, ndim + 2):
        raise ValueError(
            f"input must have {ndim + 2} dimensions [B, C, *spatial] or {ndim + 1} [C, *spatial] "
            f"for {ndim} spatial ax{'is' if ndim == 1 else 'es'}, got shape {tuple(x.shape)}"
        )
    spatial: tuple[Any, ...] = tuple(x.shape[x.ndim - ndim :])
    if isinstance(spatial[0], Tensor):  # under `torch.jit.trace`
        raise UsageError(f"torch.jit cannot trace a layer whose sizes follow from strides: {FREEZE_FIRST}")
    if 0 in spatial:
        raise ValueError(f"input's spatial sizes must be >= 1, got shape {tuple(x.shape)}")
    return spatial


def axis_strides(strides: Tensor | Sequence[float]) -> Tensor:
    """Return a floating-point tensor `[d]` of strides, one per spatial axis, float32 or wider."""
    a_sequence("strides", strides)
    if not isinstance(strides, Tensor):
        strides = torch.tensor(per_axis("strides", strides, len(strides)), dtype=torch.float64)
    if strides.dtype not in FLOATS:
        raise TypeError(f"strides must be floating point ({FLOAT_NAMES}), got {strides.dtype}")
    if strides.ndim != 1:
        raise ValueError(f"strides must have shape [d], one entry per spatial axis, got shape {tuple(strides.shape)}")
    return strides.to(torch.promote_types(strides.dtype, torch.float32))


def _show(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)
