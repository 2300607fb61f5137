"""Which module runs at which size, and what follows from sizes: a model's own Python code run with symbols for sizes.

The model runs on fake tensors (shapes without values, in torch's `FakeTensorMode`), so a pass costs no compute and no
memory. Sizes that something else decides (a learnable stride, say) are symbols; every other size is an expression in
them. Where the code compares sizes, the symbols' present values decide and the comparison is noted.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diffstride._caches import TraceTensors
from diffstride._check import UserError, WorkError, first_words
from diffstride._replay import storage_of, tensors_in, written_by

if TYPE_CHECKING:
    import sympy

    Expr: TypeAlias = sympy.Expr

Forward = Callable[..., Any]


class ExampleInputs:
    """The arguments of a model's call, for models that take positional and keyword arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, example_inputs: Any) -> ExampleInputs:
        """A tensor or other value is the one argument, a tuple or list positional ones, a mapping keyword ones."""
        if isinstance(example_inputs, ExampleInputs):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            return cls(**example_inputs)
        if isinstance(example_inputs, (tuple, list)):
            return cls(*example_inputs)
        return cls(example_inputs)

    def call(self, model: nn.Module) -> Any:
        """What the model makes of them."""
        return model(*self.args, **self.kwargs)


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


class TraceError(UserError):
    """The model cannot be run with symbols for sizes."""

    def __init__(self, message: str, session: Session) -> None:
        super().__init__(message)
        self.session = session


@contextmanager
def on_examples(model: nn.Module) -> Iterator[None]:
    """What the model raises inside, in one line of the one who gave the inputs."""
    try:
        yield
    except (UserError, WorkError):
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model must run on the example inputs, {type(model).__name__} raised {type(error).__name__}: "
            f"{first_words(error)}"
        ) from error


