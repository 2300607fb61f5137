"""Run a model once with symbols in place of sizes.

The model runs on fake tensors (shapes without values, in torch's `FakeTensorMode`), so a run takes little compute and
memory. A size that something else decides (a learnable stride, say) is a symbol; every other size is an expression in
symbols. Where the code compares sizes, the symbols' present values decide, and the comparison is noted.
"""

from __future__ import annotations

import itertools
import logging
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diffstride._logging import log_level
from diffstride.errors import UsageError
from diffstride.tracing import _torch
from diffstride.tracing._torch import storage_of
from diffstride.tracing._twins import tensors_in, written_by
from diffstride.tracing.inputs import ExampleInputs
from diffstride.tracing.restore import preserved
from diffstride.tracing.session import Call, Session, TraceError, Work, described, expression, shape

Forward = Callable[..., Any]
Forwards = Callable[[Session, str, nn.Module], Forward | None]

# Loggers with which torch repeats the exceptions of a trace.
_REPEATING = ("torch._subclasses.fake_tensor", "torch.fx.experimental.sym_node", "torch.__trace")
_ONE_AT_A_TIME = threading.RLock()  # patches and hooks of torch concern all threads


def run(
    model: nn.Module,
    example: ExampleInputs,
    forwards: Forwards,
    *,
    training: bool = False,
    symbolic_inputs: bool = False,
) -> Session:
    """Run the model once with symbols for sizes. The model is left as found.

    Args:
        model: any module.
        example: the arguments of its call.
        forwards: returns the forward that replaces a module's own, which may ask the session for sizes; or None.
        training: run in training mode and note the storages saved for backward; False: evaluation without gradients.
        symbolic_inputs: use symbols for the sizes of the inputs, too, except batch and channels.

    Raises:
        TraceError: the model raises, decides by values (fake tensors have none), or uses an operator without a fake.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(f"model must be Python code, got a scripted module: {name or 'the model itself'}")
    session = Session({module: name for name, module in model.named_modules()})
    with _ONE_AT_A_TIME, _torch.watched_sizes(session):
        try:
            _run(session, model, example, forwards, training, symbolic_inputs)
        finally:
            session.end()
    return session


def _run(
    session: Session,
    model: nn.Module,
    example: ExampleInputs,
    forwards: Forwards,
    training: bool,
    symbolic_inputs: bool,
) -> None:
    fake = _torch.FakeTensorMode(shape_env=session.environment, allow_non_fake_inputs=True)
    fake.cache_enabled = False  # no operation is done twice with the same symbols
    with preserved(model), ExitStack() as stack:
        stack.enter_context(log_level(_REPEATING, logging.CRITICAL + 1))
        stack.enter_context(_torch.short_quotients(session))
        stack.enter_context(_torch.python_dispatcher())  # decompositions take symbols, kernels do not
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
            output = inputs.call(model)
            session.outputs = [tuple(map(expression, tensor.shape)) for tensor in tensors_in(output)]
            del output
        except Exception as error:
            del inputs
            raise TraceError(_explanation(error, session, model), session) from _without_frames(error)


def _without_frames(error: Exception) -> Exception:
    """Turn the traceback of an error into text, because its frames keep tensors."""
    error.add_note("".join(traceback.format_tb(error.__traceback__)).rstrip())
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__, cause = None, cause.__context__
    return error


def _make_fake(model: nn.Module, fake: Any) -> Iterable[Tensor]:
    """Replace parameters, buffers, and tensors that are plain attributes by fake ones; return these."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    if id(tensor) not in made:
                        made[id(tensor)] = _fake_tensor(tensor, fake)
                    tensors[name] = made[id(tensor)]
    return made.values()


# Integer tensors with at most so many entries are constants.
_FEW = 16


