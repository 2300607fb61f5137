"""Exploration: strides that training uses for a while in place of the learned ones, so that no start is a trap."""

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
    """In use, an entry for each of the parameter's."""
    index: int
    """In the order of the model's layers, from 0."""
    layers: int
    """How many there are."""
    progress: float
    """Of the exploration, from 0 to 1 (excluded)."""
    noise: random.Random
    """A function of seed, step and the layer's name."""


class Exploration(ABC):
    """Multiplies the strides that a training step uses by factors that are a function of the step.

    A stride gets its gradient from the frequencies on the ramp of its window alone. Of what lies beyond it learns
    nothing, so that a bad start can be final. Under an exploration the windows of training are at times others than the
    learned ones. Gradients flow through the factors to the strides; costs, evaluation and `state_dict` know nothing of
    them. What is set follows from (seed, step, layer names, strides) alone: it is the same on every rank and after a
    resume, and layers that share a stride share its factors.

    In a loop of your own, call `set_strides` before each step; in Lightning, add the callback
    `diffstride.integrations.lightning.ExploreStrides`, or give `diffstride fit` the argument `--model.exploration`.
    Maps change their sizes more often than without: see `size_multiple`, and the limits of `torch.compile` on graphs.

    Derive your own from this class: `factors` is all that it needs.
    """

    def __init__(self, until: float = 0.5) -> None:
        self.until = _validation.positive_up_to("until", until, 1)

    def set_strides(self, model: nn.Module, step: int, steps: int, *, seed: int = 0) -> None:
        """Set the factors of every layer for one step; from step `until * steps` on there are none.

        Args:
            model: any module with learnable strides.
            step: of the optimizer, from 0.
            steps: of the whole training.
            seed: of the noise, if there is any.

        Raises:
            ValueError: a step below 0, no steps, a stride that is not finite.
        """
        progress = _validation.whole("step", step, 0) / (self.until * _validation.positive_int("steps", steps))
        factors = {}
        if progress < 1:
            layers = [(name, layer) for name, layer in learnable_layers(model) if layer.learns_strides]
            for place, (name, layer) in enumerate(layers):
                strides = layer.strides[: len(layer.stride)]
                _validation.finite_strides("stride", strides, owner=layer)
                name = name.replace("_orig_mod.", "")  # which torch.compile puts before
                noise = random.Random(f"{seed}/{step}/{name}")
                chosen = self.factors(LayerContext(layer, strides, place, len(layers), progress, noise))
                factors[layer.stride_id] = None if chosen is None else layer.check_factors(chosen)
        for _, layer in all_layers(model):
            layer.set_stride_scale(factors.get(layer.stride_id))

    @abstractmethod
    def factors(self, context: LayerContext) -> Sequence[float] | None:
        """What multiplies the strides of a layer, an entry for each of the parameter's; None: nothing."""

    def batch_fraction(self, model: nn.Module, input_sizes: Mapping[str, Sequence[int]]) -> float:
        """The share of a batch's samples that a step should take, at most 1, so that it costs no more than others.

        Args:
            model: as `set_strides` left it.
            input_sizes: spatial sizes of the layers' inputs, by name, as far as they are known.
        """
        return 1.0


class Jitter(Exploration):
    """In every step, every stride times `exp(sigma * normal)`.

    One normal number for each layer and axis, drawn anew in every step; `sigma` falls to 0 in a straight line.
    """

    def __init__(self, sigma: float = 0.15, until: float = 0.5) -> None:
        """Make the schedule.

        Args:
            sigma: at the start, in (0, 10].
            until: the share of the training after which the learned strides are used as they are, in (0, 1]. The
                statistics of batch norms need what is left to settle.

        Raises:
            TypeError: an argument that is no number.
            ValueError: `sigma` outside (0, 10], `until` outside (0, 1].
        """
        super().__init__(until)
        self.sigma = _validation.positive_up_to("sigma", sigma, 10)

    def factors(self, context: LayerContext) -> Sequence[float]:
        """`exp(sigma (1 - progress) normal)`."""
        sigma = self.sigma * (1 - context.progress)
        return [math.exp(sigma * context.noise.gauss()) for _ in context.strides]


class Sweep(Exploration):
    """One layer after another opens its windows wide and closes them slowly: a filter sweep.

    In its turn, a layer of strides `S` uses `S^(1 - a)`, where `a` falls from `depth` to 0 in a straight line. While
    the window is open, the weights learn what the frequencies beyond the learned window are good for; while it closes,
    its ramp passes over them, and the loss that their passing would cost holds the stride back. As the stride gives
    way, so does the window: it stops at the band. Where nothing is lost, the stride is what it was. Nothing is random.

    A stride of 1 hides nothing and is left alone; the larger a stride, the further it opens.

    An open layer has larger maps. `batch_fraction` says how many samples leave its step as cheap as others, at least
    `LEAST_SHARE` of them.
    """

    LEAST_SHARE = 0.25

    def __init__(self, depth: float = 0.8, until: float = 0.5) -> None:
        """Make the schedule.

        Args:
            depth: how far a window opens, in (0, 1]: from `S` to `S^(1 - depth)`, with 1 to the whole band.
            until: the share of the training in which all layers have their turn, in (0, 1].

        Raises:
            TypeError: an argument that is no number.
            ValueError: `depth` or `until` outside (0, 1].
        """
        super().__init__(until)
        self.depth = _validation.positive_up_to("depth", depth, 1)

    def factors(self, context: LayerContext) -> Sequence[float] | None:
        """`S^-a` for the layer whose turn it is."""
        passed = context.progress * context.layers - context.index
        if not 0 <= passed < 1:
            return None
        opening = self.depth * (1 - passed)
        return [stride**-opening for stride in context.strides]

    def batch_fraction(self, model: nn.Module, input_sizes: Mapping[str, Sequence[int]]) -> float:
        """The open layer's map as it is otherwise, over the map that it has; `LEAST_SHARE` where that is not known."""
        for name, layer in learnable_layers(model):
            if layer.is_scaled:
                if name not in input_sizes:
                    return self.LEAST_SHARE
                usual, opened = (
                    math.prod(layer.output_size(input_sizes[name], scaled=scaled)) for scaled in (False, True)
                )
                return min(max(usual / opened, self.LEAST_SHARE), 1.0)
        return 1.0
