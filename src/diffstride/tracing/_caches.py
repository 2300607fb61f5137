"""Turning the tensors that a trace has left in caches outside of the model into true ones, or removing them."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from types import CellType, FrameType, GeneratorType, ModuleType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from diffstride.tracing import _torch
from diffstride.tracing._replay import Replay, tensors_in

_DEPTH = 4  # of containers between a tensor and the cache that keeps it
_NO_CACHES = {*sys.stdlib_module_names, "torch", "numpy", "sympy"} - {"__main__"}


class TraceTensors:
    """The tensors of a trace, of which none may outlive it.

    Code of a model keeps tensors in global dictionaries, behind `functools.lru_cache`, in objects and in closures. A
    tensor that is still alive after the trace is kept like that.

    - A tensor made of numbers and sizes alone, such as a window, becomes a true one where it is: the one that a run
      with values would have made at the sizes of the trace. Sizes that are kept become numbers.
    - Any other is removed from its container, and a name or an attribute for it is what it was before, or None. An
      entry whose key is a size goes as a whole, and so does what `lru_cache` keeps. The model then makes it anew.

    Args:
        number: returns a size of the trace as a number, and anything else as it is.
    """

    def __init__(self, number: Callable[[Any], Any]) -> None:
        self._number, self._replay = number, Replay(number)
        self._made: list[ReferenceType[Tensor]] = []
        self._sizes: list[ReferenceType[torch.SymInt]] = []
        self._globals = {
            id(vars(module)): dict(vars(module))
            for name, module in list(sys.modules.items())
            if isinstance(module, ModuleType) and name.split(".")[0] not in _NO_CACHES
        }

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Remember tensors that the trace has made."""
        self._made += map(ref, tensors)

    def note_size(self, size: torch.SymInt) -> None:
        """Remember a size that the trace has made."""
        self._sizes.append(ref(size))

    def record(self, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Remember the tensors that an operation has made, and how."""
        self.note(tensors_in(output))
        self._replay.record(operation, args, kwargs, output)

    def forget(self) -> None:
        """Make those that are still alive true, or take them out of what keeps them."""
        if self._alive():
            gc.collect()  # cycles keep nothing
            _drop_entries(self._alive())
            true = self._replay.values(self._alive())
            for fake, value in true:
                _become(fake, value)
            kept = {id(fake) for fake, _ in true}
            self._take_out([tensor for tensor in self._alive() if id(tensor) not in kept], set())
        sizes = [s for made in self._sizes if (s := made()) is not None and self._number(s) is not s]
        _substitute(sizes, list(map(self._number, sizes)))
        self._made.clear()
        self._sizes.clear()
        self._replay = Replay(self._number)

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


def _become(fake: Tensor, value: Tensor) -> None:
    """Turn a fake tensor into a true one, wherever it is kept: in a set, a tuple, a context variable."""
    if isinstance(fake, nn.Parameter):
        value = nn.Parameter(value, fake.requires_grad)
    _torch.swap(fake, value)


def _substitute(old: Sequence[Any], new: Sequence[Any], depth: int = _DEPTH) -> None:
    """Put new values where dictionaries, lists, attributes and tuples keep the old ones."""
    by_id, tuples = dict(zip(map(id, old), new, strict=True)), []
    for owner in _owners(old, set()):
        if isinstance(owner, dict):
            owner.update({name: by_id[id(entry)] for name, entry in owner.items() if id(entry) in by_id})
        elif isinstance(owner, list | deque):
            for i in [i for i, entry in enumerate(owner) if id(entry) in by_id]:
                owner[i] = by_id[id(owner[i])]
        elif isinstance(owner, CellType):
            owner.cell_contents = by_id[id(owner.cell_contents)]
        elif isinstance(owner, tuple):
            tuples.append(owner)
        else:
            for name, entry in _attributes(owner, by_id):
                _set_attribute(owner, name, by_id[id(entry)])
    if tuples and depth:
        _substitute(
            tuples, [_like(each, (by_id.get(id(entry), entry) for entry in each)) for each in tuples], depth - 1
        )


def _like(old: tuple[Any, ...], entries: Iterable[Any]) -> tuple[Any, ...]:
    return torch.Size(entries) if isinstance(old, torch.Size) else tuple.__new__(type(old), entries)


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
    found = _attributes(owner, wanted)
    classes, slots = _classes_and_slots(owner)
    for name, _ in found:
        if name not in slots and any(name in vars(kind) for kind in classes):
            delattr(owner, name)
        else:
            _set_attribute(owner, name, None)
    return bool(found)


def _attributes(owner: Any, wanted: Container[int]) -> list[tuple[str, Any]]:
    """Return the names and values of the attributes with the wanted `id`."""
    names = (*getattr(owner, "__dict__", ()), *_classes_and_slots(owner)[1])
    return [(name, value) for name in names if id(value := getattr(owner, name, None)) in wanted]


def _classes_and_slots(owner: Any) -> tuple[Sequence[type], list[str]]:
    classes = owner.__mro__[1:] if isinstance(owner, type) else type(owner).__mro__
    return classes, [name for kind in classes for name in getattr(kind, "__slots__", ())]


def _set_attribute(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        setattr(owner, name, value)
    else:
        with suppress(AttributeError, TypeError):  # of an object that cannot change
            object.__setattr__(owner, name, value)  # which a frozen dataclass allows
