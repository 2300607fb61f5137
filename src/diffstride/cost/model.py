"""The cost of a model as a differentiable function of its strides."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffstride import _validation
from diffstride.cost import program, sensitivity
from diffstride.cost.budget import Budget
from diffstride.cost.program import Entry, Gradient, Measure, Neighbour, Program
from diffstride.cost.sensitivity import Allocation, Loss, Sensitivity
from diffstride.cost.stand_ins import Strides, raw_strides_of
from diffstride.errors import UsageError
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.strides import learnable_layers
from diffstride.tracing import ExampleInputs


class CostModel:
    """The cost of a model as a differentiable function of its strides.

    - `"macs"`: multiply-accumulates of convolutions, linear layers, attention and the resampling for the inputs given,
      in evaluation mode, by the formulas of torch's `FlopCounterMode` (`count_macs` has the parts). FFTs, which axes
      of more than 256 samples take, are not counted, so that the cost rises where such a map shrinks below that. An
      axis at stride 1 under an inner or hard window is left as it is and costs nothing.
    - `"memory"`: bytes of the storages saved for backward in training mode, each once, parameters excluded.

    The model runs once with symbols for the sizes that strides decide (`diffstride.tracing`). Every other size is an
    expression in these, and so is the cost. `exact` is the cost at the sizes in use. A call returns the relaxed cost,
    with `min(N, N/S + 2R)` (outer window) or `N/S` (inner) in place of whole sizes. The size behind a fixed stride `s`
    is relaxed to `(n + 2p - d (k - 1) - 1)/s + 1` minus `(s - 1)/2s`, the mean of what rounding down takes.

    A relaxed size may be saturated, as behind an outer window on a small map. A gradient that lets the stride grow
    then still passes, so that a cost in a loss always has a direction to push.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, measure: Measure = "macs") -> None:
        """Trace the model, which is not changed.

        Args:
            model: any module; without learnable strides its cost is a constant.
            example_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or
                `diffstride.ExampleInputs(*args, **kwargs)` for both.
            measure: `"macs"` or `"memory"`.

        Raises:
            UsageError: the model cannot be traced, since it raises or branches on the values of tensors.
            ValueError: an unknown measure.
        """
        _validation.one_of("measure", measure, program.MEASURES)
        self.model, self.measure = model, measure
        self.example = ExampleInputs.of(example_inputs)
        self._program: Program | None = Program(model, self.example, measure)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_program": None}  # compiled functions are made anew

    def __repr__(self) -> str:
        now, baseline = self.exact(), self.baseline()
        unit = "MACs" if self.measure == "macs" else "bytes"
        ratio = f", {now / baseline:.3f} of the baseline" if baseline else ""
        return f"CostModel({type(self.model).__name__}, {now / 1e6:.4g} million {unit} on the example inputs{ratio})"

    def __call__(self) -> Tensor:
        """Return the relaxed cost, a 0-d tensor, differentiable in the strides; computed on the host."""
        strides = self._strides()
        if not strides:
            return torch.tensor(float(self.exact()))
        cost: Tensor = program.OnHost.apply(*self.gradient(), *strides.values())  # type: ignore[no-untyped-call]
        return cost

    def gradient(self) -> Gradient:
        """Return the relaxed cost and its gradient with respect to each stride, in float64 on the host."""
        return self._current_program().gradient(self._strides())

    def neighbours(self) -> list[Neighbour]:
        """Return the exact costs with one size a sample smaller or larger."""
        return list(self._current_program().neighbours())

    def _strides(self) -> dict[int, Tensor]:
        """Return the strides by `stride_id`."""
        return {layer.stride_id: layer.stride for _, layer in learnable_layers(self.model)}

    def exact(self) -> int:
        """Return the exact cost at the sizes now in use."""
        return self._current_program().count(raw_strides_of)

    def runs(self) -> bool:
        """Return whether the model runs at the present strides, so that no map is too small for what follows."""
        program = self._program or self._current_program()
        if not program.runs(raw_strides_of):
            return False
        with suppress(UsageError):
            self._current_program()
            return True
        return False

    def initial(self) -> int:
        """Return the exact cost at the initial strides."""
        return self._count(lambda layer: layer.initial_strides)

    def _count(self, strides: Strides) -> int:
        """Return the exact cost at these strides; trace again where the model's code branches otherwise there."""
        traced = self._current_program()
        if not traced.holds(strides):
            # A model may refuse maps so small, as windows of attention do. Then the branches at hand are taken.
            with suppress(UsageError):
                traced = Program(self.model, self.example, self.measure, strides)
        return traced.count(strides)

    def baseline(self) -> int:
        """Return the cost of the model with strided layers in place of learnable ones, at their initial strides.

        For a model that `diffstride.convert` has converted, this is the cost that it had before. Other layers count as
        strided ones of `ceil(N/S)` samples.
        """
        return program.of_strided_model(self.model, self.example, self.measure)

    def minimum(self) -> int:
        """Return the least of three costs: at the largest strides that leave no map empty, at stride 1, and now."""
        largest = self._current_program().largest_strides()
        return min(self._count(largest), self._count(_all(1.0)), self.exact())

    def maximum(self) -> int:
        """Return the greater of two costs: just above stride 1, where every layer resamples whole maps, and now."""
        return max(self._count(_all(1 + 1e-9)), self.exact())

    def at(self, layer: LearnableStrides, strides: tuple[float, ...]) -> int:
        """Return the exact cost with other raw strides for one layer, and for those that share its parameter."""
        return self._count(program.instead(layer.stride_id, strides))

    def entries(self) -> list[Entry]:
        """Return the entries of the strides that can learn, in the order in which their layers run."""
        return list(self._current_program().entries())

    def sensitivity(self, loss: Loss, fractions: Sequence[float] = (0.85, 0.7, 0.5)) -> Sensitivity:
        """Measure how the loss changes when each stride changes alone, beside what its gradient predicts.

        Each entry of each stride is moved to where the size of its output is a sample smaller, a sample larger, and
        these fractions of the present one. The model is not changed.

        Args:
            loss: a function that takes a copy of the model and returns its loss on a fixed sample of data. It may
                adapt the copy first: statistics of batch norms should be computed again, and some steps of training
                show what can be recovered. Where it returns a tensor with a gradient, changes are predicted, too.
            fractions: sizes to try over the present size.
        """
        return sensitivity.sensitivity(self, loss, fractions)

    def find_strides(
        self,
        loss: Loss,
        amount: float,
        of: Literal["baseline", "initial", "absolute"] = "baseline",
        rounds: int = 2,
        screen: Loss | None = None,
    ) -> list[Allocation]:
        """Set the strides to a budget by the measured loss, in place.

        Combinations of strides are compared on the budget (`Budget.settle`): each stride alone, all alike, the present
        ones scaled, and the present ones with a single one moved. Then the best one is mixed with each stride in turn,
        and the better one stays. Combinations of the same sizes are compared once.

        Args:
            loss: as in `sensitivity`. Each call gets a copy of the model. Without some steps of training in it, strides
                are preferred that keep the grid of the convolutions behind them, whatever could be recovered.
            amount: as in `budget`.
            of: as in `budget`.
            rounds: how often the best is mixed with each stride, by half as much each time. With `n` strides there are
                up to `(2 + rounds) n + 2` combinations.
            screen: a cheaper loss, such as `loss` without steps of training. A combination is compared by `loss` only
                if it is among the best three so far by this one. None compares all.

        Returns:
            All combinations that were compared; the one of the lowest loss is set.

        Raises:
            UsageError: the budget is out of reach.
        """
        rounds = _validation.integer("rounds", rounds, 0)
        return sensitivity.find_strides(self.budget(amount, of), loss, rounds, screen)

    def budget(
        self, amount: float, of: Literal["baseline", "initial", "absolute"] = "baseline", warmup: int = 0
    ) -> Budget:
        """Return a loss term that holds the cost at a budget.

        Args:
            amount: a fraction of the cost that `of` names, or the cost itself.
            of: `"baseline"` (see `baseline`), `"initial"` (see `initial`) or `"absolute"`.
            warmup: training steps in which the target goes from the present cost to the budget, by equal factors.

        Raises:
            UsageError: the budget is out of reach; the message has the range.
            ValueError: the model has no learnable strides, or `of` is unknown.
        """
        _validation.one_of("of", of, ("baseline", "initial", "absolute"))
        if not any(layer.learns_strides for _, layer in learnable_layers(self.model)):
            raise ValueError(
                f"model must have learnable strides to meet a budget, got none in {type(self.model).__name__}"
            )
        whole = 1 if of == "absolute" else self.baseline() if of == "baseline" else self.initial()
        target, least, most = amount * whole, self.minimum(), self.maximum()
        if not least <= target <= most:
            reach = f"{least:.4g} to {most:.4g}"
            if of != "absolute":
                reach = f"{least / whole:.3f} to {most / whole:.3f} of the {of} cost ({whole:.4g})"
            raise UsageError(
                f"amount must be between the least and the most that strides can reach, {reach}, got {amount:g}"
            )
        return Budget(self, target, warmup=warmup)

    def _current_program(self) -> Program:
        """Return the program; trace again where the model's or torch's code branches otherwise at the present sizes."""
        if self._program is None or not self._program.holds(raw_strides_of):
            self._program = Program(self.model, self.example, self.measure)
        return self._program


def _all(stride: float) -> Strides:
    """Return a function that gives this stride to all layers that learn."""
    return lambda layer: (stride,) * layer.ndim if layer.learns_strides else raw_strides_of(layer)
