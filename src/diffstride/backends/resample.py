"""One autograd Function that resamples all axes, by matrices or by FFTs.

The operator of an axis takes `n` samples to `size`: `irfft((w * rfft(x))[:K], n=size)` in `norm="forward"` for the
dft, the DCT-II and its inverse for the dct, with `w` the `K` weights of the kept coefficients. Nothing is validated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffstride.backends.fft import SpectralOperator
from diffstride.backends.matmul import DenseOperator, multiplicity, product
from diffstride.geometry import Axis, clamp_stride

Backend = Literal["auto", "fft", "matmul"]
BACKENDS = ("auto", "fft", "matmul")
Operator = SpectralOperator | DenseOperator

# Up to this length a dense product is taken, above it an FFT; `diffstride bench --calibrate` measures it anew.
DENSE_UP_TO = {torch.float64: 128, torch.float32: 128, torch.bfloat16: 512, torch.float16: 512}


class Step(NamedTuple):
    """The operator of one axis, and where it is applied."""

    dim: int
    """The dimension in memory, counted from the end."""
    axis: Axis
    entry: int
    """The index of the axis in the vector of strides."""
    raw_stride: float | None
    """The raw stride; None where the host does not have it."""
    dense: bool


def is_dense(axis: Axis, backend: Backend, dtype: torch.dtype) -> bool:
    """Return whether the axis is a matrix product; `"auto"` chooses by its length and the dtype."""
    if backend == "auto" and axis.taps is None:
        return max(axis.n, axis.size) <= DENSE_UP_TO.get(dtype, 128)
    return backend == "matmul" or axis.taps is not None


# Asked here, since the compiler of PyTorch before 2.13 cannot look inside.
AUTOCAST_DEVICES = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu", "hpu", "xla")))


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which products have the dtypes of their factors."""
    if x.device.type in AUTOCAST_DEVICES:
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def resample(x: Tensor, strides: Tensor | None, steps: Sequence[Step], would_cast: bool) -> Tensor:
    """Apply the operators one after another.

    Where the host has the strides' values (`Step.raw_stride`), operators are built from numbers, cached, and
    differentiated by hand. Else (under `torch.compile`, or to leave a device alone) they are built from the tensor.

    Args:
        x: contiguous.
        strides: raw strides; None where all operators are fixed.
        steps: the operators.
        would_cast: True where an autocast that the caller has switched off would change dtypes.
    """
    on_host = strides is None or all(step.raw_stride is not None for step in steps)
    if not on_host or torch.compiler.is_compiling():
        operators = _operators(steps, strides, x)
        return _apply_guarded(x, operators) if would_cast and torch.compiler.is_compiling() else _apply(x, operators)
    learning = strides is not None and strides.requires_grad and torch.is_grad_enabled()
    y: Tensor = _Resample.apply(x, strides, tuple(steps), learning)[0]  # type: ignore[no-untyped-call]
    return y


def _apply(x: Tensor, operators: Iterable[tuple[int, Operator]]) -> Tensor:
    for dim, operator in operators:
        x = operator.apply(x, dim)
    return x.contiguous()  # an inverse FFT leaves its result in the order in which it worked


def _apply_guarded(x: Tensor, operators: Iterable[tuple[int, Operator]]) -> Tensor:
    """Apply the operators in a graph under autocast.

    Their backward is traced with them, and would be cast where that of eager mode is not. FFTs are never cast.
    """
    for dim, operator in operators:
        x = (
            _Product.apply(operator.matrix, x, dim)  # type: ignore[no-untyped-call]
            if isinstance(operator, DenseOperator)
            else operator.apply(x, dim)
        )
    return x.contiguous()


class _Product(torch.autograd.Function):
    """A `product` whose backward keeps the dtypes of its factors. Slower than PyTorch's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
        return product(matrix, x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        matrix, x, ctx.dim = inputs
        ctx.save_for_backward(matrix, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        matrix, x = ctx.saved_tensors
        (grad,) = grads
        of_matrix = of_x = None
        with no_autocast(grad):
            if ctx.needs_input_grad[0]:
                rows, columns = (t.movedim(ctx.dim, -1).flatten(0, -2) for t in (grad, x))
                of_matrix = rows.mT @ columns
            if ctx.needs_input_grad[1]:
                of_x = product(matrix.mT, grad, ctx.dim)
        return of_matrix, of_x, None


def _like(device: torch.device) -> Tensor:
    """Return an empty tensor of the precision in which windows and matrices are built on a device."""
    return torch.empty((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _operators(
    steps: Sequence[Step], strides: Tensor | None, x: Tensor, ramps: bool = False
) -> list[tuple[int, Operator]]:
    """Build operators from tensors, differentiable in `strides`."""
    like = _like(x.device)
    built = []
    for dim, axis, entry, raw, dense in steps:
        if strides is None:
            operator = _operator(axis, axis.weights(None, like), dense, x.dtype)
        else:
            stride = clamp_stride(strides[entry].to(like), axis.lower, axis.upper)
            ramp = _ramp_slopes(axis, raw, stride, like) if ramps else ()
            operator = _operator(axis, axis.weights(stride, like), dense, x.dtype, *ramp)
        built.append((dim, operator))
    return built


def _ramp_slopes(axis: Axis, raw: float | None, stride: Tensor | float, like: Tensor) -> tuple[int, Tensor]:
    """Return the first coefficient on the ramp, and `d/dS` of the factors of the ramp's pairs of waves."""
    assert raw is not None
    first, last = axis.ramp(axis.clamp(raw))
    return first, axis.slopes(stride, like, first, last) * multiplicity(axis, like)[first:last]


