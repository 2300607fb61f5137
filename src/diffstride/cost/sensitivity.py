"""Measure how the loss changes with each stride, and find strides under a budget by these changes.

The gradient of a stride sees the frequencies on the ramp of its window. It does not see what a coarser grid does to the
convolutions that follow, because the crop is not differentiated. A measured change sees both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from diffstride.cost.program import Entry
from diffstride.errors import UsageError
from diffstride.geometry import AXIS_NAMES, output_size
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.strides import learnable_layers

if TYPE_CHECKING:
    from diffstride.cost.budget import Budget
    from diffstride.cost.model import CostModel

_UP_TO = 1.03
"""The highest cost over the target of strides that are compared. Sizes are whole, so that few meet a target exactly."""

_FINALISTS = 3
"""The best combinations by a screening loss that are compared by the loss itself."""

Loss = Callable[[nn.Module], Tensor | float]
"""A function from a copy of the model to its loss on a fixed sample of data. It may adapt the copy before."""


class Change(NamedTuple):
    """A stride that is changed alone, and what that does."""

    layer: str
    axis: str
    """The axis, or `"all"` for a shared stride."""
    stride: float
    size: int
    """The size of the output, of the first axis that the stride concerns."""
    loss: float
    """The measured change of the loss."""
    predicted: float
    """The change that the gradient predicts, `dL/dS` times the change of the stride; NaN where there is none."""
    cost: int
    """The change of the cost."""


class Allocation(NamedTuple):
    """Strides on a budget."""

    loss: float
    cost: int
    strides: dict[str, tuple[float, ...]]
    """By layer name, one for each entry of the parameter."""


def lowest(tried: Sequence[Allocation]) -> Allocation:
    """Return the strides of the lowest loss."""
    return min(tried, key=lambda found: found.loss)


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """How the loss and the cost of a model change with each stride. It is shown as a table."""

    loss: float
    """The loss at the present strides."""
    cost: int
    """The cost there."""
    changes: tuple[Change, ...]

    @property
    def layers(self) -> list[str]:
        """The names of the layers."""
        return list(dict.fromkeys(change.layer for change in self.changes))

    def rank_correlation(self, layer: str | None = None) -> float:
        """Return Spearman's rank correlation of measured and predicted changes; of one layer, or of all."""
        chosen = [c for c in self.changes if layer in (None, c.layer)]
        measured, predicted = (_ranks([getattr(c, kind) for c in chosen]) for kind in ("loss", "predicted"))
        return torch.corrcoef(torch.stack([measured, predicted]))[0, 1].item() if len(chosen) > 1 else math.nan

    def sign_agreement(self, layer: str | None = None) -> float:
        """Return the fraction of changes whose sign the gradient predicts; of one layer, or of all.

        It is NaN where strides have no gradient, as under hard windows.
        """
        chosen = [c for c in self.changes if layer in (None, c.layer) and c.predicted and not math.isnan(c.predicted)]
        agree = [math.copysign(1, c.loss) == math.copysign(1, c.predicted) for c in chosen]
        return sum(agree) / len(agree) if agree else math.nan

    def __repr__(self) -> str:
        rows = [("layer", "axis", "stride", "size", "loss", "predicted", "cost saved", "loss per cost")]
        for c in self.changes:
            saved = -c.cost / self.cost
            ratio = f"{c.loss / saved:.3f}" if saved > 0 else ""
            numbers = f"{c.stride:.3f}", str(c.size), f"{c.loss:+.4f}", f"{c.predicted:+.4f}", f"{saved:.3f}", ratio
            rows.append((c.layer, c.axis, *numbers))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"loss {self.loss:.4f}, cost {self.cost:.4g} at the present strides"])


def _label(entry: Entry) -> str:
    """Return the name of the axis of an entry."""
    return "all" if entry.layer.shared and entry.layer.ndim > 1 else AXIS_NAMES[entry.layer.ndim][entry.axis]


def _stride_for(entry: Entry, size: int) -> float | None:
    """Return the stride at which the output has a size; None if there is none within the bounds."""
    layer = entry.layer
    if size <= entry.margin:
        return None
    stride = entry.n / (size - entry.margin)
    lower, upper = layer.options.stride_range(entry.axis, entry.n)
    found = output_size(entry.n, stride, layer.smoothness, layer.window, layer.size_multiple)
    return stride if lower <= stride <= upper and found == size else None


