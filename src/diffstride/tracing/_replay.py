"""What a trace has made of numbers and sizes alone, such as a window or a mask, made again with values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from diffstride.tracing._torch import FakeTensor, storage_of

_aten = torch.ops.aten
_LIKE = {  # of their first argument, these use shape, dtype and device alone
    _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.zeros_like, _aten.ones_like, _aten.full_like,
    _aten.rand_like, _aten.randn_like, _aten.randint_like,
}  # fmt: skip


class _Made(NamedTuple):
    """The place of a tensor among those that the steps have made."""

    place: int


class _Kept(NamedTuple):
    """A tensor that has values, which are to be those that it had."""

    tensor: Tensor
    version: int


class _Like(NamedTuple):
    """A tensor of any values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Step(NamedTuple):
    """An operation, with numbers in place of sizes, and the storages that it reads and makes."""

    operation: Callable[..., Any]
    args: Any
    kwargs: Any
    places: list[int]
    reads: set[int]
    makes: set[int]


class Replay:
    """The operations of a trace on numbers, sizes, and tensors made of these, in their order.

    Args:
        number: returns a size of the trace as a number, and anything else as it is.
    """

    def __init__(self, number: Callable[[Any], Any]) -> None:
        self._number = number
        self._steps: list[_Step] = []
        self._places = WeakIdKeyDictionary()
        self._count = itertools.count()
        self._storages: dict[int, Any] = {}  # by address; kept, so that no other one gets it

    def record(self, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Add an operation of the trace, unless it uses the values of other tensors."""
        given, made, written = tensors_in((args, kwargs)), tensors_in(output), written_by(operation, args, kwargs)
        is_like = operation._overloadpacket in _LIKE
        if is_like:
            given = given[1:]
            args = (_Like(tuple(map(self._number, args[0].shape)), args[0].dtype, args[0].device), *args[1:])
        if any(t.layout != torch.strided for t in made) or not all(map(self._has_values, given)):
            for tensor in written:
                self._storages.pop(storage_of(tensor), None)
            return
        args, kwargs = pytree.tree_map(self._without_fakes, (args, kwargs), is_leaf=lambda x: isinstance(x, _Like))
        self._storages |= {storage_of(tensor): tensor.untyped_storage() for tensor in made}
        for tensor in made:
            if tensor not in self._places:
                self._places[tensor] = next(self._count)
        places = [self._places[tensor] for tensor in made]
        makes = set(map(storage_of, [*made, *written]))
        self._steps.append(_Step(operation, args, kwargs, places, set(map(storage_of, given)), makes))

    def values(self, tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return those of the tensors that were made of numbers and sizes alone, each with a true one."""
        wanted = [tensor for tensor in tensors if isinstance(tensor, FakeTensor) and self._has_values(tensor)]
        storages, steps = set(map(storage_of, wanted)), []
        for step in reversed(self._steps):
            if step.makes & storages:
                storages |= step.reads
                steps.append(step)
        made: dict[int, Tensor] = {}
        true = partial(_true, made=made)
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        with torch.no_grad(), torch.random.fork_rng(gpus):
            for step in reversed(steps):
                try:
                    args, kwargs = pytree.tree_map(true, (step.args, step.kwargs), is_leaf=_is_recorded)
                    output = step.operation(*args, **kwargs)
                except (LookupError, RuntimeError):  # a tensor has changed or was not made, or the values do not fit
                    continue
                made |= zip(step.places, tensors_in(output), strict=True)
        found = [(tensor, made.get(self._places[tensor])) for tensor in wanted]
        return [(tensor, value) for tensor, value in found if value is not None]

    def _has_values(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, FakeTensor) or (tensor in self._places and storage_of(tensor) in self._storages)

    def _without_fakes(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _Made(self._places[leaf]) if isinstance(leaf, FakeTensor) else _Kept(leaf, _version(leaf))
        return self._number(leaf)


def _true(leaf: Any, made: dict[int, Tensor]) -> Any:
    if isinstance(leaf, _Made):
        return made[leaf.place]
    if isinstance(leaf, _Like):
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)
    if isinstance(leaf, _Kept):
        if _version(leaf.tensor) != leaf.version:
            raise LookupError
        return leaf.tensor
    return leaf


def _is_recorded(leaf: Any) -> bool:
    return isinstance(leaf, _Made | _Kept | _Like)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in arguments or in an output."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def written_by(operation: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operation writes to."""
    if not operation._schema.is_mutable:
        return []
    named = {argument.name: argument.alias_info for argument in operation._schema.arguments}
    given = [*zip(named.values(), args, strict=False), *((named[name], value) for name, value in kwargs.items())]
    return tensors_in([value for alias, value in given if alias is not None and alias.is_write])
