"""The results of one symbolic run: sizes as expressions, questions about them, and operations that multiply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from diffstride.errors import UsageError
from diffstride.tracing import _torch
from diffstride.tracing._caches import TraceTensors

if TYPE_CHECKING:
    from sympy import Expr, Symbol

Size: TypeAlias = int | torch.SymInt
"""A size as torch has it."""
Shape: TypeAlias = "tuple[Expr, ...]"
"""The sizes of a tensor as sympy has them."""


class Relation(NamedTuple):
    """A question about sizes that the code asked while it ran."""

    expression: Expr
    truth: Any
    """The answer: a boolean or a number of sympy."""
    module: str
    function: str | None
    """The function of torch that asked; None for the model's Python code."""


class Work(NamedTuple):
    """An operation that multiplies: a convolution, a matrix product or an attention."""

    module: str
    macs: Expr


class Call(NamedTuple):
    """A module that ran, and the shapes of its first input and of its output, where these are tensors."""

    module: str
    input: Shape | None
    output: Shape | None


class TraceError(UsageError):
    """A model that cannot be run with symbols for sizes."""

    def __init__(self, message: str, session: Session) -> None:
        super().__init__(message)
        self.session = session


class Session:
    """One symbolic run and its results.

    Args:
        names: the modules of the model and their names.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self.hints: dict[Symbol, Expr] = {}
        """The symbols and their values."""
        self.keys: dict[Symbol, Any] = {}
        """The symbols and the keys of the sizes that they stand for."""
        self.derived: dict[Symbol, Expr] = {}
        """Symbols that stand for quotients and remainders, in the order in which they were made."""
        self.relations: list[Relation] = []
        self.work: list[Work] = []
        self.strided: list[tuple[str, str]] = []
        """Operations that leave out samples: module and operation."""
        self.calls: list[Call] = []
        self.outputs: list[Shape] = []
        """The shapes of the tensors that the model returned."""
        self.storages: list[Expr] = []
        """Bytes of each storage saved for backward, in training mode."""
        self.stack: list[str] = []
        """The modules that are running, outermost first; after a failure, those in which it happened."""
        self.function: str | None = None
        """The function of torch that is running."""
        self.names = names
        self.environment = _torch.new_environment(self)
        self.tensors = TraceTensors(self.number)
        self._sizes: dict[Any, Size] = {}
        self._shortened: dict[Expr, Size] = {}
        self._answers: dict[Expr, Any] = {}
        self._ended = False

    def size(self, key: Any, hint: int, positive: bool | None = True) -> Size:
        """Return the size with this key: a symbol with the value `hint`."""
        if key not in self._sizes:
            symbol, self._sizes[key] = _torch.new_size(self.environment, len(self._sizes), hint, positive)
            self.hints[symbol] = expression(hint)  # `xreplace` takes numbers of sympy only
            self.keys[symbol] = key
        return self._sizes[key]

    def short(self, node: Any) -> Any:
        """Return a quotient or a remainder as a symbol of its own. Sympy would take minutes to simplify nested ones."""
        import sympy

        expr = node.expr
        if not expr.has(sympy.Function):
            return node
        if expr not in self._shortened:
            made = self.size(("derived", len(self._shortened)), self.value(expr), positive=None)  # may be 0
            self._shortened[expr] = made
            self.derived[expression(made)] = expr
        return self._shortened[expr].node  # type: ignore[union-attr]

    def expanded(self, expr: Expr) -> Expr:
        """Return an expression with every derived symbol written out."""
        while expr.free_symbols & self.derived.keys():
            expr = expr.xreplace(self.derived)
        return expr

    def sized(self, expr: Expr) -> Size:
        """Return a size that is an expression in symbols."""
        if expr.is_Integer:
            return int(expr)
        size: torch.SymInt = self.environment.create_symintnode(expr, hint=self.value(expr))
        return size

    def value(self, expr: Expr) -> int:
        """Return the value of an expression."""
        return int(expr.xreplace(self.hints))

    def number(self, size: Any) -> Any:
        """Return a symbolic number of this run as a number, and anything else as it is."""
        if isinstance(size, torch.SymInt | torch.SymFloat) and size.node.shape_env is self.environment:
            return size.node.pytype(size.node.expr.xreplace(self.hints))
        return size

    def end(self) -> None:
        """Leave nothing behind that code outside of the run could compute with."""
        self._sizes.clear()
        self._shortened.clear()
        self.names = {}
        self.tensors.forget()
        self._ended = True

    @property
    def module(self) -> str:
        """The innermost module that is running."""
        return self.stack[-1] if self.stack else ""

    def answer(self, expr: Expr) -> Any:
        """Answer a question about sizes by their values, and note it. After the run it is only answered."""
        import sympy

        answer = self._answers.get(expr)
        if answer is None:
            answer = self._answers[expr] = sympy.sympify(expr.xreplace(self.hints))
        if not self._ended:
            self.relations.append(Relation(expr, answer, self.module, self.function))
        return answer


def expression(size: Size) -> Expr:
    """Return a size as an expression of sympy."""
    import sympy

    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def shape(value: object) -> Shape | None:
    """Return the sizes of a tensor as expressions of sympy; None for anything else."""
    return tuple(map(expression, value.shape)) if isinstance(value, Tensor) else None


def described(model: nn.Module, name: str) -> str:
    """Return the name and class of a module for a message."""
    kind = type(model.get_submodule(name)).__name__
    return f"{name} ({kind})" if name else f"the model itself ({kind})"
