"""Two ways to apply the operator of an axis, the choice between them, and one autograd Function for all axes.

No validation. The operator of an axis takes `n` samples to `size`: `irfft((w * rfft(x))[:K], n=size)` in
`norm="forward"` for the dft, the DCT-II and its inverse for the dct, with `w` the `K` weights of the kept coefficients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffstride.backends.fft import SpectralOperator
from diffstride.backends.matmul import DenseOperator, multiplicity
from diffstride.geometry import Axis, clamp_stride

Backend = Literal["auto", "fft", "matmul"]
BACKENDS = ("auto", "fft", "matmul")
Operator = SpectralOperator | DenseOperator

# On two CPU cores a dense product took 0.2-0.8 of the FFT's time up to this size with 4,096 rows, forward and backward
# in float32, and 0.9-1.3 with 256 rows; above it the building of the matrix outweighs it.
MATMUL_MAX_SIZE = 256


class Step(NamedTuple):
    """One axis operator: along which dimension (counted from the end, in memory), and at which raw stride if known."""

    dim: int
    axis: Axis
    stride: float | None
    dense: bool


def is_dense(axis: Axis, backend: Backend, empty: bool) -> bool:
    """Whether the axis is a matrix product; `"auto"` chooses by its length."""
    if backend == "auto":
        # FFT libraries refuse empty batches.
        return axis.taps is not None or empty or max(axis.n, axis.size) <= MATMUL_MAX_SIZE
    return backend == "matmul" or empty


def resample(x: Tensor, strides: Tensor | None, steps: Sequence[Step]) -> Tensor:
    """Apply the operators one after another. `strides` has one entry per step, None where all are fixed.

    With the strides' values at hand (`Step.stride`) operators are built from numbers, kept, and differentiated by
    hand; without (under `torch.compile`, or to leave a device alone) they are built from the tensor.
    """
    known = strides is None or all(step.stride is not None for step in steps)
    if not known or torch.compiler.is_compiling():
        return _apply(x, _operators(steps, strides, x))
    learning = strides is not None and strides.requires_grad and torch.is_grad_enabled()
    y: Tensor = _Resample.apply(x, strides, tuple(steps), learning)[0]  # type: ignore[no-untyped-call]
    return y


def _apply(x: Tensor, operators: Iterable[tuple[int, Operator]]) -> Tensor:
    for dim, operator in operators:
        x = operator.apply(x, dim)
    return x.contiguous()  # an inverse FFT leaves its result in the order in which it worked


def _like(x: Tensor) -> Tensor:
    """An empty tensor that says in which precision and where windows and matrices are built."""
    return x.new_empty((), dtype=torch.float32 if x.device.type == "mps" else torch.float64)


def _operators(
    steps: Sequence[Step], strides: Tensor | None, x: Tensor, ramps: bool = False
) -> list[tuple[int, Operator]]:
    """From tensors, differentiable in `strides`."""
    like = _like(x)
    built = []
    for i, (dim, axis, raw, dense) in enumerate(steps):
        if strides is None:
            operator = _operator(axis, axis.weights(None, like), dense, x.dtype)
        else:
            stride = clamp_stride(strides[i].to(like), axis.lower, axis.upper)
            ramp = _ramp(axis, raw, stride, like) if ramps else ()
            operator = _operator(axis, axis.weights(stride, like), dense, x.dtype, *ramp)
        built.append((dim, operator))
    return built


def _ramp(axis: Axis, raw: float | None, stride: Tensor | float, like: Tensor) -> tuple[int, Tensor]:
    """The first coefficient on the ramp, and `d/dS` of what the operator multiplies the ramp's pairs of waves with."""
    assert raw is not None
    first, last = axis.ramp(axis.clamp(raw))
    return first, axis.slopes(stride, like, first, last) * multiplicity(axis, like)[first:last]


def _operator(axis: Axis, weights: Tensor, dense: bool, dtype: torch.dtype, *ramp: Any) -> Operator:
    return DenseOperator(axis, weights, dtype, *ramp) if dense else SpectralOperator(axis, weights, *ramp)


def _build(axis: Axis, raw: float | None, dense: bool, dtype: torch.dtype, device: torch.device) -> Operator:
    """From numbers."""
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used in training
        like = _like(torch.empty((), dtype=dtype, device=device))
        if raw is None:
            return _operator(axis, axis.weights(None, like), dense, dtype)
        stride = axis.clamp(raw)
        return _operator(axis, axis.weights(stride, like), dense, dtype, *_ramp(axis, raw, stride, like))


_kept_operator = lru_cache(maxsize=128)(_build)
# A matrix larger than this is built when it is needed.
_KEPT_UP_TO = 512 * 512


def _known_operators(steps: Sequence[Step], x: Tensor) -> list[tuple[int, Operator]]:
    # Tensors that only stand for others (fake tensors, those of function transforms) are never kept.
    plain = type(x) in (Tensor, torch.nn.Parameter)
    return [
        (
            s.dim,
            (_kept_operator if plain and s.axis.n * s.axis.size <= _KEPT_UP_TO else _build)(
                s.axis, s.stride, s.dense, x.dtype, x.device
            ),
        )
        for s in steps
    ]


