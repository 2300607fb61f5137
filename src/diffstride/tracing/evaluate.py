"""Compile expressions of sizes to functions of numbers or tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sympy import Expr, Symbol


def evaluator(
    expressions: Sequence[Expr], symbols: Sequence[Symbol], derived: Mapping[Symbol, Expr]
) -> Callable[..., list[Any]]:
    """Return a function from values of the symbols, ints or tensors, to values of the expressions.

    For ints all is exact. A tensor is a relaxed size. There, a quotient by `b` that is rounded down becomes the
    quotient minus `(b - 1) / 2 b`, the mean of what rounding takes. A linear interpolation of the rounded values would
    have a slope of 0 between most whole numbers.

    Args:
        expressions: the results.
        symbols: the arguments of the function.
        derived: symbols that the expressions may also have, with the expressions that they stand for.
    """
    import sympy

    functions = {
        "FloorDiv": _floor_div,
        "CleanDiv": _clean_div,
        "Mod": _mod,
        "PythonMod": _mod,
        "Max": _largest,
        "Min": _smallest,
        "CeilToInt": _ceil,
        "FloorToInt": _floor,
        "TruncToInt": _floor,
        "RoundToInt": lambda x: x if isinstance(x, Tensor) else round(x),
        "FloatPow": operator.pow,
        "PowByNatural": operator.pow,
        "floor": _floor,
        "ceiling": _ceil,
        "ToFloat": lambda x: x,
        "IntTrueDiv": lambda a, b: a / b,
        "FloatTrueDiv": lambda a, b: a / b,
    }

    def shared(exprs: list[Expr]) -> tuple[list[tuple[Symbol, Expr]], list[Expr]]:
        """Return common parts and derived symbols in the order of use, and the expressions in terms of these."""
        needed: list[tuple[Symbol, Expr]] = []
        wanted = set().union(*(e.free_symbols for e in exprs))
        for symbol, expr in reversed(list(derived.items())):
            if symbol in wanted:
                needed.insert(0, (symbol, expr))
                wanted |= expr.free_symbols
        common, reduced = sympy.cse([*(e for _, e in needed), *exprs])
        # A common part may need a derived symbol, and the other way round.
        pending = [*common, *zip((s for s, _ in needed), reduced, strict=False)]
        known, ordered = set(symbols), []
        while pending:
            ready = [pair for pair in pending if pair[1].free_symbols <= known]
            ordered += ready
            known |= {symbol for symbol, _ in ready}
            pending = [pair for pair in pending if pair[0] not in known]
        return ordered, reduced[len(needed) :]

    compiled = sympy.lambdify(list(symbols), list(expressions), modules=[functions, "math"], cse=shared)
    return compiled  # type: ignore[no-any-return]


def _floor_div(a: Any, b: Any) -> Any:
    if isinstance(b, Tensor):  # a quotient of two sizes, not a size divided by a constant
        return a / b
    return a / b - (b - 1) / (2 * b) if isinstance(a, Tensor) else a // b


def _clean_div(a: Any, b: Any) -> Any:
    return a / b if isinstance(a, Tensor) or isinstance(b, Tensor) else a // b


def _mod(a: Any, b: Any) -> Any:
    b = int(b)
    return (b - 1) / 2 if isinstance(a, Tensor) else a % b


def _floor(x: Any) -> Any:
    return x if isinstance(x, Tensor) else int(x // 1)


def _ceil(x: Any) -> Any:
    return x if isinstance(x, Tensor) else int(-(-x // 1))


def _largest(*values: Any) -> Any:
    return _stacked(values).max() if any(isinstance(v, Tensor) for v in values) else max(values)


def _smallest(*values: Any) -> Any:
    return _stacked(values).min() if any(isinstance(v, Tensor) for v in values) else min(values)


def _stacked(values: Sequence[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
