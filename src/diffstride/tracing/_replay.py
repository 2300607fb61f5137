"""Replay what a trace has made of numbers and sizes alone, such as a window or a mask, with values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    """The number of a tensor among those that the steps have made."""

    number: int


class _Like(NamedTuple):
    """A tensor of any values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class _Step:
    """An operation, with numbers in place of sizes."""

    operation: Callable[..., Any]
    args: Any
    kwargs: Any
    made: list[int]
    """The numbers of the tensors that it makes."""
    reads: set[int]
    """The storages that it reads."""
    writes: set[int]
    """The storages that it makes or changes."""


class Replay:
    """The operations of a trace on numbers, sizes, and tensors made of these, in their order.

    Args:
        number: returns a size of the trace as a number, and anything else as it is.
    """

    def __init__(self, number: Callable[[Any], Any]) -> None:
        self._number = number
        self.clear()

    def clear(self) -> None:
        """Forget all operations."""
        self._steps: list[_Step] = []
        self._numbers = WeakIdKeyDictionary()
        self._count = itertools.count()
        self._storages: dict[int, Any] = {}  # by address; kept, so that no other one gets it

    def record(self, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Add an operation of the trace, unless it uses the values of other tensors."""
        given, made, written = tensors_in((args, kwargs)), tensors_in(output), written_by(operation, args, kwargs)
        if operation._overloadpacket in _LIKE:
            given = given[1:]
            args = (_Like(tuple(map(self._number, args[0].shape)), args[0].dtype, args[0].device), *args[1:])
        if any(t.layout != torch.strided for t in made) or not all(map(self._is_known, given)):
            for tensor in written:
                self._storages.pop(storage_of(tensor), None)
            return
        args, kwargs = pytree.tree_map(self._recorded, (args, kwargs), is_leaf=lambda leaf: isinstance(leaf, _Like))
        self._storages |= {storage_of(tensor): tensor.untyped_storage() for tensor in made}
        for tensor in made:
            if tensor not in self._numbers:
                self._numbers[tensor] = next(self._count)
        self._steps.append(
            _Step(
                operation=operation,
                args=args,
                kwargs=kwargs,
                made=[self._numbers[tensor] for tensor in made],
                reads=set(map(storage_of, given)),
                writes=set(map(storage_of, [*made, *written])),
            )
        )

    def values(self, tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return those of the tensors that were made of numbers and sizes alone, each with its true twin."""
        wanted = [tensor for tensor in tensors if isinstance(tensor, FakeTensor) and self._is_known(tensor)]
        storages, steps = set(map(storage_of, wanted)), []
        for step in reversed(self._steps):
            if step.writes & storages:
                storages |= step.reads
                steps.append(step)
        made: dict[int, Tensor] = {}

        def true(leaf: Any) -> Any:
            if isinstance(leaf, _Made):
                return made[leaf.number]
            return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, _Like) else leaf

        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        with torch.no_grad(), torch.random.fork_rng(gpus):
            for step in reversed(steps):
                try:
                    args, kwargs = pytree.tree_map(
                        true, (step.args, step.kwargs), is_leaf=lambda leaf: isinstance(leaf, _Made | _Like)
                    )
                    output = step.operation(*args, **kwargs)
                except (LookupError, RuntimeError):  # a tensor was not made, or the values do not fit
                    continue
                made |= zip(step.made, tensors_in(output), strict=True)
        found = [(tensor, made.get(self._numbers[tensor])) for tensor in wanted]
        return [(tensor, value) for tensor, value in found if value is not None]

    def _is_known(self, tensor: Tensor) -> bool:
        """Return whether a tensor has values, or is made of numbers and sizes alone."""
        return not isinstance(tensor, FakeTensor) or (tensor in self._numbers and storage_of(tensor) in self._storages)

    def _recorded(self, leaf: Any) -> Any:
        return _Made(self._numbers[leaf]) if isinstance(leaf, FakeTensor) else self._number(leaf)


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
