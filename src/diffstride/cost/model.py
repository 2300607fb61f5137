"""The cost of a model as a differentiable function of its strides."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffstride import _validation
from diffstride.cost.budget import Budget
from diffstride.cost.program import (
    MEASURES,
    Gradient,
    Measure,
    Neighbour,
    OnHost,
    Program,
    Strides,
    in_use,
    of_strided_model,
)
from diffstride.errors import UsageError
from diffstride.nn.strides import learnable_layers
from diffstride.tracing import ExampleInputs


class CostModel:
    """What a model costs as a differentiable function of its strides.

    Made from one pass with symbols for the sizes that strides decide (`diffstride.tracing`): every other size, through
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
                `diffstride.tracing.ExampleInputs(*args, **kwargs)` for both.
            measure: `"macs"` or `"memory"`.

        Raises:
            UsageError: a model that cannot be traced (it looks at values, it raises).
            ValueError: an unknown measure.
        """
        _validation.one_of("measure", measure, MEASURES)
        self.model, self.measure = model, measure
        self.example = ExampleInputs.of(example_inputs)
        self._program: Program | None = Program(model, self.example, measure)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_program": None}  # compiled functions are made anew

    def __call__(self) -> Tensor:
        """The relaxed cost, a 0-d tensor, differentiable in the strides; computed on the host."""
        strides = self._strides()
        if not strides:
            return torch.tensor(float(self.exact()))
        cost: Tensor = OnHost.apply(*self.gradient(), *strides.values())  # type: ignore[no-untyped-call]
        return cost

    def gradient(self) -> Gradient:
        """The relaxed cost, and its gradient with respect to each stride parameter, in float64 on the host."""
        return self._resolved().gradient(self._strides())

    def neighbours(self) -> list[Neighbour]:
        """What the exact cost would be with one size a sample smaller or larger."""
        return list(self._resolved().neighbours())

    def _strides(self) -> dict[int, Tensor]:
        """The strides by `stride_id`."""
        return {layer.stride_id: layer.stride for _, layer in learnable_layers(self.model)}

    def exact(self) -> int:
        """The exact cost at the sizes now in use."""
        return self._resolved().count(in_use)

    def initial(self) -> int:
        """The exact cost at the strides that the layers were constructed with."""
        return self._count(lambda layer: layer.initial_strides)

    def _count(self, strides: Strides) -> int:
        """The exact cost at these strides, by a trace of its own where the model's code takes another turn there."""
        program = self._resolved()
        if not program.holds(strides):
            # A model may refuse maps so small (windows of attention): then as if it did not.
            with suppress(UsageError):
                program = Program(self.model, self.example, self.measure, strides)
        return program.count(strides)

    def baseline(self) -> int:
        """The cost of the model with strided layers in place of the learnable ones, at their initial strides.

        Of a model that `diffstride.convert` has converted, the cost that it had before. A strided layer is taken to
        give `ceil(N/S)` samples where what it was is not known.
        """
        return of_strided_model(self.model, self.example, self.measure)

    def minimum(self) -> int:
        """The cost at the largest strides that bounds and maps allow (no map after a layer is empty)."""
        return self._count(self._resolved().largest_strides())

    def maximum(self) -> int:
        """The cost at the smallest strides that bounds and maps allow."""
        return self._count(lambda layer: (1.0,) * layer.ndim if layer.learns_strides else in_use(layer))

    def budget(self, amount: float, of: Literal["baseline", "initial", "absolute"] = "baseline") -> Budget:
        """A loss term that holds the cost at a budget.

        Args:
            amount: a fraction of the cost that `of` names, or the cost itself.
            of: `"baseline"` (see `baseline`), `"initial"` (see `initial`) or `"absolute"`.

        Raises:
            UsageError: a budget out of reach, with the least and the most that strides can make of the cost.
            ValueError: an amount not above 0, an unknown `of`.
        """
        _validation.one_of("of", of, ("baseline", "initial", "absolute"))
        if not any(layer.learns_strides for _, layer in learnable_layers(self.model)):
            raise ValueError(
                f"model must have learnable strides to meet a budget, got none in {type(self.model).__name__}"
            )
        if not 0 < amount < math.inf:
            raise ValueError(f"amount must be > 0 and finite, got {amount}")
        whole = 1 if of == "absolute" else self.baseline() if of == "baseline" else self.initial()
        target, least, most = amount * whole, self.minimum(), self.maximum()
        if not least <= target <= most:
            share = "" if of == "absolute" else f" of the {of} cost ({whole:.4g})"
            unit = "" if of == "absolute" else f", {least / whole:.3f} to {most / whole:.3f} of it"
            raise UsageError(
                f"amount must be between the least and the most that strides can reach, {least:.4g} to {most:.4g}"
                f"{unit}, got {amount:g}{share}"
            )
        return Budget(self, target)

    def _resolved(self) -> Program:
        """The program, traced again where the model's code, or torch's, takes another turn at the sizes now in use."""
        if self._program is None or not self._program.holds(in_use):
            self._program = Program(self.model, self.example, self.measure)
        return self._program
