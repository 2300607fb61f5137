"""The one place that words argument errors: every message names the argument, the bound and the value."""

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
FREEZE_FIRST = "give it diffstride.freeze(model, example_inputs)"
_FLOATS = "float64, float32, bfloat16 or float16"


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def one_of(name: str, value: str, choices: Collection[str]) -> str:
    """Return `value` if it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        near = did_you_mean(value, choices)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {short_repr(value)}{near}")
    return value


def per_axis(name: str, value: Number | Sequence[Number], ndim: int) -> tuple[Number, ...]:
    """Spread a number over `ndim` axes, or check that a sequence has one number per axis."""
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
    if not 0 < number(name, value) < math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {value}")
    return float(value)


def not_negative(name: str, value: float) -> float:
    """Check that `value` is a finite number >= 0."""
    if not math.isfinite(number(name, value)):
        raise ValueError(f"{name} must be finite, got {value}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
    return float(value)


def positive_up_to(name: str, value: float, most: float) -> float:
    """Check that `value` lies in (0, most]."""
    if not 0 < number(name, value) <= most:
        raise ValueError(f"{name} must be > 0 and <= {most:g}, got {value}")
    return float(value)


def finite_strides(name: str, values: Sequence[float], owner: object = None) -> None:
    """Check that every stride is finite; `owner` is the layer to name."""
    if not all(math.isfinite(v) for v in values):
        of = "" if owner is None else f" in {owner!r}"
        raise ValueError(f"{name} must be finite, got {_show(values)}{of}")


def positive_smoothness(smoothness: float) -> float:
    """Check that R > 0: a hard window has no gradient with respect to its stride."""
    if not 0 < number("smoothness", smoothness) < math.inf:
        cure = " (a hard window has no gradient: use SpectralPool)" if smoothness == 0 else ""
        raise ValueError(f"smoothness must be > 0 and finite{cure}, got {smoothness}")
    return float(smoothness)


def whole(name: str, value: object, least: int | None = None) -> int:
    """Check that `value` is an int, `least` at least."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {short_repr(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return int(value)


def positive_int(name: str, value: object) -> int:
    """Check that `value` is an int >= 1."""
    return whole(name, value, 1)


def a_sequence(name: str, value: object) -> None:
    """Check that `value` has one entry per axis where a bare number would not say how many axes are meant."""
    if not isinstance(value, (Sequence, Tensor)) or isinstance(value, (str, bytes)) or getattr(value, "ndim", 1) == 0:
        raise TypeError(f"{name} must be a sequence with one number per axis, got {short_repr(value)}")
    if not len(value):
        raise ValueError(f"{name} must have one entry per spatial axis, got none")


def sizes(name: str, value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """One positive int per axis, from an int or a sequence."""
    return tuple(positive_int(name, v) for v in per_axis(name, value, ndim))


def padding(value: int | str | Sequence[int], ndim: int) -> str | tuple[int, ...]:
    """Padding of a convolution of stride 1: samples on both sides of each axis, or PyTorch's names for them."""
    if isinstance(value, str):
        return one_of("padding", value, ("same", "valid"))
    for v in per_axis("padding", value, ndim):
        if not v >= 0:
            raise ValueError(f"padding must be >= 0, got {v}")
    return tuple(positive_int("padding", v) if v else 0 for v in per_axis("padding", value, ndim))


def channels(x: Tensor, ndim: int, expected: int) -> None:
    """Check the channels of `[B, C, *spatial]` or `[C, *spatial]`."""
    if x.shape[-ndim - 1] != expected:
        raise ValueError(f"input must have {expected} channels, got shape {tuple(x.shape)}")


def stride_bounds(bounds: object) -> tuple[float, float | None]:
    """A pair (lower, upper) with 1 <= lower <= upper; upper None is no bound of the user's."""
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        raise TypeError(f"bounds must be a pair (lower, upper), got {short_repr(bounds)}")
    lower, upper = bounds
    if not _is_number(lower) or not (upper is None or _is_number(upper)):
        raise TypeError(f"bounds must be numbers (upper may be None), got {tuple(bounds)}")
    if not 1 <= lower < math.inf or (upper is not None and not upper >= lower):
        raise ValueError(f"bounds must satisfy 1 <= lower <= upper, got {tuple(bounds)}")
    return float(lower), None if upper is None else float(upper)


def parameter_dtype(dtype: torch.dtype | None) -> None:
    """Check that parameters can be of this dtype; None: torch's default."""
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be floating point ({_FLOATS}), got {dtype}")


def spatial_sizes(x: Tensor, ndim: int) -> tuple[int, ...]:
    """Sizes of the `ndim` spatial axes of `[B, C, *spatial]` or `[C, *spatial]`; checks type and rank."""
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:  # not those of eight bits, for which torch has no arithmetic
        raise TypeError(f"input must be floating point ({_FLOATS}), got {x.dtype}")
    if x.ndim not in (ndim + 1, ndim + 2):
        raise ValueError(
            f"input must have {ndim + 2} dimensions [B, C, *spatial] or {ndim + 1} [C, *spatial] "
            f"for {ndim} spatial ax{'is' if ndim == 1 else 'es'}, got shape {tuple(x.shape)}"
        )
    spatial: tuple[Any, ...] = tuple(x.shape[x.ndim - ndim :])
    if isinstance(spatial[0], Tensor):  # so are sizes under `torch.jit.trace`
        raise UsageError(f"torch.jit cannot trace a layer whose sizes follow from strides: {FREEZE_FIRST}")
    if 0 in spatial:
        raise ValueError(f"input's spatial sizes must be >= 1, got shape {tuple(x.shape)}")
    return spatial


def axis_strides(strides: Tensor | Sequence[float]) -> Tensor:
    """A floating-point tensor `[d]` of strides, one per spatial axis, float32 or wider."""
    if not isinstance(strides, Tensor):
        a_sequence("strides", strides)
        strides = torch.tensor(per_axis("strides", strides, len(strides)), dtype=torch.float64)
    if strides.dtype not in FLOATS:
        raise TypeError(f"strides must be floating point ({_FLOATS}), got {strides.dtype}")
    if strides.ndim != 1 or len(strides) == 0:
        raise ValueError(f"strides must have shape [d], one entry per spatial axis, got shape {tuple(strides.shape)}")
    return strides.to(torch.promote_types(strides.dtype, torch.float32))


def _show(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)
