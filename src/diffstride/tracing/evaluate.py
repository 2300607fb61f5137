"""Compile expressions of sizes to functions of numbers or tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    import sympy

    Expr: TypeAlias = sympy.Expr


def evaluator(
    expressions: Sequence[Any], symbols: Sequence[Any], derived: Mapping[Any, Any]
) -> Callable[..., list[Any]]:
    """A function from values of the symbols, ints or tensors, to those of the expressions.

    `derived` are symbols that the expressions may also have, with what they stand for.

    Of ints all is exact. Of tensors, quotients that are rounded down become piecewise linear between whole numbers, so
    that a value lies between those at the sizes rounded down and up.
    """
    import sympy

    functions = {
        "FloorDiv": _floor_div,
        "CleanDiv": _floor_div,
        "Mod": _mod,
        "PythonMod": _mod,
        "Max": _largest,
        "Min": _smallest,
        "CeilToInt": _ceil,
        "FloorToInt": _floor,
        "TruncToInt": _floor,
        "floor": _floor,
        "ceiling": _ceil,
        "ToFloat": lambda x: x,
        "IntTrueDiv": lambda a, b: a / b,
        "FloatTrueDiv": lambda a, b: a / b,
    }

    def shared(exprs: list[Any]) -> tuple[list[Any], list[Any]]:
        needed: list[Any] = []
        wanted = set().union(*(e.free_symbols for e in exprs))
        for symbol, expr in reversed(list(derived.items())):
            if symbol in wanted:
                needed.insert(0, (symbol, expr))
                wanted |= expr.free_symbols
        common, reduced = sympy.cse([*(e for _, e in needed), *exprs])
        # In the order of use: what `cse` found in common may need a derived symbol, and the other way round.
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


def _between(function: Callable[[Any], Any], x: Any) -> Any:
    """A function of whole numbers, linear in between."""
    if not isinstance(x, Tensor):
        return function(x)
    low = int(x.detach().floor())
    at_low, above = function(low), function(low + 1)
    return at_low + (x - low) * (above - at_low)


def _floor_div(a: Any, b: Any) -> Any:
    if isinstance(b, Tensor):  # by a size: as a whole quotient it has no use for whole numbers in between
        return a / b
    return _between(lambda n: n // b, a)


def _mod(a: Any, b: Any) -> Any:
    b = int(b)
    return _between(lambda n: n % b, a)


def _floor(x: Any) -> Any:
    return x if isinstance(x, Tensor) else int(x // 1)


def _ceil(x: Any) -> Any:
    return x if isinstance(x, Tensor) else int(-(-x // 1))


def _largest(*values: Any) -> Any:
    tensors = [torch.as_tensor(v, dtype=torch.float64) for v in values]
    return torch.stack(tensors).max() if any(isinstance(v, Tensor) for v in values) else max(values)


def _smallest(*values: Any) -> Any:
    tensors = [torch.as_tensor(v, dtype=torch.float64) for v in values]
    return torch.stack(tensors).min() if any(isinstance(v, Tensor) for v in values) else min(values)
