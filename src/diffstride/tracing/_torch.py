"""Private parts of PyTorch. Each entry has a reason, and the version since which it exists.

Imports from `torch._*` are in `tracing/_torch.py` only; `torch.utils._pytree`, `_python_dispatch` and `_sympy` are used
directly.

Everything here is tested with the versions of torch in `docs/results/versions.md`. Imports that load sympy or the
compiler happen on use, because each takes longer than importing the rest of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

# Tensors that have shapes and no values. No public name exists. `import torch` loads this module anyway. Since 2.0.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)

if TYPE_CHECKING:
    from diffstride.tracing.session import Session

__all__ = [
    "DataDependentOutputException", "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode",
    "UnsupportedOperatorException", "apply", "in_backward", "new_environment", "new_size", "python_dispatcher",
    "short_quotients", "storage_of", "swap", "unset_fake_temporarily", "watched_sizes",
]  # fmt: skip


def storage_of(tensor: Tensor) -> int:
    """Return an address that a tensor's storage shares with its views. `data_ptr` is 0 for fake tensors. Since 2.0."""
    address: int = tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
    return address


def swap(a: Tensor, b: Tensor) -> None:
    """Swap two tensors in place, wherever they are referenced.

    `torch.utils.swap_tensors` does the same, but refuses tensors that have weak references or views. Since 2.3.
    """
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


def in_backward() -> bool:
    """Return whether autograd is computing gradients. No public function returns this. Since 2.1."""
    return torch._C._current_graph_task_id() != -1


def python_dispatcher() -> AbstractContextManager[Any]:
    """Use decompositions in Python. They take symbols where kernels in C++ need numbers. Since 2.0."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def new_environment(session: Session) -> Any:
    """Return a `ShapeEnv` for the sizes of a session, which answers each question about them. Since 2.1.

    `ShapeEnv` itself draws conclusions: two sizes that compare equal become one symbol. Then nobody could find out
    which comparisons the model needs. All questions pass through `evaluate_expr`.
    """
    import sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class Environment(ShapeEnv):
        def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
            has_symbols = getattr(orig_expr, "free_symbols", None)
            return session.answer(orig_expr) if has_symbols else sympy.sympify(orig_expr)

    return Environment(
        duck_shape=False,
        specialize_zero_one=False,
        allow_scalar_outputs=False,
        allow_dynamic_output_shape_ops=False,
    )


def new_size(environment: Any, number: int, hint: int, positive: bool | None) -> tuple[Any, torch.SymInt]:
    """Return a new symbol with the value `hint`, and the size that stands for it. Since 2.2."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(f"size_{number}")
    symbol = environment.create_symbol(
        hint,
        source,
        dynamic_dim=DimDynamic.DYNAMIC,
        constraint_dim=None,
        positive=positive,
        do_not_specialize_zero_one=True,
    )
    return symbol, environment.create_symintnode(symbol, hint=hint, source=source)


@contextmanager
def watched_sizes(session: Session) -> Iterator[None]:
    """Note sizes that are made, and let those of the session be keys of caches: their hash is that of their value.

    `SymInt.__hash__` raises otherwise, since 2.1. Two keys are then compared, which the session notes as usual.
    """
    original, make = torch.SymInt.__hash__, torch.SymInt.__init__

    def noted(size: torch.SymInt, node: Any) -> None:
        make(size, node)  # type: ignore[no-untyped-call]
        session.tensors.note_size(size)

    def by_value(size: torch.SymInt) -> int:
        number = session.number(size)
        return original(size) if number is size else hash(number)

    with patch.multiple(torch.SymInt, __hash__=by_value, __init__=noted):
        yield


@contextmanager
def short_quotients(session: Session) -> Iterator[None]:
    """Replace quotients and remainders of sizes by symbols (`Session.short`) with patches of `SymNode`. Since 2.1."""
    from torch.fx.experimental.sym_node import SymNode

    def shortened(original: Any) -> Any:
        def method(node: Any, other: Any) -> Any:
            made = original(node, other)
            return session.short(made) if node.shape_env is session.environment else made

        return method

    names = [name for name in ("floordiv", "int_floordiv", "mod", "python_mod") if name in vars(SymNode)]
    with patch.multiple(SymNode, **{name: shortened(vars(SymNode)[name]) for name in names}):
        yield


def apply(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call an operator. Padding by symbols is decomposed, since the kernel of 2.13 makes numbers of them."""
    pad = torch.ops.aten.constant_pad_nd.default
    if func is pad and any(isinstance(n, torch.SymInt) for n in (*args[0].shape, *args[1])):
        from torch import _refs  # noqa: F401  registers the decomposition
        from torch._decomp import decomposition_table

        return decomposition_table[func](*args, **kwargs)
    return func(*args, **kwargs)
