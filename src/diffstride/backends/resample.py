"""One autograd Function that resamples all axes, by matrices or by FFTs.

The operator of an axis takes `n` samples to `size`: `irfft((w * rfft(x))[:K], n=size)` in `norm="forward"` for the
dft, the DCT-II and its inverse for the dct, with `w` the `K` weights of the kept coefficients. Nothing is validated.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffstride.backends.fft import SpectralOperator
from diffstride.backends.matmul import (
    DenseOperator,
    dense_matrix,
    empty_like_operators,
    is_short,
    multiplicity,
)
from diffstride.geometry import Axis, clamp_stride

Backend = Literal["auto", "fft", "matmul"]
BACKENDS = ("auto", "fft", "matmul")
Operator = SpectralOperator | DenseOperator

# Up to this length a dense product is taken, above it an FFT; `diffstride bench --calibrate` measures it anew.
DENSE_UP_TO = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 512, torch.float16: 512}


class Step(NamedTuple):
    """The operator of one axis, and where it is applied."""

    dim: int
    """The dimension in memory, counted from the end."""
    axis: Axis
    entry: int
    """The index of the axis in the vector of strides."""
    dense: bool


class Operators(NamedTuple):
    """The operators of all axes at strides that the host has."""

    built: list[Operator]
    raw_strides: tuple[float | None, ...]
    """Raw strides in the order of the operators; None for a fixed one."""
    small: bool
    """True where they are for few elements, see `is_small`."""


def is_dense(axis: Axis, backend: Backend, dtype: torch.dtype) -> bool:
    """Return whether the axis is a matrix product; `"auto"` chooses by its length and the dtype."""
    if backend == "auto" and axis.taps is None:
        return max(axis.n, axis.size) <= DENSE_UP_TO.get(dtype, 256)
    return backend == "matmul" or axis.taps is not None


# Asked here, since the compiler of PyTorch before 2.13 cannot look inside.
AUTOCAST_DEVICES = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu", "hpu", "xla")))


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which products have the dtypes of their factors."""
    device = x.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


_NOTHING = contextlib.nullcontext()


def resample(x: Tensor, strides: Tensor | None, steps: tuple[Step, ...], operators: Operators | None) -> Tensor:
    """Apply the operators one after another.

    Args:
        x: contiguous.
        strides: raw strides, one per axis or one in all; None where all operators are fixed.
        steps: the axes.
        operators: the operators at these strides, which are differentiated by hand. None builds them from the tensor
            of strides and leaves derivatives to autograd, where the host does not have the strides' values.
    """
    if operators is None:
        return _apply(x, steps, _operators_from(steps, strides, x))
    # A signature that `torch.func` can transform takes longer to call than a small layer to compute.
    function = _TransformableResample if torch._C._are_functorch_transforms_active() else _Resample
    learning = strides is not None and strides.requires_grad and torch.is_grad_enabled()
    y: Tensor = function.apply(x, strides, steps, operators, learning)  # type: ignore[no-untyped-call]
    return y


def _apply(x: Tensor, steps: Sequence[Step], operators: Sequence[Operator]) -> Tensor:
    for step, operator in zip(steps, operators, strict=True):
        x = operator.apply(x, step.dim)
    return x.contiguous()  # an inverse FFT leaves its result in the order in which it worked


def build_operators(
    steps: Sequence[Step],
    host_strides: Sequence[float] | None,
    dtype: torch.dtype,
    device: torch.device,
    small: bool,
    keep: bool,
) -> Operators:
    """Build operators from the strides on the host, or take those of an earlier call if `keep`."""
    raw_strides = tuple([None if host_strides is None else host_strides[step.entry] for step in steps])
    built = []
    for i, ((_, axis, _, dense), raw) in enumerate(zip(steps, raw_strides, strict=True)):
        build = _cached_operator if keep and axis.n * axis.size <= _CACHE_UP_TO_ELEMENTS else _build
        built.append(build(axis, None if raw is None else axis.clamp(raw), dense, dtype, device, i == 0, small, keep))
    return Operators(built, raw_strides, small)