def _operator(axis: Axis, weights: Tensor, dense: bool, dtype: torch.dtype, *ramp: Any) -> Operator:
    return DenseOperator(axis, weights, dtype, *ramp) if dense else SpectralOperator(axis, weights, *ramp)


def _build(axis: Axis, raw: float | None, dense: bool, dtype: torch.dtype, device: torch.device) -> Operator:
    """Build an operator from numbers."""
    # A GPU would be handed some hundred small kernels; the host has a small matrix sooner, and sends it in one copy.
    on_host = dense and device.type == "cuda" and axis.n * axis.size * axis.kept <= _ON_HOST_UP_TO
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used in training
        like = _like(torch.device("cpu") if on_host else device)
        if raw is None:
            operator = _operator(axis, axis.weights(None, like), dense, dtype)
        else:
            stride = axis.clamp(raw)
            operator = _operator(axis, axis.weights(stride, like), dense, dtype, *_ramp_slopes(axis, raw, stride, like))
        if on_host:
            assert isinstance(operator, DenseOperator)
            operator.send(device)
        return operator


# Building a matrix of so many multiplications is no more work than launching its kernels.
_ON_HOST_UP_TO = 1 << 20
_cached_operator = lru_cache(maxsize=128)(_build)
# A larger matrix is built at every call.
_CACHE_UP_TO_ELEMENTS = 512 * 512


def _host_operators(steps: Sequence[Step], x: Tensor) -> list[tuple[int, Operator]]:
    """Build operators from the strides on the host, or take those of an earlier call."""
    # Operators of fake tensors are not kept.
    plain = type(x) in (Tensor, torch.nn.Parameter)
    return [
        (
            s.dim,
            (_cached_operator if plain and s.axis.n * s.axis.size <= _CACHE_UP_TO_ELEMENTS else _build)(
                s.axis, s.raw_stride, s.dense, x.dtype, x.device
            ),
        )
        for s in steps
    ]


