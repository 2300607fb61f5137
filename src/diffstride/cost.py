"""What strides cost: Eq. 6 of the paper, multiply-accumulates and memory of the real model, and budgets of them."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffstride import _check
from diffstride.geometry import clamp_stride
from diffstride.nn.conv import DiffStrideConvNd
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.resize import ResizeTo
from diffstride.nn.spectral import SpectralPoolNd
from diffstride.nn.strides import learnable_layers
from diffstride.program import MEASURES, Gradient, Measure, Neighbour, OnHost, Program, Strides, in_use, of_strided_twin
from diffstride.trace import ExampleInputs, on_examples


def stride_cost(model: nn.Module) -> Tensor:
    """Eq. 6: `J = sum_l prod_{i <= l} prod_axes 1 / S_i` over the model's learnable downsamplings.

    In the order in which the layers are registered, a shared layer once. Computation and memory are proportional to it
    where the number of channels is constant. Differentiable in the strides (clamped to the users' bounds); weighed
    into a loss it pushes strides up.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: a model without learnable strides.
    """
    inverse_strides = [(1 / _in_bounds(layer)).prod() for _, layer in learnable_layers(model)]
    if not inverse_strides:
        raise ValueError(f"model must have learnable strides (DiffStride layers), got none in {type(model).__name__}")
    return torch.stack(inverse_strides).cumprod(0).sum()


def _in_bounds(layer: LearnableStrides) -> Tensor:
    lower, upper = layer.bounds
    return clamp_stride(layer.stride, lower, float("inf") if upper is None else upper).expand(layer.ndim)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Macs(NamedTuple):
    """Multiply-accumulates of one forward pass."""

    model: int
    """Convolutions and linear layers."""
    resampling: int
    """The dense products of the resampling itself (none where it runs as an FFT)."""


@torch.no_grad()
def count_macs(model: nn.Module, *inputs: Any) -> Macs:
    """Count the multiply-accumulates of `model(*inputs)` at the strides now in use, with torch's `FlopCounterMode`.

    The model runs in evaluation mode and is left in the mode it was in.

    Raises:
        UserError: inputs that the model does not run on.
    """
    convolutions = 0  # of layers that resample and convolve

    def count(layer: DiffStrideConvNd, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal convolutions
        (x,) = inputs
        batch = x.shape[0] if x.ndim == layer.ndim + 2 else 1
        convolutions += batch * layer.convolution_macs(x.shape[-layer.ndim :])

    with evaluation(model), on_examples(model):
        model(*inputs)  # builds the operators, whose own products are not those of a forward pass
        handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, DiffStrideConvNd)]
        try:
            with FlopCounterMode(display=False) as counter:
                model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
    total = counter.get_total_flops()
    by_module = counter.get_flop_counts()
    prefix = type(model).__name__
    in_layers = sum(
        sum(by_module.get(f"{prefix}.{name}" if name else prefix, {}).values())
        for name, module in model.named_modules()
        if isinstance(module, (LearnableStrides, SpectralPoolNd, ResizeTo))
    )
    resampling = in_layers // 2 - convolutions
    return Macs(total // 2 - resampling, resampling)


class CostModel:
    """What a model costs as a differentiable function of its strides.

    Made from one pass with symbols for the sizes that strides decide (`diffstride.trace`): every other size, through
    valid convolutions and paddings and whatever the model's code does, is an expression in these, and so is the cost.
    A call returns the relaxed cost, in which a size is `min(N, N/S + 2R)` (outer window) or `N/S` (inner) in place of
    the whole number that follows from it; `count` is exact at the sizes in use. Where sizes pass a fixed
    downsampling, the relaxed cost is linear between whole sizes, so that it lies between the exact costs there.

    Where a relaxed size is saturated (an outer window on a small map), its value is, but a gradient that would have
    the stride grow passes, so that a cost in a loss always has a direction to push.

    - `"macs"`: multiply-accumulates of convolutions, linear layers and attention for the inputs given, in evaluation
      mode, with the formulas of torch's `FlopCounterMode`. The resampling's own are not in it (`count_macs` has them).
    - `"memory"`: bytes of the storages saved for backward in training mode, each once, parameters excluded.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, measure: Measure = "macs") -> None:
        """Trace the model, which is left as found.

        Args:
            model: any module; without learnable strides its cost is a constant.
            example_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or
                `diffstride.trace.ExampleInputs(*args, **kwargs)` for both.
            measure: `"macs"` or `"memory"`.

        Raises:
            UserError: a model that cannot be traced (it looks at values, it raises).
            ValueError: an unknown measure.
        """
        _check.one_of("measure", measure, MEASURES)
        self.model, self.measure = model, measure
        self.example = ExampleInputs.of(example_inputs)
        self._program: Program | None = Program(model, self.example, measure)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_program": None}  # compiled functions are made anew

    def __call__(self) -> Tensor:
        """The relaxed cost, a 0-d tensor, differentiable in the strides; computed on the host."""
        strides = self._strides()
        if not strides:
            return torch.tensor(float(self.count()))
        cost: Tensor = OnHost.apply(*self.gradient(), *strides.values())  # type: ignore[no-untyped-call]
        return cost

    def gradient(self) -> Gradient:
        """The relaxed cost, and its gradient with respect to each stride parameter, in float64 on the host."""
        return self._settled().gradient(self._strides())

    def neighbours(self) -> list[Neighbour]:
        """What the exact cost would be with one size a sample smaller or larger."""
        return list(self._settled().neighbours())

    def _strides(self) -> dict[int, Tensor]:
        """The strides by `stride_id`."""
        return {layer.stride_id: layer.stride for _, layer in learnable_layers(self.model)}

    def count(self) -> int:
        """The exact cost at the sizes now in use."""
        return self._settled().count(in_use)

    def start(self) -> int:
        """The exact cost at the strides that the layers were constructed with."""
        return self._count(lambda layer: layer.initial_strides)

    def _count(self, strides: Strides) -> int:
        """The exact cost at these strides, by a trace of its own where the model's code takes another turn there."""
        program = self._settled()
        if not program.holds(strides):
            # A model may refuse maps so small (windows of attention): then as if it did not.
            with suppress(_check.UserError):
                program = Program(self.model, self.example, self.measure, strides)
        return program.count(strides)

    def original(self) -> int:
        """The cost of the model with strided layers in place of the learnable ones, at their initial strides.

        Of a model that `diffstride.convert` has converted, the cost that it had before. A strided layer is taken to
        give `ceil(N/S)` samples where what it was is not known.
        """
        return of_strided_twin(self.model, self.example, self.measure)

    def least(self) -> int:
        """The cost at the largest strides that bounds and maps allow (no map after a layer is empty)."""
        return self._count(self._settled().largest_strides())

    def most(self) -> int:
        """The cost at the smallest strides that bounds and maps allow."""
        return self._count(lambda layer: (1.0,) * layer.ndim if layer.learns_strides else in_use(layer))

    def budget(self, amount: float, of: Literal["original", "start", "absolute"] = "original") -> Budget:
        """A loss term that holds the cost at a budget.

        Args:
            amount: a fraction of the cost that `of` names, or the cost itself.
            of: `"original"` (see `original`), `"start"` (see `start`) or `"absolute"`.

        Raises:
            UserError: a budget out of reach, with the least and the most that strides can make of the cost.
            ValueError: an amount not above 0, an unknown `of`.
        """
        _check.one_of("of", of, ("original", "start", "absolute"))
        if not any(layer.learns_strides for _, layer in learnable_layers(self.model)):
            raise ValueError(
                f"model must have learnable strides to meet a budget, got none in {type(self.model).__name__}"
            )
        if not 0 < amount < math.inf:
            raise ValueError(f"amount must be > 0 and finite, got {amount}")
        whole = 1 if of == "absolute" else self.original() if of == "original" else self.start()
        target, least, most = amount * whole, self.least(), self.most()
        if not least <= target <= most:
            share = "" if of == "absolute" else f" of the {of} cost ({whole:.4g})"
            unit = "" if of == "absolute" else f", {least / whole:.3f} to {most / whole:.3f} of it"
            raise _check.UserError(
                f"amount must be between the least and the most that strides can reach, {least:.4g} to {most:.4g}"
                f"{unit}, got {amount:g}{share}"
            )
        return Budget(self, target)

    def _settled(self) -> Program:
        """The program, traced again where the model's code, or torch's, takes another turn at the sizes now in use."""
        if self._program is None or not self._program.holds(in_use):
            self._program = Program(self.model, self.example, self.measure)
        return self._program


