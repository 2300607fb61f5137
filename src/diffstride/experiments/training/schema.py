"""Kinds of values in files that may have come from anywhere, checked once, where they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from torch import Tensor

from diffstride._text import short_repr

LARGEST = 1e150  # of numbers in files, so that their sums and squares are floats, too


def check_whole_number(value: int, where: str = "a whole number") -> None:
    """Check that a whole number from a file is below 2**63 in size.

    Raises:
        ValueError: a larger one, which floats, tensors or texts might not hold.
    """
    if value.bit_length() > 63:
        raise ValueError(f"{where} must be below 2**63 in size, got one of {value.bit_length()} bits")


def check_kind(value: Any, kind: Any, where: str = "it") -> None:
    """Check that a value, and all within it, is what an annotation says, and that its numbers are of ordinary size.

    Args:
        value: from a file.
        kind: a class, `list[...]`, `tuple[...]`, `dict[..., ...]`, a union of these, or a `TypedDict`. A tuple and a
            list of one kind are one kind, since JSON has lists alone; a `float` may be an int, infinite or NaN.
        where: how messages call the value.

    Raises:
        ValueError: another kind, or a number that is too large; it names the place.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return
    if origin in (Union, UnionType):
        problems = [problem for each in inner if (problem := _problem(value, each, where)) is not None]
        if len(problems) == len(inner):
            raise max(problems, key=lambda problem: len(str(problem).split(" must ")[0]))  # the one that came furthest
    elif is_typeddict(kind):
        check_kind(value, dict, where)
        for name, of in get_type_hints(kind).items():
            if name in value:
                check_kind(value[name], of, f"{where}[{name!r}]")
            elif name in kind.__required_keys__:
                raise ValueError(f"{where} must have {name}")
    elif not isinstance(value, _CLASSES.get(origin, origin)) or (isinstance(value, bool) and origin is not bool):
        raise ValueError(f"{where} must be {_NAMES.get(origin, origin.__name__)}, got {short_repr(value)}")
    elif isinstance(value, int):
        check_whole_number(value, where)
    elif origin is float:
        if LARGEST < abs(value) < math.inf:
            raise ValueError(f"{where} must be at most {LARGEST:g} in size, got {value}")
    elif origin is dict:
        for name, entry in value.items() if inner else ():
            check_kind(name, inner[0], f"a key of {where}")
            check_kind(entry, inner[1], f"{where}[{name!r}]")
    elif origin in (list, tuple):
        for i, entry in enumerate(value) if inner else ():
            check_kind(entry, inner[0], f"{where}[{i}]")


def _problem(value: Any, kind: Any, where: str) -> ValueError | None:
    try:
        check_kind(value, kind, where)
    except ValueError as error:
        return error
    return None


_CLASSES: dict[Any, Any] = {float: (int, float), list: (list, tuple), tuple: (list, tuple)}
_NAMES = {float: "a number", int: "a whole number", str: "a text", dict: "a mapping", list: "a list", tuple: "a list",
          NoneType: "null"}  # fmt: skip


class Cutoffs(TypedDict):
    """Cut-off frequencies by layer, read in two ways."""

    exact: dict[str, list[float]]
    whole_bins: dict[str, list[float]]


class _Measured(TypedDict):
    accuracy: float | None
    macs: float
    resampling_macs: float
    strides: dict[str, list[float]]
    strides_initial: dict[str, list[float]]


class Result(_Measured, total=False):
    """The content of a run's `result.json`; what is not required is None where a file lacks it."""

    accuracies: dict[str, float] | None
    step_time_ms: float | None
    loss: float | None
    axes: dict[str, str] | None
    cutoffs: Cutoffs | None
    stride_cost: float | None
    macs_budget: float | None
    parameters: int | None
    steps: int | None
    epochs: int | None
    train_seconds: float | None
    peak_memory_mb: float | None
    seed: int | None
    data: str | None
    data_fingerprint: str | None
    commit: str | None
    versions: dict[str, str] | None
    hardware: str | None


def check_result(content: Any) -> Result:
    """Return the content of a `result.json` once it is checked, with None for what it lacks.

    Raises:
        ValueError: a value of another kind, strides and frequencies that are not of the same layers and axes.
    """
    check_kind(content, Result)
    result: Result = dict.fromkeys(get_type_hints(Result)) | content
    for layer, strides in [*result["strides"].items(), *result["strides_initial"].items()]:
        if not 1 <= len(strides) <= 3 or not all(0 < stride < math.inf for stride in strides):
            raise ValueError(f"its strides of {layer} must be one to three numbers > 0, got {short_repr(strides)}")
    axes = {layer: len(strides) for layer, strides in result["strides"].items()}
    if {layer: len(strides) for layer, strides in result["strides_initial"].items()} != axes:
        raise ValueError("its strides_initial must be of the layers and axes of its strides")
    cutoffs: Mapping[str, Any] = result["cutoffs"] or {}
    for name, found in cutoffs.items():
        first = len(next(iter(found.values()), ()))
        if first != len(result["axes"] or ()) or any(len(found[layer]) != axes.get(layer) for layer in found):
            raise ValueError(f"its cutoffs, {name}, must be of layers and axes of its strides")
    return result


class Saved(TypedDict):
    """The part of a checkpoint that every reader needs; Lightning reads the rest of it where a run is resumed."""

    state_dict: dict[str, Tensor]
    global_step: int
    epoch: int


class _DataState(TypedDict, total=False):
    num_classes: int
    classes: list[str]
    sample_shape: list[int]
    mean: Tensor | None
    std: Tensor | None
    sample_rate: int


def check_data_state(state: Any) -> None:
    """Check what a checkpoint knows of its data.

    Raises:
        ValueError: a value of another kind, as many names as there are no classes, an empty sample.
    """
    check_kind(state, _DataState)
    if "classes" in state and state.get("num_classes") != len(state["classes"]):
        raise ValueError("its num_classes must be the number of its classes")
    shape = state.get("sample_shape", (1,))
    if not shape or min(shape) < 1 or math.prod(shape) > 2**31:
        raise ValueError(f"its sample_shape must be sizes >= 1, got {short_repr(shape)}")
    for name in "mean", "std":
        if isinstance(own := state.get(name), Tensor) and own.shape not in ((1,), (shape[0],)):
            raise ValueError(f"its {name} must have a number for each of {shape[0]} channels, got {short_repr(own)}")
