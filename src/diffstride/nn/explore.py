"""Exploration: training uses other strides than the learned ones for a while, so that no initial stride is final."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from diffstride import _validation
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.strides import all_layers, learnable_layers


@dataclass(frozen=True)
class LayerContext:
    """A layer in a step of an exploration."""

    layer: LearnableStrides
    strides: tuple[float, ...]
    """The strides in use, one for each entry of the parameter."""
    index: int
    """The index of the layer in the model, from 0."""
    layers: int
    """The number of layers."""
    progress: float
    """The progress of the exploration, from 0 to 1 (excluded)."""
    noise: random.Random
    """A generator seeded by seed, step and the layer's name."""


class Exploration(ABC):
    """A schedule of factors that multiply the strides in a training step.

    In a loop of your own, call `set_strides` before each step. In Lightning, add the callback
    `diffstride.integrations.lightning.ExploreStrides`, or pass `--model.exploration` to `diffstride fit`. To make a
    schedule of your own, derive from this class and implement `factors`.

    A stride gets its gradient from the frequencies on the ramp of its window alone, so that a bad initial stride can be
    final. An exploration moves the windows of training away from the learned ones for a while. Gradients flow through
    the factors to the strides; costs, evaluation and `state_dict` ignore them. The factors depend on seed, step, layer
    names and strides alone: they are equal on every rank and after a resume, and layers that share a stride share them.
    Maps change their sizes more often; see `size_multiple`, and the limits of `torch.compile` on graphs.
    """

    def __init__(self, until: float = 0.5) -> None:
        self.until = _validation.positive_up_to("until", until, 1)

    def set_strides(self, model: nn.Module, step: int, steps: int, *, seed: int = 0) -> None:
        """Set the factors of every layer for one step; from step `until * steps` on there are none.

        Args:
            model: any module with learnable strides.
            step: the step of the optimizer, from 0.
            steps: the steps of the whole training.
            seed: the seed of the noise, if there is any.

        Raises:
            ValueError: `step` is below 0, `steps` below 1, or a stride is not finite.
        """
        progress = _validation.integer("step", step, 0) / (self.until * _validation.integer("steps", steps, 1))
        factors = {}
        if progress < 1:
            layers = [(name, layer) for name, layer in learnable_layers(model) if layer.learns_strides]
            for index, (name, layer) in enumerate(layers):
                strides = layer.entries
                _validation.finite_strides("stride", strides, owner=layer)
                name = name.replace("_orig_mod.", "")  # a prefix of torch.compile
                noise = random.Random(f"{seed}/{step}/{name}")
                chosen = self.factors(LayerContext(layer, strides, index, len(layers), progress, noise))
                factors[layer.stride_id] = None if chosen is None else layer.check_factors(chosen)
        for _, layer in all_layers(model):
            layer.set_stride_scale(factors.get(layer.stride_id))

    @abstractmethod
    def factors(self, context: LayerContext) -> Sequence[float] | None:
        """Return the factors of a layer, one for each entry of the parameter; None for none."""

    def batch_fraction(self, model: nn.Module, input_sizes: Mapping[str, Sequence[int]]) -> float:
        """Return the fraction of a batch that a step should take so that it costs no more than others, at most 1.

        Args:
            model: the model after `set_strides`.
            input_sizes: spatial sizes of the layers' inputs by name, as far as they are known.
        """
        return 1.0


class Jitter(Exploration):
    """A schedule that multiplies every stride by `exp(sigma * normal)` in every step.

    A normal number is drawn for each step, layer and axis. `sigma` falls to 0 linearly.
    """

    def __init__(self, sigma: float = 0.15, until: float = 0.5) -> None:
        """Make the schedule.

        Args:
            sigma: the value at the start, in (0, 10].
            until: the fraction of the training after which the learned strides are used, in (0, 1]. The statistics of
                batch norms settle in the rest.

        Raises:
            TypeError: an argument is not a number.
            ValueError: `sigma` or `until` is out of range.
        """
        super().__init__(until)
        self.sigma = _validation.positive_up_to("sigma", sigma, 10)

    def factors(self, context: LayerContext) -> Sequence[float]:
        """Return `exp(sigma (1 - progress) normal)`."""
        sigma = self.sigma * (1 - context.progress)
        return [math.exp(sigma * context.noise.gauss()) for _ in context.strides]


class Sweep(Exploration):
    """A filter sweep: one layer after another opens its windows wide and closes them slowly.

    In its turn, a layer of strides `S` uses `S^(1 - a)`, where `a` falls from `depth` to 0 linearly. While the window
    is open, the weights learn to use the frequencies beyond the learned window. While it closes, its ramp passes over
    them, and the loss that their removal would cost lowers the stride. Where nothing is lost, the stride stays. A
    larger stride opens further, and one of 1 does not change. Nothing is random.

    An open layer has larger maps. `batch_fraction` is the fraction of samples that makes its step as cheap as others,
    but not less than `LEAST_FRACTION`.
    """

    LEAST_FRACTION = 0.25

    def __init__(self, depth: float = 0.8, until: float = 0.5) -> None:
        """Make the schedule.

        Args:
            depth: how far a window opens, in (0, 1]: from `S` to `S^(1 - depth)`, with 1 to the whole band.
            until: the fraction of the training in which all layers have their turn, in (0, 1].

        Raises:
            TypeError: an argument is not a number.
            ValueError: `depth` or `until` is out of range.
        """
        super().__init__(until)
        self.depth = _validation.positive_up_to("depth", depth, 1)

    def factors(self, context: LayerContext) -> Sequence[float] | None:
        """Return `S^-a` for the layer whose turn it is."""
        passed = context.progress * context.layers - context.index
        if not 0 <= passed < 1:
            return None
        opening = self.depth * (1 - passed)
        return [stride**-opening for stride in context.strides]

    def batch_fraction(self, model: nn.Module, input_sizes: Mapping[str, Sequence[int]]) -> float:
        """Return the usual size of the open layer's map over its present size; `LEAST_FRACTION` where it is unknown."""
        for name, layer in learnable_layers(model):
            if layer.is_scaled:
                if name not in input_sizes:
                    return self.LEAST_FRACTION
                usual, opened = (
                    math.prod(layer.output_size(input_sizes[name], scaled=scaled)) for scaled in (False, True)
                )
                return min(max(usual / opened, self.LEAST_FRACTION), 1.0)
        return 1.0
