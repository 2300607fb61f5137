"""Forgetting the tensors that a trace has left in caches outside of the model, so that nobody computes with them."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from types import CellType, FrameType, GeneratorType, ModuleType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

_DEPTH = 4  # of containers between a tensor and the cache that keeps it
_NO_CACHES = {*sys.stdlib_module_names, "torch", "numpy", "sympy"} - {"__main__"}


class TraceTensors:
    """The tensors of a trace, of which none may outlive it.

    Code of a model keeps tensors in global dictionaries, behind `functools.lru_cache`, in objects and in closures. A
    tensor that is still alive after the trace is kept like that. An entry whose key is a size of the trace goes as a
    whole, and so does what `lru_cache` keeps. Elsewhere the tensor is removed from its container, and a name or an
    attribute for it is what it was before, or None. The model then fills its cache anew.
    """

    def __init__(self) -> None:
        self._made: list[ReferenceType[Tensor]] = []
        self._globals = {
            id(vars(module)): dict(vars(module))
            for name, module in list(sys.modules.items())
            if isinstance(module, ModuleType) and name.split(".")[0] not in _NO_CACHES
        }

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Remember tensors that the trace has made."""
        self._made += map(ref, tensors)

    def forget(self) -> None:
        """Take those that are still alive out of what keeps them."""
        if self._alive():
            gc.collect()  # cycles keep nothing
            _drop_entries(self._alive())
            self._take_out(self._alive(), set())
        self._made.clear()

    def _alive(self) -> list[Tensor]:
        return [tensor for made in self._made if (tensor := made()) is not None]

    def _take_out(self, values: Sequence[Any], seen: set[int], depth: int = _DEPTH) -> None:
        wanted, others = set(map(id, values)), []
        for owner in _owners(values, seen):
            if isinstance(owner, dict):
                self._take_out_of_dict(owner, wanted)
            elif isinstance(owner, list | deque):
                for i in [i for i, entry in enumerate(owner) if id(entry) in wanted][::-1]:
                    del owner[i]
            elif isinstance(owner, set):
                owner -= {entry for entry in owner if id(entry) in wanted}
            elif isinstance(owner, CellType):
                owner.cell_contents = None
            elif not _clear_attributes(owner, wanted):
                others.append(owner)  # a tuple, say: what holds it loses it
        if others and depth:
            self._take_out(others, seen, depth - 1)

    def _take_out_of_dict(self, owner: dict[Any, Any], wanted: set[int]) -> None:
        before = self._globals.get(id(owner))
        if before is None:
            for holder in gc.get_referrers(owner):
                if isinstance(holder, type) or getattr(holder, "__dict__", None) is owner:
                    _clear_attributes(holder, wanted)
        for name in _names(owner, wanted):
            if before is not None and name in before:
                owner[name] = before[name]
            else:
                del owner[name]


def _drop_entries(tensors: Sequence[Any]) -> None:
    """Remove the entries of caches that have one of the tensors somewhere in them."""
    values, seen = tensors, set[int]()
    for _ in range(_DEPTH):
        wanted, others = set(map(id, values)), []
        for owner in _owners(values, seen):
            if hasattr(owner, "cache_clear"):
                owner.cache_clear()
            elif isinstance(owner, dict) and (names := [n for n in _names(owner, wanted) if _has_size(n)]):
                for name in names:
                    del owner[name]
            elif not isinstance(owner, type | ModuleType):
                others.append(owner)
        if not others:
            return
        values = others


def _owners(values: Sequence[Any], seen: set[int]) -> list[Any]:
    """Return what holds the values, but for frames and what was seen before."""
    # Objects are compared by `id` everywhere, so that no variable of a closure here is among those that hold them.
    seen |= {id(values), *map(id, values)}
    found = gc.get_referrers(*values) if values else []
    return [o for o in found if not (id(o) in seen or isinstance(o, FrameType | GeneratorType))]


def _names(owner: dict[Any, Any], wanted: set[int]) -> list[Any]:
    return [name for name, entry in owner.items() if id(entry) in wanted or id(name) in wanted]


def _has_size(key: Any) -> bool:
    return isinstance(key, torch.SymInt) or (isinstance(key, tuple) and any(map(_has_size, key)))


def _clear_attributes(owner: Any, wanted: set[int]) -> bool:
    """Set attributes of an object or a class with the wanted `id` to None, or remove what hides a class's own."""
    classes = owner.__mro__[1:] if isinstance(owner, type) else type(owner).__mro__
    slots = [name for kind in classes for name in getattr(kind, "__slots__", ())]
    names = [name for name in (*getattr(owner, "__dict__", ()), *slots) if id(getattr(owner, name, None)) in wanted]
    for name in names:
        if name not in slots and any(name in vars(kind) for kind in classes):
            delattr(owner, name)
        else:
            setattr(owner, name, None)
    return bool(names)