class _Resample(torch.autograd.Function):
    """The operators of all axes, as `(y, coefficients of x on the ramp of each axis)`.

    `dm/dS` is non-zero only on the ramp, where each coefficient is one pair of waves. So the gradient of a stride is
    the inner product of a few coefficients of the input with those of the upstream gradient, and no gradient of a
    matrix is made. The input is saved and, where they are few, these coefficients; else they are computed again.
    """

    @staticmethod
    def forward(x: Tensor, strides: Tensor | None, steps: tuple[Step, ...], learning: bool) -> tuple[Tensor, ...]:
        operators = _host_operators(steps, x)
        if learning and keeps_ramps((op.ramp_size, op.length, op.size) for _, op in operators):
            y, ramps = _apply_and_split(x, operators)
        else:
            y, ramps = _apply(x, operators), []
        # Autograd forbids writing in place to a view made in here, as an activation after the layer may.
        return torch.ops.aten._unsafe_view(y, y.shape), *ramps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, strides, ctx.steps, ctx.learning = inputs
        ctx.save_for_backward(*((x, strides) if ctx.learning else (None, None)), *output[1:])
        ctx.save_for_forward(x, strides)
        ctx.mark_non_differentiable(*output[1:])
        ctx.more_outputs = len(output) - 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        with no_autocast(grads[0]):  # backward may be called in its reach
            return _backward(ctx, grads[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, strides_tangent: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, strides = ctx.saved_tensors
        operators = _operators(ctx.steps, strides, x)
        terms = [] if tangent is None else [_apply(tangent, operators)]
        if strides_tangent is not None:
            like = _like(x.device)
            for i, (dim, axis, entry, raw, dense) in enumerate(ctx.steps):
                if not axis.lower <= raw <= axis.upper:
                    continue  # forward mode does not know where descent will go: outside nothing moves
                first, last = axis.ramp(axis.clamp(raw))
                slopes = axis.slopes(strides[entry].to(like), like, first, last)
                moved = torch.nn.functional.pad(slopes, (first, axis.kept - last))
                changed = [*operators[:i], (dim, _operator(axis, moved, dense, x.dtype)), *operators[i + 1 :]]
                terms.append(_apply(x, changed) * strides_tangent[entry].to(x))
        return torch.stack(terms).sum(0), *[None] * ctx.more_outputs

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, strides: Tensor | None, *constants: Any
    ) -> tuple[tuple[Tensor, ...], int]:
        if in_dims[1] is not None:
            raise NotImplementedError("strides must be the same for the whole batch under vmap: sizes are host numbers")
        assert in_dims[0] is not None
        return _Resample.apply(x.movedim(in_dims[0], 0), strides, *constants), 0  # type: ignore[no-untyped-call]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, strides, *saved_ramps = ctx.saved_tensors
    if torch.is_grad_enabled() and ctx.learning:
        # For second derivatives the operators are built again, from the strides' tensor.
        operators = _operators(ctx.steps, strides, x, ramps=True)
        saved_ramps = []
    else:
        operators = _host_operators(ctx.steps, grad)
    stride_grads = [grad.new_zeros((), dtype=torch.promote_types(grad.dtype, torch.float32))] * len(ctx.steps)
    grad_x = grad
    for i, (dim, operator) in enumerate(operators):
        if ctx.learning and saved_ramps:
            stride_grads[i] = _inner_product(saved_ramps[i], operator.adjoint_on_ramp(grad, dim))
        elif ctx.learning:  # axes before this one as in the input, axes after it as in the output
            of_x = _apply(operator.on_ramp(x, dim), operators[i + 1 :])
            stride_grads[i] = _inner_product(of_x, operator.adjoint_on_ramp(grad_x, dim))
        if ctx.needs_input_grad[0] or i + 1 < len(operators):
            grad_x = operator.adjoint(grad_x, dim)
    if not ctx.learning:
        return grad_x, None, None, None
    entries = [torch.zeros_like(stride_grads[0])] * len(strides)
    for gradient, step in zip(stride_grads, ctx.steps, strict=True):
        entries[step.entry] = _pointing_inwards(gradient, step)
    grad_strides = torch.stack(entries).to(strides)
    return (grad_x if ctx.needs_input_grad[0] else None), grad_strides, None, None


# Where the coefficients on the ramps are more than this share of the input, they are not saved.
KEEP_RAMPS_UP_TO = 0.25


def keeps_ramps(axes: Iterable[tuple[int, int, int]]) -> bool:
    """Return whether the coefficients on the ramps are saved for backward.

    Args:
        axes: for each axis the number of coefficients on its ramp, and the samples of its input and of its output.
    """
    shrink, share = 1.0, 0.0
    for ramp_size, length, size in axes:
        shrink *= size / length
        share += ramp_size / size
    return shrink * share <= KEEP_RAMPS_UP_TO


def _apply_and_split(x: Tensor, operators: Sequence[tuple[int, Operator]]) -> tuple[Tensor, list[Tensor]]:
    """Return the result, and for each axis the coefficients of `x` on its ramp, resampled along the other axes."""
    if len(operators) == 2 and operators[1][0] == -1 and all(isinstance(op, DenseOperator) for _, op in operators):
        return _split_plane(x, operators)  # type: ignore[arg-type]
    ramps: list[Tensor] = []
    for dim, operator in operators:
        ramps = [operator.apply(ramp, dim) for ramp in ramps]
        x, ramp = operator.apply_and_split(x, dim)
        ramps.append(ramp)
    return x.contiguous(), ramps


def _split_plane(x: Tensor, operators: Sequence[tuple[int, DenseOperator]]) -> tuple[Tensor, list[Tensor]]:
    """Apply and split two dense axes with one product for each; what lies on both ramps is dropped."""
    (rows, first), (columns, second) = operators
    stacked = second.stacked(first.stacked(x, rows), columns)
    left, right = torch.split(stacked, [second.size, second.ramp_size], columns)
    y, below = torch.split(left, [first.size, first.ramp_size], rows)
    return y.contiguous(), [below.contiguous(), right.narrow(rows, 0, first.size).contiguous()]


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.dot(a.reshape(-1).to(wide), b.reshape(-1).to(wide))


def _pointing_inwards(gradient: Tensor, step: Step) -> Tensor:
    """Pass only a gradient that points back inside where the stride is at a bound."""
    assert step.raw_stride is not None
    if step.raw_stride <= step.axis.lower:
        gradient = gradient.clamp(max=0)
    if step.raw_stride >= step.axis.upper:
        gradient = gradient.clamp(min=0)
    return gradient
