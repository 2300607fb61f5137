"""Finds the methods by which a model's code computes output lengths from fixed strides, and the layers on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from diffstride.convert import handlers
from diffstride.tracing import Session

_COUNTED = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
)  # fmt: skip


@dataclass(frozen=True)
class LengthMethod:
    """A method that computes output lengths, as `diffstride.nn.lengths.OutputLengths` takes its place."""

    module: str
    """The module that has it."""
    method: str
    layers: tuple[str, ...]
    """The layers on the way, in the order of their calls; none where the way is not known."""
    axis: int = 0
    """Of their maps."""
    size: int = 0
    """Of the example along it."""
    frames: tuple[int, ...] = ()
    """What each layer made of it before the conversion."""


def find(model: nn.Module, session: Session, converted: Iterable[str]) -> list[LengthMethod]:
    """Return the methods of the model that give a number of frames which converted layers decide.

    Args:
        model: before its conversion.
        session: a trace of it.
        converted: the names of the modules to be converted.
    """
    modules, names = dict(model.named_modules()), set(converted)
    candidates = [(name, method) for name, module in modules.items() for method in methods(module)]
    ways = list(_ways(modules, session, names)) if candidates else []
    found = []
    for name, method in candidates:
        fitting = (way for way in ways if _result(modules[name], method, way.size) in way.frames)
        if (way := next(fitting, None)) is not None:
            layers, frames = tuple(step.module for step in way.steps), way.frames
            found.append(LengthMethod(name, method, layers, way.axis, way.size, frames))
        elif any(other.startswith(name) for other in names):
            found.append(LengthMethod(name, method, ()))
    return found


def methods(module: nn.Module) -> Iterator[str]:
    """Yield the names of the methods of a module that give output lengths."""
    kinds = type(module).__mro__
    for kind in kinds[: kinds.index(nn.Module)]:
        yield from (name for name, value in vars(kind).items() if "output_length" in name and callable(value))


def _result(module: nn.Module, method: str, size: int) -> int | None:
    """Return what a method gives for a size; None where it wants something else."""
    with suppress(Exception):
        return int(getattr(module, method)(torch.tensor([size])))
    return None


class _Step(NamedTuple):
    module: str
    before: int
    after: int


class _Way(NamedTuple):
    axis: int
    steps: list[_Step]

    @property
    def size(self) -> int:
        return self.steps[0].before

    @property
    def frames(self) -> tuple[int, ...]:
        return tuple(step.after for step in self.steps)


def _ways(modules: Mapping[str, nn.Module], session: Session, converted: set[str]) -> Iterator[_Way]:
    """Yield the ways to converted layers, the last one first: each layer takes what the one before it has made."""
    for axis in range(3):
        steps = []
        for call in session.calls:
            layer = modules[call.module]
            if isinstance(layer, _COUNTED) and call.input and call.output and axis < handlers.ndim_of(layer):
                before, after = (
                    session.value(shape[-handlers.ndim_of(layer) :][axis]) for shape in (call.input, call.output)
                )
                if before != after or call.module in converted:
                    steps.append(_Step(call.module, before, after))
        for end in range(len(steps))[::-1]:
            if steps[end].module in converted:
                way = [steps[end]]
                for step in steps[:end][::-1]:
                    if step.after == way[0].before:
                        way.insert(0, step)
                yield _Way(axis, way)