def _fake_tensor(tensor: Tensor, fake: Any) -> Tensor:
    if nn.parameter.is_lazy(tensor):
        raise UsageError("model must have been run once: it has a lazy module without shapes")
    given = torch.Tensor.detach(tensor)
    if not tensor.is_floating_point() and tensor.numel() <= _FEW and not tensor.is_meta:
        # Integers in buffers, such as a padding, are constants of the model, and its code may read them.
        converter = fake.fake_tensor_converter
        constant: Tensor = converter.from_real_tensor(fake, given.clone(), make_constant=True)
        return constant
    made: Tensor = fake.from_tensor(given, static_shapes=True)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _fake_inputs(example: ExampleInputs, fake: Any, session: Session | None) -> ExampleInputs:
    numbers = itertools.count()

    def convert(value: Tensor) -> Tensor:
        if session is None or not value.is_floating_point() or value.ndim < 2:
            return fake.from_tensor(value.detach(), static_shapes=True)  # type: ignore[no-any-return]
        fixed, number = min(2, value.ndim - 1), next(numbers)
        sizes = [session.size(("input", number, i), n) for i, n in enumerate(value.shape[fixed:])]
        return torch.empty([*value.shape[:fixed], *sizes], dtype=value.dtype, device=value.device)

    args, kwargs = pytree.tree_map_only(Tensor, convert, (example.args, example.kwargs))
    return ExampleInputs(*args, **kwargs)


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
    """Note the bytes of every storage that is saved for backward, once, except those of parameters."""
    seen = set(map(storage_of, model.parameters()))
    alive = []  # else an address could be reused

    def pack(tensor: Tensor) -> None:  # nothing is kept: there is no backward pass
        if storage_of(tensor) not in seen:
            seen.add(storage_of(tensor))
            alive.append(tensor)
            session.storages.append(expression(tensor.untyped_storage().nbytes()))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        yield
    alive.clear()  # the graph has the hook


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts multiplications, with the formulas of torch's `FlopCounterMode`, and computes constants.

    An operation on numbers alone, or on tensors that the code has made of numbers, is carried out with values, so that
    the code can decide by them and keep them. Tensors from outside of the trace are read, but not written to.
    """

    def __init__(self, session: Session, fake: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.session, self.fake = session, fake
        self._constants: dict[int, list[Tensor]] = {}
        """Tensors by the address of their storage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        real = not any(
            isinstance(leaf, _torch.FakeTensor | torch.SymInt) for leaf in pytree.tree_leaves((args, kwargs))
        )
        written = [t for t in written_by(func, args, kwargs) if not isinstance(t, _torch.FakeTensor)]
        if real and all(storage_of(t) in self._constants for t in written):
            return self._carry_out(func, args, kwargs)
        if written:
            for tensor in written:  # a constant no longer
                self.session.tensors.note(self._constants.pop(storage_of(tensor), ()))
            faked = partial(self.fake.from_tensor, static_shapes=True)
            args, kwargs = pytree.tree_map_only(Tensor, faked, (args, kwargs))
        output = _torch.apply(func, args, kwargs)
        self.session.tensors.record(func, args, kwargs, output)
        packet = func._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=output)
            self.session.work.append(Work(self.session.module, expression(flops) / 2))
        if _is_strided(func, args):
            self.session.strided.append((self.session.module, packet.__name__))
        return output

    def _carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        with _torch.unset_fake_temporarily():
            output = func(*args, **kwargs)
        outside = {storage_of(t) for t in tensors_in((args, kwargs))} - self._constants.keys()
        for tensor in tensors_in(output):
            if storage_of(tensor) not in outside:  # it is no view of one from outside
                self._constants.setdefault(storage_of(tensor), []).append(tensor)
        return output


def _is_strided(func: Any, args: Any) -> bool:
    """Return whether an operation leaves out samples."""
    aten = torch.ops.aten
    if func is aten.convolution.default:
        return not args[6] and any(s > 1 for s in args[3])
    if func is aten.slice.Tensor:
        return len(args) > 4 and args[4] > 1
    return func._overloadpacket in (
        aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.avg_pool2d, aten.avg_pool3d,
    ) and any(s > 1 for s in (args[2] if len(args) > 2 and args[2] else args[1]))  # fmt: skip


class _Functions(TorchFunctionMode):
    """Notes the function of torch that is running, and changes two functions that a trace could not follow."""

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
        self.session.function = None  # not after a failure, which happened inside of it
        if func is torch.rand and output.ndim == 0:
            return torch.tensor(1.0)  # a single random number decides whether a layer is dropped: it is not
        return output


def _max_pool1d(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Pool by `torch.max_pool2d`, because `torch.max_pool1d` makes numbers of symbols."""
    (kernel,), (step,), (pad,), (gap,) = (
        (n,) if isinstance(n, int) else n for n in (kernel_size, stride or kernel_size, padding, dilation)
    )
    return torch.max_pool2d(x.unsqueeze(-2), (1, kernel), (1, step), (0, pad), (1, gap), ceil_mode).squeeze(-2)


def _explanation(error: Exception, session: Session, model: nn.Module) -> str:
    """Return one line that names the module and the error."""
    where = described(model, session.module)
    if isinstance(error, (_torch.DataDependentOutputException, _torch.DynamicOutputShapeException)):
        return (
            f"model must not decide by the values of tensors, {where} does (at {error.func}): sizes cannot be followed "
            "through such code"
        )
    if isinstance(error, _torch.UnsupportedOperatorException):
        return f"model must use operators that torch knows the shapes of, {where} uses {error.func}"
    text = " ".join(str(error).split("Exception raised from")[0].split())
    return f"model must run on the example inputs, {where} raised {type(error).__name__}: {text}"
