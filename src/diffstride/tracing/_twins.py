"""Values for what a trace makes of numbers and sizes alone, such as a window or a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from diffstride.tracing._torch import FakeTensor, storage_of, unset_fake_temporarily

_aten = torch.ops.aten
_LIKE = {  # of their first argument, these use shape, dtype and device alone
    _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.zeros_like, _aten.ones_like, _aten.full_like,
    _aten.rand_like, _aten.randn_like, _aten.randint_like,
}  # fmt: skip


class Twins:
    """Tensors with values for the fake tensors of a trace that are made of numbers and sizes alone.

    Every operation on such tensors is carried out on their twins too, at the sizes of the trace.

    Args:
        number: returns a size of the trace as a number, and anything else as it is.
    """

    def __init__(self, number: Callable[[Any], Any]) -> None:
        self._number = number
        self._twins: Any = WeakIdKeyDictionary()

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the twin of a tensor, if it has one."""
        twin: Tensor | None = self._twins.get(tensor)
        return twin

    def follow(self, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Carry out an operation of the trace, unless it uses the values of tensors that have none."""
        try:
            with unset_fake_temporarily():
                values = operation(*self._values(operation, args), **pytree.tree_map(self._value, kwargs))
        except (LookupError, RuntimeError):  # a tensor without twin, or values that do not fit
            self._drop(written_by(operation, args, kwargs))
        else:
            for tensor, value in zip(tensors_in(output), tensors_in(values), strict=True):
                self._twins[tensor] = value

    def _values(self, operation: Any, args: Any) -> Any:
        if operation._overloadpacket in _LIKE:
            like = torch.empty((), dtype=args[0].dtype, device=args[0].device)
            return like.expand(*map(self._number, args[0].shape)), *pytree.tree_map(self._value, args[1:])
        return pytree.tree_map(self._value, args)

    def _value(self, leaf: Any) -> Any:
        if isinstance(leaf, FakeTensor):
            return self._twins[leaf]
        return leaf.clone() if isinstance(leaf, Tensor) else self._number(leaf)  # others' tensors are not written to

    def _drop(self, tensors: list[Tensor]) -> None:
        """Forget the twins of tensors whose values are no longer known, and of all views of these."""
        storages = {storage_of(self._twins[tensor]) for tensor in tensors if tensor in self._twins}
        for tensor, twin in list(self._twins.items()) if storages else ():
            if storage_of(twin) in storages:
                del self._twins[tensor]


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
