"""Tensors and sizes that a trace leaves in caches outside of the model: they get values, or are removed.

A model's code may keep a table in a global dictionary, behind `functools.lru_cache`, in an object or in a closure. In a
trace it keeps a tensor without values there, with which no later run could compute.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from types import FrameType, GeneratorType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from diffstride.tracing import _torch
from diffstride.tracing._twins import Twins, tensors_in

_DEPTH = 4  # of containers between an object and the cache that keeps it
_LruCache = type(lru_cache(len))
_GONE = object()


class TraceTensors:
    """The tensors and sizes of a trace. What is alive after the trace is kept by some cache.

    - A tensor made of numbers and sizes alone, such as a window, gets the values that a run with values would have
      given it at the sizes of the trace. This works wherever it is kept.
    - Any other tensor is removed from the dictionary or list that has it; an attribute or a global name becomes None.
    - A size in a dictionary, a list, a tuple or an attribute becomes a number.
    - Cache entries whose keys are sizes are removed, and so is everything in an `lru_cache` that has such a tensor.

    Args:
        number: returns a size of the trace as a number, and anything else as it is.
    """

    def __init__(self, number: Callable[[Any], Any]) -> None:
        self._number, self._twins = number, Twins(number)
        self._tensors: list[ReferenceType[Tensor]] = []
        self._sizes: list[ReferenceType[torch.SymInt]] = []

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Remember tensors that the trace has made."""
        self._tensors += map(ref, tensors)

    def note_size(self, size: torch.SymInt) -> None:
        """Remember a size that the trace has made."""
        self._sizes.append(ref(size))

    def record(self, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Remember the tensors that an operation has made, and their values where these follow from sizes."""
        self.note(tensors_in(output))
        self._twins.follow(operation, args, kwargs, output)

    def forget(self) -> None:
        """Give values to what is still alive, or remove it from what keeps it."""
        if self._alive():
            gc.collect()  # what cycles keep is in no cache
            _drop_entries_by_size(self._alive())
            left = [tensor for tensor in self._alive() if not self._give_values(tensor)]
            _substitute(left, [_GONE] * len(left))
        sizes = [s for made in self._sizes if (s := made()) is not None and self._number(s) is not s]
        _substitute(sizes, list(map(self._number, sizes)))
        self._tensors.clear()
        self._sizes.clear()
        self._twins = Twins(self._number)

    def _give_values(self, tensor: Tensor) -> bool:
        """Turn a tensor into its twin, wherever it is kept. Return whether it has one."""
        twin = self._twins.of(tensor)
        if twin is not None:
            as_parameter = isinstance(tensor, nn.Parameter)
            _torch.swap(tensor, nn.Parameter(twin, tensor.requires_grad) if as_parameter else twin)
        return twin is not None

    def _alive(self) -> list[Tensor]:
        return [tensor for made in self._tensors if (tensor := made()) is not None]


def _holders(objects: Sequence[Any]) -> list[Any]:
    """Return what holds the objects, except frames and the sequence itself."""
    found = gc.get_referrers(*objects) if objects else []
    return [o for o in found if o is not objects and not isinstance(o, FrameType | GeneratorType)]


def _drop_entries_by_size(tensors: Sequence[Tensor]) -> None:
    """Remove the cache entries whose keys are sizes and that have one of the tensors somewhere in them."""
    objects: Sequence[Any] = tensors
    for _ in range(_DEPTH):
        ids, outer = set(map(id, objects)), []
        for holder in _holders(objects):
            if isinstance(holder, _LruCache):
                holder.cache_clear()
            elif isinstance(holder, dict):
                for key in [key for key, value in holder.items() if id(value) in ids and _has_size(key)]:
                    del holder[key]
            elif isinstance(holder, tuple | list):
                outer.append(holder)
        objects = outer


def _has_size(key: Any) -> bool:
    return isinstance(key, torch.SymInt) or (isinstance(key, tuple) and any(map(_has_size, key)))


def _substitute(old: Sequence[Any], new: Sequence[Any], depth: int = _DEPTH) -> None:
    """Replace objects in dictionaries, lists, attributes and the tuples in these; remove what becomes `_GONE`."""
    by_id, outer = dict(zip(map(id, old), new, strict=True)), []  # by `id`, so that no variable here is a holder
    for holder in _holders(old):
        if isinstance(holder, list | deque):
            entries = [by_id.get(id(entry), entry) for entry in holder]
            holder.clear()
            holder.extend(entry for entry in entries if entry is not _GONE)
        elif isinstance(holder, dict):
            _substitute_values(holder, by_id)
        elif not isinstance(holder, tuple) and isinstance(attributes := getattr(holder, "__dict__", None), dict):
            _substitute_values(attributes, by_id)
        else:
            outer.append(holder)
    if outer and depth:
        _substitute(outer, [_rebuilt(holder, by_id) for holder in outer], depth - 1)


def _substitute_values(values: dict[Any, Any], by_id: Mapping[int, Any]) -> None:
    """Substitute in a dictionary, which may be the namespace of an object, a class or a module."""
    owners = [o for o in gc.get_referrers(values) if isinstance(o, type) or getattr(o, "__dict__", None) is values]
    for name in [name for name, value in values.items() if id(value) in by_id]:
        new = by_id[id(values[name])]
        if owners and isinstance(owners[0], type):
            setattr(owners[0], name, None if new is _GONE else new)
        elif new is not _GONE:
            values[name] = new
        elif owners:
            values[name] = None
        else:
            del values[name]


def _rebuilt(holder: Any, by_id: Mapping[int, Any]) -> Any:
    """Return a tuple with new entries. Return what else holds an object as it is, or `_GONE` with its object."""
    entries = [by_id.get(id(entry), entry) for entry in holder] if isinstance(holder, tuple) else [*by_id.values()]
    if any(entry is _GONE for entry in entries):
        return _GONE
    if not isinstance(holder, tuple):
        return holder
    return torch.Size(entries) if isinstance(holder, torch.Size) else tuple.__new__(type(holder), entries)