class Budget(nn.Module):
    """A loss term that holds a model's cost at a budget, from both sides; `CostModel.budget` makes it.

    With the exact cost `C` and the target `T`, `miss = log(C/T)` says how far off it is (0 within `tolerance`). The
    gradient of the term with respect to the strides is `push g / |g|^2`, where `g` is the gradient of the logarithm of
    the relaxed cost: strides that move by `r` times their gradient lower the miss by `r push`. Two parts make the push:

    - `rate miss / r`, under which the miss shrinks by `rate` a step. Nearer than `near`, where whole sizes decide, it
      goes to one stride alone, the one whose next size comes nearest to the target.
    - a multiplier, as in a Lagrangian, which holds the strides against the rest of the loss once the miss is gone. Each
      call in training mode moves it by `rate^2 / 4 miss / r` (critically damped), within `limit`.

    `r` depends on the optimizer, its learning rate, momentum and clipping. It is estimated from how the strides move.

    A cost below the target is pushed up: compute that is allowed is used. The value of the term is `miss^2 / 2`. Its
    state is in buffers and so in checkpoints.
    """

    multiplier: Tensor
    response: Tensor
    last: Tensor

    def __init__(
        self,
        cost: CostModel,
        target: float,
        *,
        rate: float = 0.05,
        limit: float = 10.0,
        tolerance: float = 0.01,
        near: float = 0.15,
    ) -> None:
        """Made by `CostModel.budget`.

        Args:
            cost: of the model.
            target: the cost to reach, in multiply-accumulates or bytes.
            rate: the share of the miss that a step takes away.
            limit: of the multiplier's size.
            tolerance: the relative miss that counts as none.
            near: the miss below which single sizes are moved in turn: the last percents are a question of whole sizes.
        """
        super().__init__()
        for name, value in ("target", target), ("rate", rate), ("limit", limit):
            _check.above_zero(name, value)
        for name, value in ("tolerance", tolerance), ("near", near):
            _check.not_negative(name, value)
        self.cost, self.target = cost, target
        self.rate, self.limit, self.tolerance, self.near = rate, limit, tolerance, near
        entries = sum(g.numel() for g in cost.gradient().grads)
        self.register_buffer("multiplier", torch.zeros((), dtype=torch.float64))
        # Sums of (movement times push) and of push squared, whose quotient is r over the learning rate: at first that
        # of SGD with momentum 0.9, with next to no weight.
        self.register_buffer("response", torch.tensor([1e-5, 1e-6], dtype=torch.float64))
        self.register_buffer("last", torch.full((2, entries), math.nan, dtype=torch.float64))

    def forward(self, lr: float = 0.1) -> Tensor:
        """The term to add to the loss.

        Args:
            lr: the strides' learning rate in the step to come, where a schedule changes it: only its changes count.
        """
        raw = self.cost._strides()
        strides = torch.cat([stride.detach().to("cpu", torch.float64) for stride in raw.values()])
        value, grads, room = self.cost.gradient()
        miss = self.miss()
        # Strides that cannot go where the cost is to go are left out.
        g = torch.cat(grads) / value * torch.cat([larger if miss > 0 else smaller for larger, smaller in room])
        along = g / g.square().sum().clamp(min=1e-12)
        learning = self.training and torch.is_grad_enabled()
        if learning:
            self._observe(strides, miss)
        speed = lr * self._speed()
        # A miss from far away is no sign of a force to hold against.
        lasting = min(max(miss, -self.near), self.near)
        multiplier = float(self.multiplier) + self.rate**2 / 4 * lasting / speed
        if multiplier * miss < 0:  # it pushes away from the target: too much was gathered
            multiplier *= 1 - self.rate
        multiplier = min(max(multiplier, -self.limit), self.limit)
        last_step = self._last_step(miss)
        if last_step is None:
            push = (multiplier + self.rate * miss / speed) * along
        else:
            push = multiplier * along
            at = sum(raw[i].numel() for i in itertools.takewhile(lambda i: i != last_step.stride_id, raw))
            at += last_step.entry
            push[at] += self.rate * (strides[at] - last_step.stride) / speed
        # No step should move a stride by more than a tenth, wherever the cost is flat.
        most = 0.1 * strides / speed
        push = torch.minimum(torch.maximum(push, -most), most)
        if learning:
            self.multiplier.fill_(multiplier)
            # Momentum moves strides by the pushes of some ten steps; without, it takes that long to learn of it.
            pushes = 0.9 * self.last[1].nan_to_num().cpu() + 0.1 * lr * push
            self.last.copy_(torch.stack([strides, pushes]))
        parts = torch.split(push, [stride.numel() for stride in raw.values()])
        term: Tensor = OnHost.apply(miss**2 / 2, parts, room, *raw.values())  # type: ignore[no-untyped-call]
        return term

    def _last_step(self, miss: float) -> Neighbour | None:
        """Next to the target, where a single size decides: that which comes nearest, if it comes nearer."""
        if not 0 < abs(miss) < self.near:
            return None
        found = [(abs(math.log(step.cost / self.target)), step) for step in self.cost.neighbours()]
        best = min(found, key=operator.itemgetter(0), default=None)
        return best[1] if best is not None and best[0] < abs(miss) else None

    def miss(self) -> float:
        """`log(C/T)`, 0 within the tolerance."""
        miss = math.log(self.cost.count() / self.target)
        return 0.0 if abs(miss) <= self.tolerance else miss

    def _observe(self, strides: Tensor, miss: float) -> None:
        """Learn from the last step how far strides move; next to the target the rest of the loss moves them more."""
        before, push = self.last.cpu()
        if before.isnan().any():
            return
        sample = torch.stack([torch.dot(before - strides, push), torch.dot(push, push)])
        self.response.mul_(1 - 0.05 * min(1.0, (miss / 0.1) ** 2)).add_(sample.to(self.response))

    def _speed(self) -> float:
        moved, pushed = map(float, self.response)
        return min(max(moved / pushed, 1e-1), 1e3)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but stay in float64."""
        return super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        """The target."""
        return f"target={self.target:.4g}, measure={self.cost.measure!r}"