class _Resample(torch.autograd.Function):
    """The operators of all axes, as `(y, coefficients of x on the ramp of each axis)`.

    `dm/dS` is non-zero only on the ramp, where each coefficient is one pair of waves: the gradient of a stride is the
    inner product of a few coefficients of the input with those of the upstream gradient. No gradient of a matrix is
    made, and no intermediate is saved but these coefficients.
    """

    @staticmethod
    def forward(x: Tensor, strides: Tensor | None, steps: tuple[Step, ...], learning: bool) -> tuple[Tensor, ...]:
        operators = _known_operators(steps, x)
        if not learning:
            return (_apply(x, operators),)
        y, sides = _split(x, operators)
        return y, *sides

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, strides, ctx.steps, ctx.learning = inputs
        # The input is for second derivatives.
        ctx.save_for_backward(x if ctx.learning else None, strides, *output[1:])
        ctx.save_for_forward(x, strides)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad = grads[0]
        x, strides, *of_x = ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.learning:
            # For second derivatives: once more, in operators that depend on the strides' tensor.
            operators = _operators(ctx.steps, strides, x, ramps=True)
            _, of_x = _split(x, operators)
        else:
            operators = _known_operators(ctx.steps, grad)
        grad_x = grad_strides = None
        if ctx.needs_input_grad[0]:
            grad_x = grad
            for dim, operator in reversed(operators):
                grad_x = operator.adjoint(grad_x, dim)
        if of_x:
            slopes = [
                _pointing_inwards(_inner_product(side, operator.adjoint_on_ramp(grad, dim)), step)
                for side, (dim, operator), step in zip(of_x, operators, ctx.steps, strict=True)
            ]
            grad_strides = torch.stack(slopes).to(strides)
        return grad_x, grad_strides, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, strides_tangent: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, strides = ctx.saved_tensors
        operators = _operators(ctx.steps, strides, x)
        terms = [] if tangent is None else [_apply(tangent, operators)]
        if strides_tangent is not None:
            like = _like(x)
            for i, (dim, axis, raw, dense) in enumerate(ctx.steps):
                if not axis.lower <= raw <= axis.upper:
                    continue  # forward mode does not know where descent will go: outside nothing moves
                first, last = axis.ramp(axis.clamp(raw))
                slopes = axis.slopes(strides[i].to(like), like, first, last)
                moved = torch.nn.functional.pad(slopes, (first, axis.kept - last))
                changed = [*operators[:i], (dim, _operator(axis, moved, dense, x.dtype)), *operators[i + 1 :]]
                terms.append(_apply(x, changed) * strides_tangent[i].to(x))
        return torch.stack(terms).sum(0), *[None] * (len(ctx.steps) if ctx.learning else 0)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, strides: Tensor | None, *constants: Any
    ) -> tuple[tuple[Tensor, ...], int]:
        if in_dims[1] is not None:
            raise NotImplementedError("strides must be the same for the whole batch under vmap: sizes are host numbers")
        assert in_dims[0] is not None
        return _Resample.apply(x.movedim(in_dims[0], 0), strides, *constants), 0  # type: ignore[no-untyped-call]


def _split(x: Tensor, operators: Sequence[tuple[int, Operator]]) -> tuple[Tensor, list[Tensor]]:
    """The result, and for each axis the coefficients of `x` on its ramp, resampled along the other axes."""
    sides: list[Tensor] = []
    if len(operators) == 2 and all(isinstance(operator, DenseOperator) for _, operator in operators):
        return _split_plane(x, operators)  # type: ignore[arg-type]
    for dim, operator in operators:
        sides = [operator.apply(side, dim) for side in sides]
        x, side = operator.split(x, dim)
        sides.append(side)
    return x.contiguous(), sides


def _split_plane(x: Tensor, operators: Sequence[tuple[int, DenseOperator]]) -> tuple[Tensor, list[Tensor]]:
    """The same of two dense axes with one product for each; what lies on both ramps is thrown away."""
    (rows, first), (columns, second) = operators
    height, width = len(first.matrix), len(second.matrix)
    stacked = second.stacked(first.stacked(x, rows), columns)
    left, right = stacked.narrow(columns, 0, width), stacked.narrow(columns, width, stacked.shape[columns] - width)
    below = left.narrow(rows, height, stacked.shape[rows] - height)
    return left.narrow(rows, 0, height).contiguous(), [below.contiguous(), right.narrow(rows, 0, height).contiguous()]


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype in (torch.float32, torch.float64):
        return torch.dot(a.flatten(), b.flatten())
    return (a * b).sum(dtype=torch.float32)


def _pointing_inwards(slope: Tensor, step: Step) -> Tensor:
    """A descent step moves against the gradient: at a bound, only what points back inside passes."""
    assert step.stride is not None
    if step.stride <= step.axis.lower:
        slope = slope.clamp(max=0)
    if step.stride >= step.axis.upper:
        slope = slope.clamp(min=0)
    return slope
