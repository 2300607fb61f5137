"""What one symbolic run found: sizes as expressions, relations between them, and operations that multiply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from diffstride.errors import UsageError
from diffstride.tracing import _torch
from diffstride.tracing._caches import TraceTensors

if TYPE_CHECKING:
    import sympy

    Expr: TypeAlias = sympy.Expr


class Relation(NamedTuple):
    """Something that the code asked about sizes while it ran."""

    expression: Any
    truth: Any
    module: str
    function: str | None
    """The function of torch that asked; None for the model's Python code."""


class Work(NamedTuple):
    """An operation that multiplies: a convolution, a matrix product or an attention."""

    module: str
    operation: str
    macs: Any


class Call(NamedTuple):
    """A module that ran, and the shapes of its first input and of its output, where these are tensors."""

    module: str
    input: tuple[Any, ...] | None
    output: tuple[Any, ...] | None


class TraceError(UsageError):
    """The model cannot be run with symbols for sizes."""

    def __init__(self, message: str, session: Session) -> None:
        super().__init__(message)
        self.session = session


class Session:
    """One pass, and what was found in it."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self.hints: dict[Any, Any] = {}
        """The symbols and their values."""
        self.relations: list[Relation] = []
        self.work: list[Work] = []
        self.strided: list[tuple[str, str]] = []
        """Operations that leave out samples: module and operation."""
        self.calls: list[Call] = []
        self.storages: list[Any] = []
        """Bytes of each storage saved for backward, where that was asked for."""
        self.stack: list[str] = []
        """The modules that are running, outermost first; after a failure, those in which it happened."""
        self.function: str | None = None
        """The function of torch that is running."""
        self.names = names
        self.environment = _torch.shape_environment()(
            duck_shape=False,
            specialize_zero_one=False,
            allow_scalar_outputs=False,
            allow_dynamic_output_shape_ops=False,
        )
        self.environment.session = self
        self.tensors = TraceTensors(self.number)
        self.ended = False
        """Whether the run is over. Questions about a size that somebody has kept are answered, but not noted."""
        self.keys: dict[Any, Any] = {}
        """What the symbols are called."""
        self._symbols: dict[Any, Any] = {}
        self._sizes: dict[Any, Any] = {}
        self.derived: dict[Any, Any] = {}
        """Symbols that stand for quotients and remainders, in the order in which they were made."""
        self._shortened: dict[Any, Any] = {}
        self._answers: dict[Any, Any] = {}

    def size(self, key: Any, hint: int, positive: bool | None = True) -> Any:
        """The size that is called `key`: a symbol with this value."""
        if key not in self._symbols:
            symbol, self._sizes[key] = _torch.new_size(self.environment, len(self._symbols), hint, positive)
            self.hints[symbol] = expression(hint)  # `xreplace` takes sympy's numbers alone
            self.keys[symbol] = key
            self._symbols[key] = symbol
        return self._sizes[key]

    def symbol(self, key: Any) -> Any:
        """The symbol of the size that is called `key`."""
        return self._symbols[key]

    def short(self, node: Any) -> Any:
        """A quotient or a remainder as a symbol of its own: nested ones would take sympy minutes to simplify."""
        import sympy

        expr = node.expr
        if not expr.has(sympy.Function):
            return node
        if expr not in self._shortened:
            made = self.size(("derived", len(self._shortened)), self.value(expr), positive=None)  # may be 0
            self._shortened[expr] = made
            self.derived[expression(made)] = expr
        return self._shortened[expr].node

    def expanded(self, expr: Any) -> Any:
        """An expression with every derived symbol written out."""
        while expr.free_symbols & self.derived.keys():
            expr = expr.xreplace(self.derived)
        return expr

    def sized(self, expr: Any) -> Any:
        """A size that is an expression in symbols."""
        if expr.is_Integer:
            return int(expr)
        return self.environment.create_symintnode(expr, hint=self.value(expr))

    def value(self, expr: Any) -> int:
        """What an expression comes to."""
        return int(expr.xreplace(self.hints))

    def number(self, size: Any) -> Any:
        """Return a symbolic number of this run as a number; anything else as it is."""
        if isinstance(size, torch.SymInt | torch.SymFloat) and size.node.shape_env is self.environment:
            return size.node.pytype(size.node.expr.xreplace(self.hints))
        return size

    def end(self) -> None:
        """Leave nothing behind that code outside of the run could compute with."""
        self._sizes.clear()
        self._shortened.clear()
        self.tensors.forget()
        self.ended = True

    @property
    def module(self) -> str:
        """The innermost module that is running."""
        return self.stack[-1] if self.stack else ""

    def answer(self, expr: Any) -> Any:
        import sympy

        answer = self._answers.get(expr)
        if answer is None:
            answer = self._answers[expr] = sympy.sympify(expr.xreplace(self.hints))
        if not self.ended:
            self.relations.append(Relation(expr, answer, self.module, self.function))
        return answer


def expression(size: Any) -> Any:
    """A size as sympy has it."""
    import sympy

    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def shape(value: Any) -> tuple[Any, ...] | None:
    """The sizes of a tensor as sympy has them."""
    return tuple(map(expression, value.shape)) if isinstance(value, Tensor) else None


def described(model: nn.Module, name: str) -> str:
    """A module by its name and class."""
    kind = type(model.get_submodule(name)).__name__
    return f"{name} ({kind})" if name else f"the model itself ({kind})"
