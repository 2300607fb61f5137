"""Find the methods by which a model computes output lengths from fixed strides, and the layers on the way.

Networks for speech compute which frames of a padded batch are real from the strides of their configuration
(`_get_feat_extract_output_lengths` of transformers). A method belongs to a chain of layers if it returns, for the
size that the example has before the chain, the size that the trace has behind one of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from diffstride.convert import handlers
from diffstride.convert.records import LengthMethod
from diffstride.tracing import Session


def find(model: nn.Module, session: Session, converted: Iterable[str]) -> tuple[LengthMethod, ...]:
    """Return the methods of the model that compute a number of frames which converted layers decide.

    Args:
        model: the model before its conversion.
        session: a trace of the model.
        converted: the names of the modules to be converted.
    """
    modules, names = dict(model.named_modules()), set(converted)
    candidates = [(name, method) for name, module in modules.items() for method in methods(module)]
    chains = list(_chains(modules, session, names)) if candidates else []
    found = []
    for name, method in candidates:
        fitting = (chain for chain in chains if _result(modules[name], method, chain.size) in chain.frames)
        if (chain := next(fitting, None)) is not None:
            found.append(replace(chain, module=name, method=method))
        elif any(not name or f"{other}.".startswith(f"{name}.") for other in names):
            found.append(LengthMethod(module=name, method=method))
    return tuple(found)


def methods(module: nn.Module) -> Iterator[str]:
    """Yield the names of the methods of a module that compute output lengths."""
    kinds = type(module).__mro__
    for kind in kinds[: kinds.index(nn.Module)]:
        yield from (name for name, value in vars(kind).items() if "output_length" in name and callable(value))


def _result(module: nn.Module, method: str, size: int) -> int | None:
    """Return the result of a method for a size; None if it needs other arguments."""
    with suppress(Exception):
        return int(getattr(module, method)(torch.tensor([size])))
    return None


def _chains(modules: Mapping[str, nn.Module], session: Session, converted: set[str]) -> Iterator[LengthMethod]:
    """Yield the chains that end at a converted layer, the last one first, for methods that are not known yet.

    Each layer of a chain takes the size that the one before it has made, along one axis.
    """
    for axis in range(3):
        steps = []
        for call in session.calls:
            layer = modules[call.module]
            if isinstance(layer, handlers.STRIDED) and call.input and call.output:
                ndim = handlers.ndim_of(layer)
                if axis < ndim:
                    before, after = (session.value(shape[-ndim:][axis]) for shape in (call.input, call.output))
                    if before != after or call.module in converted:
                        steps.append((call.module, before, after))
        for end in range(len(steps))[::-1]:
            if steps[end][0] in converted:
                chain = [steps[end]]
                for step in steps[:end][::-1]:
                    if step[2] == chain[0][1]:  # it ends where the chain begins
                        chain.insert(0, step)
                layers, sizes, frames = zip(*chain, strict=True)
                yield LengthMethod(module="", method="", layers=layers, axis=axis, size=sizes[0], frames=frames)