def _build(
    axis: Axis,
    stride: float | None,
    dense: bool,
    dtype: torch.dtype,
    device: torch.device,
    first: bool,
    small: bool,
    keep: bool,
) -> Operator:
    if torch.is_inference_mode_enabled():  # its tensors could not be used in training
        with torch.inference_mode(False):
            return _build(axis, stride, dense, dtype, device, first, small, keep)
    operator: Operator
    if dense:
        operator = DenseOperator.from_stride(
            axis, stride, dtype, device, derivative_first=first, small=small, keep=keep
        )
    else:
        like = empty_like_operators(device)
        ramp = () if stride is None else _ramp_slopes(axis, stride, stride, like)
        operator = SpectralOperator(axis, axis.weights(stride, like), *ramp)
    operator.identity = axis.gain if axis.is_identity(stride) else None
    return operator


_cached_operator = lru_cache(maxsize=128)(_build)
# A larger matrix is built at every call.
_CACHE_UP_TO_ELEMENTS = 512 * 512


def _operators_from(
    steps: Sequence[Step], strides: Tensor | None, x: Tensor, ramps_at: Sequence[float | None] | None = None
) -> list[Operator]:
    """Build operators from tensors, differentiable in `strides`; with the ramps at raw strides if these are given."""
    like = empty_like_operators(x.device)
    built: list[Operator] = []
    for i, (_, axis, entry, dense) in enumerate(steps):
        if strides is None:
            built.append(_operator(axis, axis.weights(None, like), dense, x.dtype))
        else:
            stride = clamp_stride(strides[entry % len(strides)].to(like), axis.lower, axis.upper)
            raw = None if ramps_at is None else ramps_at[i]
            ramp = () if raw is None else _ramp_slopes(axis, axis.clamp(raw), stride, like)
            built.append(_operator(axis, axis.weights(stride, like), dense, x.dtype, *ramp))
    return built


def _ramp_slopes(axis: Axis, clamped: float, stride: Tensor | float, like: Tensor) -> tuple[Any, ...]:
    """Return the first coefficient on the ramp, and `d/dS` of the factors of the ramp's pairs of waves."""
    first, last = axis.ramp(clamped)
    return first, axis.slopes(stride, like, first, last) * multiplicity(axis, like)[first:last]


def _operator(axis: Axis, weights: Tensor, dense: bool, dtype: torch.dtype, *ramp: Any) -> Operator:
    if dense:
        return DenseOperator(axis, dense_matrix(axis, weights).to(dtype).t(), *ramp)
    return SpectralOperator(axis, weights, *ramp)


