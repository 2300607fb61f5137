"""Kinds of values in files that may have come from anywhere, checked once, when a file is read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from torch import Tensor

from diffstride._text import short_repr

_CLASSES: dict[Any, Any] = {float: (int, float), list: (list, tuple)}
_NAMES = {float: "a number", int: "an integer", str: "a text", dict: "a mapping", list: "a list", NoneType: "null"}


def check_kind(value: Any, kind: Any, where: str = "it") -> None:
    """Check that a value from a file, and all within it, is of the kind that an annotation names.

    A kind is a class, `list[...]`, `dict[..., ...]`, a union of these, or a `TypedDict`. Tuples count as lists, as in
    JSON. A `float` may be an integer. The message names the place of the value, from `where` on.

    Raises:
        ValueError: a value of another kind.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return
    if origin in (Union, UnionType):
        *others, last = sorted(inner, key=lambda each: each is not NoneType)  # the message is about a kind not null
        for each in others:
            with suppress(ValueError):
                check_kind(value, each)
                return
        check_kind(value, last, where)
    elif is_typeddict(kind):
        check_kind(value, dict, where)
        for name, of in get_type_hints(kind).items():
            if name in value:
                check_kind(value[name], of, f"{where}[{name!r}]")
            elif name in kind.__required_keys__:
                raise ValueError(f"{where} must have {name}")
    elif not isinstance(value, _CLASSES.get(origin, origin)) or (isinstance(value, bool) and origin is not bool):
        raise ValueError(f"{where} must be {_NAMES.get(origin, origin.__name__)}, got {short_repr(value)}")
    elif origin is dict and inner:
        for name, entry in value.items():
            check_kind(name, inner[0], f"a key of {where}")
            check_kind(entry, inner[1], f"{where}[{name!r}]")
    elif origin is list and inner:
        for i, entry in enumerate(value):
            check_kind(entry, inner[0], f"{where}[{i}]")


class Cutoffs(TypedDict):
    """Cut-off frequencies by layer: exact, and in whole bins."""

    exact: dict[str, list[float]]
    whole_bins: dict[str, list[float]]


class _Measured(TypedDict):
    accuracy: float | None
    macs: float
    resampling_macs: float
    strides: dict[str, list[float]]
    strides_initial: dict[str, list[float]]


class Result(_Measured, total=False):
    """The content of a run's `result.json`; an optional value is None where a file lacks it."""

    accuracies: dict[str, float] | None
    step_time_ms: float | None
    loss: float | None
    axes: dict[str, str] | None
    cutoffs: Cutoffs | None
    stride_cost: float | None
    macs_budget: float | None
    parameters: int | None
    steps: int | None
    epochs: float | None
    train_seconds: float | None
    peak_memory_mb: float | None
    seed: int | None
    data: str | None
    data_fingerprint: str | None
    commit: str | None
    versions: dict[str, str] | None
    hardware: str | None


def total_macs(result: Mapping[str, Any]) -> float:
    """Return the multiply-accumulates of one input, resampling included."""
    return float(result["macs"] + result["resampling_macs"])


def check_result(content: Any) -> Result:
    """Return the checked content of a `result.json`, with None for each missing value.

    Raises:
        ValueError: a value of another kind.
    """
    check_kind(content, Result)
    result: Result = dict.fromkeys(get_type_hints(Result)) | content
    return result


class Saved(TypedDict):
    """The part of a checkpoint that every reader needs. Lightning reads the rest when a run is resumed."""

    state_dict: dict[str, Tensor]
    global_step: int
    epoch: int