@contextmanager
def preserved(model: nn.Module, *, unless_it_succeeds: bool = False) -> Iterator[None]:
    """Put the random state and the model back afterwards: modules, parameters, buffers, hooks, mode.

    Attributes are put back as they were, and containers among them with what they held; tensors are not copied.

    Args:
        model: any module.
        unless_it_succeeds: put the model back only where something is raised inside.
    """
    saved = [(m, dict(vars(m)), {k: _contents(v) for k, v in vars(m).items()}) for m in model.modules()]
    python, cpu = random.getstate(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    numpy = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy else None
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        for module, attributes, contents in saved if not (succeeded and unless_it_succeeds) else ():
            vars(module).clear()
            vars(module).update(attributes)
            for held in contents.values():
                if held:
                    _put_back(held)
        random.setstate(python)
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state_all(gpu)
        if numpy:
            numpy.random.set_state(of_numpy)


def _contents(value: Any, depth: int = 3) -> Any:
    """A container's contents, with those of the containers in it: `(container, copy, [contents ...])`."""
    if depth == 0 or not isinstance(value, (dict, list, set)):
        return None
    inner = value.values() if isinstance(value, dict) else value
    return value, value.copy(), [held for held in (_contents(v, depth - 1) for v in inner) if held]


def _put_back(held: Any) -> None:
    container, copied, inner = held
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(copied)
    for contents in inner:
        _put_back(contents)


@lru_cache(maxsize=1)
def _symbolic_environment() -> type:
    """Torch's `ShapeEnv`, made to note what is asked about sizes and to answer with the symbols' values.

    It would draw conclusions instead (two sizes compared equal are the same symbol from then on), of which it could
    not be told which ones the model needs. Imported late: it takes longer than the rest of the library.
    """
    import sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class Environment(ShapeEnv):
        session: Session

        def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
            if not getattr(orig_expr, "free_symbols", None):
                return sympy.sympify(orig_expr)
            return self.session._answer(orig_expr)

    return Environment


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
        self._environment = _symbolic_environment()(
            duck_shape=False,
            specialize_zero_one=False,
            allow_scalar_outputs=False,
            allow_dynamic_output_shape_ops=False,
        )
        self._environment.session = self
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
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        if key not in self._symbols:
            source = ConstantSource(f"size_{len(self._symbols)}")
            symbol = self._environment.create_symbol(
                hint,
                source,
                dynamic_dim=DimDynamic.DYNAMIC,
                constraint_dim=None,
                positive=positive,
                do_not_specialize_zero_one=True,
            )
            self.hints[symbol] = expression(hint)  # `xreplace` takes sympy's numbers alone
            self.keys[symbol] = key
            self._symbols[key] = symbol
            self._sizes[key] = self._environment.create_symintnode(symbol, hint=hint, source=source)
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
        return self._environment.create_symintnode(expr, hint=self.value(expr))

    def value(self, expr: Any) -> int:
        """What an expression comes to."""
        return int(expr.xreplace(self.hints))

    def number(self, size: Any) -> Any:
        """Return a symbolic number of this run as a number; anything else as it is."""
        if isinstance(size, torch.SymInt | torch.SymFloat) and size.node.shape_env is self._environment:
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

    def _answer(self, expr: Any) -> Any:
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


# What is patched and hooked in torch is for all threads.
_ONE_AT_A_TIME = threading.RLock()


def run(
    model: nn.Module,
    example: ExampleInputs,
    forwards: Callable[[Session, str, nn.Module], Forward | None],
    *,
    training: bool = False,
    symbolic_inputs: bool = False,
) -> Session:
    """Run the model once with symbols for sizes; it is left as found.

    Args:
        model: any module.
        example: the arguments.
        forwards: for a module a forward to take in place of its own, which may ask the session for sizes; or None.
        training: in training mode, with the storages saved for backward noted; else evaluation without gradients.
        symbolic_inputs: give the inputs symbols for sizes, too (those after the channels).

    Raises:
        TraceError: the model raises, looks at values (which fake tensors do not have), or uses what has no fake.
    """
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise UserError(f"model must be Python code, got a scripted module: {scripted[0] or 'the model itself'}")
    session = Session({module: name for name, module in model.named_modules()})
    with _ONE_AT_A_TIME, _watched_sizes(session):
        try:
            _run(session, model, example, forwards, training, symbolic_inputs)
        finally:
            session.end()
    return session


def _run(
    session: Session,
    model: nn.Module,
    example: ExampleInputs,
    forwards: Callable[[Session, str, nn.Module], Forward | None],
    training: bool,
    symbolic_inputs: bool,
) -> None:
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(shape_env=session._environment, allow_non_fake_inputs=True)
    fake.cache_enabled = False  # no operation is done twice with the same symbols
    with preserved(model), ExitStack() as stack:
        stack.enter_context(_without_logs())
        stack.enter_context(_short_quotients(session))
        stack.enter_context(enable_python_dispatcher())  # decompositions take symbols where kernels do not
        session.tensors.note(_make_fake(model, fake))
        stack.enter_context(fake)
        for module, name in session.names.items():
            forward = forwards(session, name, module)
            if forward is not None:
                vars(module)["forward"] = forward
        model.train(training)
        stack.enter_context(_watched(session))
        stack.enter_context(torch.set_grad_enabled(training))
        if training:
            stack.enter_context(_saved_storages(session, model))
        inputs = _fake_inputs(example, fake, session if symbolic_inputs else None)
        session.tensors.note(tensors_in((inputs.args, inputs.kwargs)))
        stack.enter_context(_Operations(session, fake))
        stack.enter_context(_Functions(session))
        try:
            inputs.call(model)
        except Exception as error:
            del inputs
            raise TraceError(_explanation(error, session, model), session) from _without_frames(error)


def _without_frames(error: Exception) -> Exception:
    """Turn the traceback of an error into text: frames, and the closures of their functions, keep tensors."""
    error.add_note("".join(traceback.format_tb(error.__traceback__)).rstrip())
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__, cause = None, cause.__context__
    return error


@contextmanager
def _watched_sizes(session: Session) -> Iterator[None]:
    """Note sizes that are made, and let those of the session be keys of dictionaries: their hash is their value's.

    Whether two of them are the same key is a comparison like any other, which is noted.
    """
    original, make = torch.SymInt.__hash__, torch.SymInt.__init__

    def noted(size: torch.SymInt, node: Any) -> None:
        make(size, node)  # type: ignore[no-untyped-call]
        session.tensors.note_size(size)

    def by_value(size: torch.SymInt) -> int:
        number = session.number(size)
        return original(size) if number is size else hash(number)

    torch.SymInt.__hash__ = by_value  # type: ignore[assignment, method-assign]
    torch.SymInt.__init__ = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.SymInt.__hash__ = original  # type: ignore[method-assign]
        torch.SymInt.__init__ = make  # type: ignore[method-assign]


@contextmanager
def _short_quotients(session: Session) -> Iterator[None]:
    """Have the session shorten the quotients and remainders of its own sizes."""
    from torch.fx.experimental.sym_node import SymNode

    def shortened(original: Any) -> Any:
        def method(node: Any, other: Any) -> Any:
            made = original(node, other)
            return session.short(made) if node.shape_env is session._environment else made

        return method

    names = [name for name in ("floordiv", "int_floordiv", "mod", "python_mod") if name in vars(SymNode)]
    originals = {name: vars(SymNode)[name] for name in names}
    try:
        for name, original in originals.items():
            setattr(SymNode, name, shortened(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(SymNode, name, original)


_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.sym_node", "torch.__trace")


@contextmanager
def _without_logs() -> Iterator[None]:
    """Failures are told by exceptions; torch writes them to its logs as well."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    were = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, disabled in zip(loggers, were, strict=True):
            logger.disabled = disabled


def _make_fake(model: nn.Module, fake: Any) -> Iterable[Tensor]:
    """Replace parameters, buffers, and tensors that are plain attributes; return the new ones."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    if id(tensor) not in made:
                        made[id(tensor)] = _fake_tensor(tensor, fake)
                    tensors[name] = made[id(tensor)]
    return made.values()


def _fake_tensor(tensor: Tensor, fake: Any) -> Tensor:
    if nn.parameter.is_lazy(tensor):
        raise UserError("model must have been run once: it has a lazy module without shapes")
    made: Tensor = fake.from_tensor(torch.Tensor.detach(tensor), static_shapes=True)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _fake_inputs(example: ExampleInputs, fake: Any, session: Session | None) -> ExampleInputs:
    count = 0

    def convert(value: Any) -> Any:
        nonlocal count
        if not isinstance(value, Tensor):
            return value
        if session is None or not value.is_floating_point() or value.ndim < 2:
            return fake.from_tensor(value.detach(), static_shapes=True)
        fixed = min(2, value.ndim - 1)
        shape = [
            *value.shape[:fixed],
            *(session.size(("input", count, i), n) for i, n in enumerate(value.shape[fixed:])),
        ]
        count += 1
        return torch.empty(shape, dtype=value.dtype, device=value.device)

    return ExampleInputs(*pytree.tree_map(convert, example.args), **pytree.tree_map(convert, example.kwargs))


def shape(value: Any) -> tuple[Any, ...] | None:
    """The sizes of a tensor as sympy has them."""
    return tuple(map(expression, value.shape)) if isinstance(value, Tensor) else None


@contextmanager
def _watched(session: Session) -> Iterator[None]:
    """Keep the list of the modules that are running."""
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    def enter(module: nn.Module, args: Any) -> None:
        if module in session.names:
            session.stack.append(session.names[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in session.names:
            session.calls.append(Call(session.stack.pop(), shape(args[0] if args else None), shape(output)))

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _saved_storages(session: Session, model: nn.Module) -> Iterator[None]:
    """Note the bytes of every storage that is saved for backward, once, parameters excluded."""
    seen = set(map(storage_of, model.parameters()))
    alive = []  # an address is taken again once its owner is gone

    def pack(tensor: Tensor) -> None:  # there is no backward pass, and a graph that holds its own output is never freed
        if storage_of(tensor) not in seen:
            seen.add(storage_of(tensor))
            alive.append(tensor)
            session.storages.append(expression(tensor.untyped_storage().nbytes()))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        yield
    alive.clear()  # the graph has the hook


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what multiplies, with the formulas of torch's `FlopCounterMode`, and carries out what is constant.

    An operation on numbers alone, or on tensors that the code has made of numbers, is carried out, so that a cache of
    its result has true values after the trace. Tensors from outside of the trace are read, but not written to.
    """

    def __init__(self, session: Session, fake: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.session, self.fake = session, fake
        self._constants: dict[int, list[Tensor]] = {}
        """By the address of their storage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        real = not any(isinstance(leaf, FakeTensor | torch.SymInt) for leaf in pytree.tree_leaves((args, kwargs)))
        written = [t for t in written_by(func, args, kwargs) if not isinstance(t, FakeTensor)]
        if real and all(storage_of(t) in self._constants for t in written):
            return self._carry_out(func, args, kwargs)
        if written:
            for tensor in written:  # a constant no longer
                self.session.tensors.note(self._constants.pop(storage_of(tensor), ()))
            args, kwargs = pytree.tree_map(self._faked, (args, kwargs))
        output = _apply(func, args, kwargs)
        self.session.tensors.record(func, args, kwargs, output)
        packet = func._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=output)
            self.session.work.append(Work(self.session.module, packet.__name__, expression(flops) / 2))
        if _is_strided(func, args):
            self.session.strided.append((self.session.module, packet.__name__))
        return output

    def _carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            output = func(*args, **kwargs)
        outside = {storage_of(t) for t in tensors_in((args, kwargs))} - self._constants.keys()
        for tensor in tensors_in(output):
            if storage_of(tensor) not in outside:  # which a view has
                self._constants.setdefault(storage_of(tensor), []).append(tensor)
        return output

    def _faked(self, leaf: Any) -> Any:
        return self.fake.from_tensor(leaf, static_shapes=True) if isinstance(leaf, Tensor) else leaf


def _apply(func: Any, args: Any, kwargs: Any) -> Any:
    pad = torch.ops.aten.constant_pad_nd.default
    if func is pad and any(isinstance(n, torch.SymInt) for n in (*args[0].shape, *args[1])):
        # torch 2.13 makes numbers of symbols here, but in the decomposition, which this import registers.
        from torch import _refs  # noqa: F401
        from torch._decomp import decomposition_table

        return decomposition_table[func](*args, **kwargs)
    return func(*args, **kwargs)


def _is_strided(func: Any, args: Any) -> bool:
    """Whether an operation leaves out samples."""
    aten = torch.ops.aten
    if func is aten.convolution.default:
        return not args[6] and any(s > 1 for s in args[3])
    if func is aten.slice.Tensor:
        return len(args) > 4 and args[4] > 1
    return func._overloadpacket in (
        aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.avg_pool2d, aten.avg_pool3d,
    ) and any(s > 1 for s in (args[2] if len(args) > 2 and args[2] else args[1]))  # fmt: skip


class _Functions(TorchFunctionMode):
    """Knows the function of torch that is running."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", None) or resolve_name(func) or str(func)
        if func in (torch.max_pool1d, F.max_pool1d) and not (kwargs or {}).get("return_indices"):
            func = _max_pool1d
        if self.session.function is not None:
            return func(*args, **(kwargs or {}))
        self.session.function = name
        output = func(*args, **(kwargs or {}))
        self.session.function = None  # not after a failure: it happened in there
        if func is torch.rand and output.ndim == 0:
            # A random number alone decides whether a layer is dropped; the value with which none is.
            return torch.tensor(1.0)
        return output


def _max_pool1d(x: Tensor, kernel_size: Any, stride: Any = (), *options: Any, **named: Any) -> Tensor:
    """`torch.max_pool1d`, which makes numbers of symbols, by its twin for images."""
    padding, dilation, ceil_mode = [
        named.get(name, options[i] if i < len(options) else default)
        for i, (name, default) in enumerate((("padding", 0), ("dilation", 1), ("ceil_mode", False)))
    ]
    (kernel,), (step,), (pad,), (gap,) = (
        (n,) if isinstance(n, int) else tuple(n) for n in (kernel_size, stride or kernel_size, padding, dilation)
    )
    y = torch.max_pool2d(x.unsqueeze(-2), (1, kernel), (1, step), (0, pad), (1, gap), bool(ceil_mode))
    return y.squeeze(-2)


def _explanation(error: Exception, session: Session, model: nn.Module) -> str:
    """One line: where, and what."""
    from torch._subclasses import fake_tensor

    where = described(model, session.module)
    if isinstance(error, (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)):
        return (
            f"model must not decide by the values of tensors, {where} does (at {error.func}): sizes cannot be followed "
            "through such code"
        )
    if isinstance(error, fake_tensor.UnsupportedOperatorException):
        return f"model must use operators that torch knows the shapes of, {where} uses {error.func}"
    text = " ".join(str(error).split("Exception raised from")[0].split())
    return f"model must run on the example inputs, {where} raised {type(error).__name__}: {text}"


def described(model: nn.Module, name: str) -> str:
    """A module by its name and class."""
    kind = type(model.get_submodule(name)).__name__
    return f"{name} ({kind})" if name else f"the model itself ({kind})"


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