class _Resample(torch.autograd.Function):
    """The operators of all axes.

    `dm/dS` is non-zero only on the ramp, where each coefficient is one pair of waves. So the gradient of a stride is
    the inner product of a few coefficients of the input with those of the upstream gradient, and no gradient of a
    matrix is made. The input is saved and, where they are few, these coefficients; else they are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, strides: Tensor | None, steps: tuple[Step, ...], operators: Operators, learning: bool
    ) -> Tensor:
        built = operators.built
        sizes = [operator.ramp_size for operator in built] if learning else []
        if learning and keeps_ramps([step.axis for step in steps], sizes, operators.small):
            y, ramps = _apply_and_split(x, steps, built)
        else:
            y, ramps = _apply(x, steps, built), []
        _save(ctx, x, strides, steps, operators, learning, ramps)
        return _new(y, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        with no_autocast(grads[0]):  # backward may be called in its reach
            x, strides, *ramps = ctx.saved_tensors
            needs = ctx.needs_input_grad
            return (
                *backward(grads[0], x, strides, ctx.steps, ctx.operators, needs[0], needs[1], ramps),
                None,
                None,
                None,
            )

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, strides_tangent: Tensor | None, *_: None) -> Tensor:
        x, strides = ctx.saved_tensors
        operators = _operators_from(ctx.steps, strides, x)
        terms = [] if tangent is None else [_apply(tangent, ctx.steps, operators)]
        if strides_tangent is not None:
            like = empty_like_operators(x.device)
            for i, (_, axis, entry, dense) in enumerate(ctx.steps):
                raw = ctx.operators.raw_strides[i]
                if not axis.lower <= raw <= axis.upper:
                    continue  # forward mode does not know where descent will go: outside nothing moves
                entry %= len(strides)
                first, last = axis.ramp(axis.clamp(raw))
                slopes = axis.slopes(strides[entry].to(like), like, first, last)
                moved = torch.nn.functional.pad(slopes, (first, axis.kept - last))
                changed = [*operators[:i], _operator(axis, moved, dense, x.dtype), *operators[i + 1 :]]
                terms.append(_apply(x, ctx.steps, changed) * strides_tangent[entry].to(x))
        return torch.stack(terms).sum(0)


class _TransformableResample(_Resample):
    """The same for the transforms of `torch.func`."""

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, strides: Tensor | None, steps: tuple[Step, ...], operators: Operators, learning: bool
    ) -> Tensor:
        return _new(_apply(x, steps, operators.built), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, strides, steps, operators, _ = inputs
        _save(ctx, x, strides, steps, operators, learning=strides is not None)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, strides: Tensor | None, *constants: Any
    ) -> tuple[Tensor, int]:
        if in_dims[1] is not None:
            raise NotImplementedError("strides must be the same for the whole batch under vmap: sizes are host numbers")
        assert in_dims[0] is not None
        y: Tensor = _TransformableResample.apply(x.movedim(in_dims[0], 0), strides, *constants)  # type: ignore[no-untyped-call]
        return y, 0


def _save(
    ctx: Any,
    x: Tensor,
    strides: Tensor | None,
    steps: tuple[Step, ...],
    operators: Operators,
    learning: bool,
    ramps: Sequence[Tensor] = (),
) -> None:
    ctx.steps, ctx.operators = steps, operators
    ctx.save_for_backward(*((x, strides, *ramps) if learning else (None, None)))
    ctx.save_for_forward(x, strides)


def _new(y: Tensor, x: Tensor) -> Tensor:
    """Return `y` as a tensor into which an activation after the layer may write."""
    if y is x:  # all operators are the identity
        return x.clone()
    # Autograd forbids writing in place to a view made in here.
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y


# Where the coefficients on the ramps are more than this share of the input, they are not saved.
_KEEP_RAMPS_UP_TO = 0.25


def keeps_ramps(axes: Sequence[Axis], ramp_sizes: Sequence[int], small: bool) -> bool:
    """Return whether the coefficients of the input on the ramps are saved for backward."""
    if small and all(map(is_short, axes)):
        return False
    shrink, share = 1.0, 0.0
    for axis, ramp_size in zip(axes, ramp_sizes, strict=True):
        shrink *= axis.rows / axis.columns
        share += ramp_size / axis.rows
    return shrink * share <= _KEEP_RAMPS_UP_TO


def _apply_and_split(x: Tensor, steps: Sequence[Step], operators: Sequence[Operator]) -> tuple[Tensor, list[Tensor]]:
    """Return the result, and for each axis the coefficients of `x` on its ramp, resampled along the other axes."""
    if len(steps) == 2 and steps[1].dim == -1 and all(isinstance(op, DenseOperator) for op in operators):
        return _split_plane(x, steps[0].dim, *operators)  # type: ignore[arg-type]
    ramps: list[Tensor] = []
    for step, operator in zip(steps, operators, strict=True):
        ramps = [operator.apply(ramp, step.dim) for ramp in ramps]
        x, ramp = operator.apply_and_split(x, step.dim)
        ramps.append(ramp)
    return x.contiguous(), ramps


def _split_plane(x: Tensor, rows: int, first: DenseOperator, second: DenseOperator) -> tuple[Tensor, list[Tensor]]:
    """Apply and split two dense axes with one product for each; what lies on both ramps is dropped."""
    both = second.with_ramp(first.with_ramp(x, rows), -1)
    height, width = first.axis.rows, second.axis.rows
    left, right = both[..., :width], both[..., width:]
    y, below = left.narrow(rows, 0, height), left.narrow(rows, height, first.ramp_size)
    return y.contiguous(), [below.contiguous(), right.narrow(rows, 0, height).contiguous()]


def backward(
    grad: Tensor,
    x: Tensor | None,
    strides: Tensor | None,
    steps: Sequence[Step],
    operators: Operators,
    needs_x: bool,
    needs_strides: bool,
    ramps: Sequence[Tensor] = (),
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the input and of the strides, as far as they are needed; only the latter takes `x`."""
    built, raw_strides, _ = operators
    learning = needs_strides and strides is not None and x is not None
    if learning and torch.is_grad_enabled():  # for second derivatives the operators depend on the strides' tensor
        assert x is not None
        built, ramps = _operators_from(steps, strides, x, raw_strides), ()
    elif learning and len(steps) == 2 and steps[1].dim == -1 and all(map(_is_stacked, built)):
        assert x is not None
        assert strides is not None
        grad_x, stride_grad = _backward_of_plane(grad, x, built)
        return grad_x, _collected(stride_grad, steps, raw_strides, strides)
    stride_grads = []
    grad_x = grad
    for i, (step, operator) in enumerate(zip(steps, built, strict=True)):
        if learning and ramps:
            stride_grads.append(_inner_product(ramps[i], operator.adjoint_on_ramp(grad, step.dim)))
        elif learning:  # axes before this one as in the input, axes after it as in the output
            assert x is not None
            of_x = _apply(operator.on_ramp(x, step.dim), steps[i + 1 :], built[i + 1 :])
            adjoint, of_grad = operator.adjoint_and_split(grad_x, step.dim)
            stride_grads.append(_inner_product(of_x, of_grad))
            grad_x = adjoint
            continue
        if needs_x:
            grad_x = operator.adjoint(grad_x, step.dim)
    found = None
    if learning:
        assert strides is not None
        found = _collected(torch.stack(stride_grads), steps, raw_strides, strides)
    return grad_x if needs_x else None, found