def sensitivity(cost: CostModel, loss: Loss, fractions: Sequence[float]) -> Sensitivity:
    """Measure the changes; see `CostModel.sensitivity`."""
    present = cost.exact()
    value, slopes = _with_slopes(cost.model, loss)
    names = {layer.stride_id: name for name, layer in learnable_layers(cost.model)}
    changes = []
    for entry in cost.entries():
        name = names[entry.layer.stride_id]
        before = entry.layer.strides[entry.axis]
        multiple = entry.layer.size_multiple
        sizes = {*entry.next_sizes, *(multiple * round(fraction * entry.size / multiple) for fraction in fractions)}
        for size in sorted(sizes - {entry.size}, reverse=True):
            stride = _stride_for(entry, size)
            if stride is None:
                continue
            slope = slopes[entry.layer.stride_id][entry.position] if slopes else math.nan
            changes.append(
                Change(
                    layer=name,
                    axis=_label(entry),
                    stride=stride,
                    size=size,
                    loss=_loss_at(cost.model, loss, name, entry.moved(stride)) - value,
                    predicted=slope * (stride - before),
                    cost=cost.at(entry.layer, entry.moved(stride)) - present,
                )
            )
    return Sensitivity(value, present, tuple(changes))


def find_strides(budget: Budget, loss: Loss, rounds: int, screen: Loss | None) -> list[Allocation]:
    """Find strides on the budget with a low loss; see `CostModel.find_strides`."""
    layers = [layer for _, layer in learnable_layers(budget.cost.model) if layer.learns_strides]
    before = [layer.raw_strides[: len(layer.stride)] for layer in layers]
    try:
        tried = _compared(budget, loss, rounds, screen)
    except BaseException:
        for layer, strides in zip(layers, before, strict=True):
            layer.write_strides(strides)
        raise
    _set(budget.cost.model, lowest(tried))
    return tried


def _compared(budget: Budget, loss: Loss, rounds: int, screen: Loss | None) -> list[Allocation]:
    model, places = budget.cost.model, budget.places
    tried: list[Allocation] = []
    measured: set[tuple[int, ...]] = set()
    screened: list[float] = []

    def attempt(direction: Sequence[float], start: Sequence[float] | None = None) -> None:
        """Move strides along a line onto the budget, and measure the loss."""
        budget.settle(direction, start)
        cost = budget.cost.exact()
        sizes = cost, *(entry.size for entry in budget.cost.entries())
        if cost <= _UP_TO * budget.target and sizes not in measured:
            measured.add(sizes)
            strides = {name: layer.entries for name, layer in learnable_layers(model)}
            with torch.no_grad():
                if screen is not None:
                    quick = float(screen(copy.deepcopy(model)))
                    better = sum(not other >= quick for other in screened)  # nothing is better than NaN
                    screened.append(math.inf if math.isnan(quick) else quick)
                    if better >= _FINALISTS:
                        return
                tried.append(Allocation(float(loss(copy.deepcopy(model))), cost, strides))

    present = budget.logs
    alone = [[float(i == j) for j in range(len(places))] for i in range(len(places))]
    for start in [*alone, [1.0] * len(places), present]:
        if any(start):
            attempt(start)
    for one in alone if any(present) else ():
        attempt(one, present)
    if not tried:
        raise UsageError("amount must be in reach of the strides together, but no combination that was tried meets it")
    step = 0.5
    for _ in range(rounds):
        for i in range(len(places)):
            _set(model, lowest(tried))
            logs = [math.log(layer.entries[k]) for layer, k in places]
            attempt([(1 - step) * log + step * max(logs) * (i == j) for j, log in enumerate(logs)])
        step /= 2
    return tried


def _set(model: nn.Module, found: Allocation) -> None:
    for name, layer in learnable_layers(model):
        if layer.learns_strides:
            layer.write_strides(found.strides[name])


def _loss_at(model: nn.Module, loss: Loss, name: str, strides: tuple[float, ...]) -> float:
    """Return the loss of a copy in which one layer has other raw strides, one per axis."""
    twin = copy.deepcopy(model)
    layer = twin.get_submodule(name)
    assert isinstance(layer, LearnableStrides)
    layer.write_strides(strides[: len(layer.stride)])
    with torch.no_grad():
        return float(loss(twin))


def _with_slopes(model: nn.Module, loss: Loss) -> tuple[float, dict[int, list[float]]]:
    """Return the loss and its gradients by `stride_id`; none where the loss is a number."""
    twin = copy.deepcopy(model)
    pairs = zip(learnable_layers(model), learnable_layers(twin), strict=True)
    strides = {layer.stride_id: copied.stride for (_, layer), (_, copied) in pairs}
    with torch.enable_grad():
        value = loss(twin)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return float(value), {}
    grads = torch.autograd.grad(value, [*strides.values()], allow_unused=True, materialize_grads=True)
    return value.item(), {key: grad.tolist() for key, grad in zip(strides, grads, strict=True)}


def _ranks(values: Sequence[float]) -> Tensor:
    """Return ranks, means for equal values."""
    given = torch.tensor(values, dtype=torch.float64)
    below = (given[:, None] > given).sum(1)
    equal = (given[:, None] == given).sum(1)
    return below + (equal - 1) / 2
