"""A loss term that holds the cost of a model at a budget."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from diffstride import _validation
from diffstride.cost.program import Neighbour, OnHost
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.strides import learnable_layers

if TYPE_CHECKING:
    from diffstride.cost.model import CostModel

RATE = 0.05
"""The fraction of the error that a step removes."""
LIMIT = 10.0
"""The largest size of the multiplier."""
TOLERANCE = 0.01
"""The relative error that counts as none."""
NEAR = 0.15
"""The error below which single sizes are moved in turn."""


class Budget(nn.Module):
    """A loss term that holds a model's cost at a target, from above and from below.

    Make it with `CostModel.budget` and add what it returns to the loss in every step:

        budget = ds.CostModel(model, example_inputs).budget(0.7)
        loss = criterion(model(x), y) + budget()

    Pass the strides' present learning rate, `budget(lr)`, where a schedule changes it. Save the budget with the model:
    its state is in buffers. It reads the strides and has no other effect on the model.

    How it works. With the exact cost `C` and the target `T`, the error is `log(C/T)`, or 0 within `TOLERANCE`. The
    value of the term is half of its square. The term's gradient with respect to the strides is `push g / |g|^2`, where
    `g` is the gradient of the logarithm of the relaxed cost. Strides that move by `r` times their gradient lower the
    error by `r push`. The push has two parts:

    - `RATE error / r`, under which the error shrinks by `RATE` a step. Below an error of `NEAR`, where whole sizes
      decide, it goes to one stride alone, the one whose next size comes nearest to the target.
    - A multiplier, as in a Lagrangian. It holds the strides against the rest of the loss once the error is gone. Each
      call in training mode moves it by `RATE^2 / 4 error / r` (critically damped), within `LIMIT`.

    `r` depends on the optimizer, its learning rate, momentum and clipping. It is estimated from the strides' movement.
    `RATE`, `LIMIT`, `TOLERANCE` and `NEAR` are constants of the module `diffstride.cost.budget`.
    """

    multiplier: Tensor
    response: Tensor
    last: Tensor
    warmed: Tensor | None

    def __init__(self, cost: CostModel, target: float, *, warmup: int = 0) -> None:
        """Make the term.

        Args:
            cost: the cost of the model.
            target: the cost to reach, in multiply-accumulates or bytes.
            warmup: calls in training mode in which the target goes from the cost at the first of them to `target`, by
                equal factors. Without a warm-up the cost alone decides in the first tens of steps which strides move.
        """
        super().__init__()
        _validation.above_zero("target", target)
        _validation.not_negative("warmup", warmup)
        self.cost, self.target, self.warmup = cost, target, warmup
        entries = sum(g.numel() for g in cost.gradient().grads)
        self.register_buffer("multiplier", torch.zeros((), dtype=torch.float64))
        # Sums of (movement times push) and of push squared. Their quotient is r over the learning rate. It starts as
        # that of SGD with momentum 0.9, with a small weight.
        self.register_buffer("response", torch.tensor([1e-5, 1e-6], dtype=torch.float64))
        # The calls so far, and the cost at the first of them.
        self.register_buffer("warmed", torch.zeros(2, dtype=torch.float64) if warmup else None)
        self.register_buffer("last", torch.full((2, entries), math.nan, dtype=torch.float64))

    def forward(self, lr: float = 0.1) -> Tensor:
        """Return the term to add to the loss.

        Args:
            lr: the strides' learning rate in the next step. Only its changes count.
        """
        raw = self.cost._strides()
        strides = torch.cat([stride.detach().to("cpu", torch.float64) for stride in raw.values()])
        value, grads, room = self.cost.gradient()
        learning = self.training and torch.is_grad_enabled()
        target = self._present_target(learning)
        error = self.log_error(target)
        # Strides that cannot go where the cost is to go are left out.
        g = torch.cat(grads) / value * torch.cat([larger if error > 0 else smaller for larger, smaller in room])
        along = g / g.square().sum().clamp(min=1e-12)
        if learning:
            self._observe(strides, error)
        speed = lr * self._speed()
        # A large error is no sign of a force to hold against.
        lasting = min(max(error, -NEAR), NEAR)
        multiplier = float(self.multiplier) + RATE**2 / 4 * lasting / speed
        if multiplier * error < 0:  # it pushes away from the target
            multiplier *= 1 - RATE
        multiplier = min(max(multiplier, -LIMIT), LIMIT)
        last_step = self._nearer_step(target, abs(error)) if 0 < abs(error) < NEAR else None
        if last_step is None:
            push = (multiplier + RATE * error / speed) * along
        else:
            push = multiplier * along
            at = sum(raw[i].numel() for i in itertools.takewhile(lambda i: i != last_step.stride_id, raw))
            at += last_step.entry
            push[at] += RATE * (strides[at] - last_step.stride) / speed
        # No step should move a stride by more than a tenth, wherever the cost is flat.
        most = 0.1 * strides / speed
        push = torch.minimum(torch.maximum(push, -most), most)
        if learning:
            self.multiplier.fill_(multiplier)
            # Momentum moves strides by the pushes of some ten steps.
            pushes = 0.9 * self.last[1].nan_to_num().cpu() + 0.1 * lr * push
            self.last.copy_(torch.stack([strides, pushes]))
        parts = torch.split(push, [stride.numel() for stride in raw.values()])
        term: Tensor = OnHost.apply(error**2 / 2, parts, room, *raw.values())  # type: ignore[no-untyped-call]
        return term

    def _present_target(self, learning: bool) -> float:
        """Return the target, which moves in the warm-up; `learning` counts a call."""
        if self.warmed is None:
            return self.target
        calls, first = self.warmed.tolist()
        if not calls:
            first = float(self.cost.exact())
        if learning and calls <= self.warmup:
            self.warmed.copy_(torch.tensor([calls + 1, first]))
        part = min(calls / self.warmup, 1.0)
        return math.exp((1 - part) * math.log(first) + part * math.log(self.target))

    def _nearer_step(
        self, target: float, distance: float, allowed: Container[tuple[int, int]] | None = None
    ) -> Neighbour | None:
        """Return the change of a single size that comes nearest to a target, if it comes nearer than a distance."""
        found = [
            (abs(math.log(step.cost / target)), step)
            for step in self.cost.neighbours()
            if allowed is None or (step.stride_id, step.entry) in allowed
        ]
        best = min(found, key=operator.itemgetter(0), default=None)
        return best[1] if best is not None and best[0] < distance else None

    @property
    def places(self) -> list[tuple[LearnableStrides, int]]:
        """A layer and an entry of its stride, for each that can move; layers that share a stride are there once."""
        return [
            (layer, i)
            for layer in self._layers
            for i, limits in enumerate(layer.options.entry_limits(layer.ndim))
            if limits != (1, 1)
        ]

    @property
    def _layers(self) -> list[LearnableStrides]:
        learned = [layer for _, layer in learnable_layers(self.cost.model) if layer.learns_strides]
        return [*{layer.stride_id: layer for layer in learned}.values()]

    @property
    def logs(self) -> list[float]:
        """The present `log S` of each of `places`."""
        return [math.log(max(layer.raw_strides[i], 1.0)) for layer, i in self.places]

    @torch.no_grad()
    def settle(self, direction: Sequence[float] | None = None, start: Sequence[float] | None = None) -> None:
        """Move the strides along a line so that the exact cost comes nearest to the target.

        The line is `log S = start + t direction`, no stride below 1. Without arguments, `log S` of all strides is
        multiplied by a common factor; strides that are all 1 grow together. Since sizes are whole, single ones are then
        moved by a sample as long as the cost comes nearer to the target; those that the line leaves alone only where it
        would miss it by more than twice the tolerance. A line that does not meet the budget is followed to its nearest
        point. Call it once, where strides are to be fixed from then on.

        Args:
            direction: a number for each of `places`, none negative; by default the present `log S`.
            start: `log S` for each of `places`; by default 0.
        """
        if direction is None:
            if self.log_error() == 0:
                return
            direction = self.logs
        layers, places = self._layers, self.places
        largest = max(direction, default=0.0)
        slopes = [own / largest for own in direction] if largest > 0 else [1.0] * len(places)
        start = start or [0.0] * len(places)

        def error(t: float) -> float:
            """Return the error at a place of the line."""
            strides = {layer: [1.0] * len(layer.stride) for layer in layers}
            for (layer, i), log, slope in zip(places, start, slopes, strict=True):
                strides[layer][i] = math.exp(max(log + t * slope, 0.0))
            for layer, own in strides.items():
                layer.write_strides(own)
                layer.clamp_strides_()
            return math.log(self.cost.exact() / self.target) if self.cost.runs() else -math.inf

        sign = 1 if error(0.0) > 0 else -1
        near, far = 0.0, sign / 16
        while error(far) * sign > 0 and abs(far) < 8:
            near, far = far, 2 * far
        low, high = sorted((near, far))
        for _ in range(30):  # sizes are whole: the error falls in steps
            middle = (low + high) / 2
            low, high = (middle, high) if error(middle) > 0 else (low, middle)
        ends = {t: error(t) for t in (low, high)}
        distance = abs(error(min(ends, key=lambda t: abs(ends[t]))))
        meets = ends[low] > 0 >= ends[high]
        by_id = {layer.stride_id: layer for layer in layers}
        everywhere = {(layer.stride_id, i) for layer, i in places}
        moved = {(layer.stride_id, i) for (layer, i), slope in zip(places, slopes, strict=True) if slope > 0}
        # An axis that the line leaves alone would be resampled for a single sample.
        for allowed, enough in (moved, 0.0), (everywhere, 2 * TOLERANCE):
            while meets and distance > enough and (step := self._nearer_step(self.target, distance, allowed)):
                distance = abs(math.log(step.cost / self.target))
                _write_entry(by_id[step.stride_id], step.entry, step.stride)
        cost = self.cost.exact()
        for entry in self.cost.entries():
            present = entry.layer.entries[entry.position]
            _, most = entry.layer.options.stride_range(entry.axis, entry.n)
            if present > most:  # than the map can take; another map with the same stride may take more
                _write_entry(entry.layer, entry.position, most)
                if self.cost.exact() != cost:
                    _write_entry(entry.layer, entry.position, present)

    def log_error(self, target: float | None = None) -> float:
        """Return `log(C/T)`, or 0 within the tolerance; `T` is the budget's target if none is given."""
        error = math.log(self.cost.exact() / (target or self.target))
        return 0.0 if abs(error) <= TOLERANCE else error

    def _observe(self, strides: Tensor, error: float) -> None:
        """Update the estimate of how far strides move, with less weight near the target."""
        before, push = self.last.cpu()
        if before.isnan().any():
            return
        sample = torch.stack([torch.dot(before - strides, push), torch.dot(push, push)])
        self.response.mul_(1 - 0.05 * min(1.0, (error / 0.1) ** 2)).add_(sample.to(self.response))

    def _speed(self) -> float:
        moved, pushed = map(float, self.response)
        return min(max(moved / pushed, 1e-1), 1e3)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but stay in float64."""
        return super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        """Return the target."""
        return f"target={self.target:.4g}, measure={self.cost.measure!r}"


def _write_entry(layer: LearnableStrides, entry: int, stride: float) -> None:
    strides = list(layer.raw_strides[: len(layer.stride)])
    strides[entry] = stride
    layer.write_strides(strides)