def _is_stacked(operator: Operator) -> bool:
    return isinstance(operator, DenseOperator) and operator.stacked is not None


def _backward_of_plane(grad: Tensor, x: Tensor, operators: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return both gradients of `y = P x Q^T` for planes `x`, in as few operations as there are.

    With the derivatives `P'` and `Q'` by the strides: `dL/dx = (P^T g) Q`, and the gradients of the strides are the
    inner products of `P'^T g` with `x Q^T` and of `P^T g` with `x Q'^T`. Either pair is one product.
    """
    rows, columns = operators
    height, width, size = *x.shape[-2:], grad.shape[-1]
    planes = grad.reshape(math.prod(grad.shape[:-2]), *grad.shape[-2:])
    pair = torch.bmm(rows.stacked.expand(planes.shape[0], -1, -1), planes)  # P'^T g and P^T g, row by row in turn
    # Axes of one sample may lie in memory in another order.
    pair = pair.reshape(planes.shape[0] * height, 2, size)
    grad_x = torch.mm(pair[:, 1], columns.matrix).view(x.shape)
    seen = x.reshape(pair.shape[0], width)
    other = torch.mm(seen, columns.stacked.reshape(width, 2 * size)).view(pair.shape)  # x Q^T and x Q'^T
    if x.dtype == torch.bfloat16:
        pair, other = pair.float(), other.float()
    return grad_x, (pair * other).sum((0, 2))


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return torch.dot(a.reshape(-1).to(wide), b.reshape(-1).to(wide))


def _collected(
    gradients: Tensor, steps: Sequence[Step], raw_strides: Sequence[float | None], strides: Tensor
) -> Tensor:
    """Return the gradient of the vector of strides from those of the operators."""
    for i, (step, raw) in enumerate(zip(steps, raw_strides, strict=True)):
        assert raw is not None
        # At a bound, only a gradient that points back inside passes.
        if raw <= step.axis.lower:
            gradients = _limited(gradients, i, max=0)
        if raw >= step.axis.upper:
            gradients = _limited(gradients, i, min=0)
    count = strides.shape[0]
    if count == 1 < len(steps):
        gradients = gradients.sum(0, keepdim=True)
    elif [step.entry for step in steps] != list(range(count)):
        entries = [torch.zeros_like(gradients[0])] * count
        for i, step in enumerate(steps):
            entries[step.entry % count] = gradients[i]
        gradients = torch.stack(entries)
    return gradients.to(strides)


def _limited(gradients: Tensor, index: int, **limits: float) -> Tensor:
    return torch.cat([gradients[:index], gradients[index : index + 1].clamp(**limits), gradients[index + 1 :]])
