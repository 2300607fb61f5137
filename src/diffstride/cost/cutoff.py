"""Strides as cut-off frequencies (Table 2 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffstride import _validation
from diffstride.cost.stand_ins import records_of
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.strides import learnable_layers
from diffstride.tracing import ExampleInputs, Session, evaluator


def cutoff_frequencies(
    model: nn.Module,
    spacing: float | Sequence[float],
    example_inputs: Any = None,
    whole_bins: bool = False,
) -> dict[str, tuple[float, ...]]:
    """Return the frequencies at which the learned windows end, in cycles per unit of the axes.

    The edge `N/(2S)` of a window, in cycles per axis, is the frequency `1/(2 S d)` of an axis sampled every `d` units.
    A hop of 10 ms and `S = 1.89` give 26.5 Hz; a mel axis with `d = 1` gives cycles per band. Behind a downsampling of
    `N` samples to `N'` the spacing is `d N/N'`, whether its stride is learnable or not.

    Args:
        model: any module.
        spacing: `d` of the model's input, in any unit; one number, or one per spatial axis.
        example_inputs: as in `CostModel`. Without them, all learnable layers must see the model's input itself.
        whole_bins: give the paper's frequency, that of the last whole bin, `floor(N/(2S)) / (N d)`. This needs example
            inputs.

    Returns:
        By layer name one frequency per axis, at the strides clamped to `bounds`. A layer that is called several times
        has the frequencies of its first call.

    Raises:
        ValueError: a spacing is not > 0; example inputs are needed; a layer's axis is not one of the model's input, as
            that of a spectrogram made inside.
    """
    if example_inputs is None:
        if whole_bins:
            raise ValueError("example_inputs must be given for whole_bins=True, got None")
        first = _first(model)
        cutoffs = {}
        for name, layer in learnable_layers(model):
            if layer is not first:
                raise ValueError(
                    f"example_inputs must be given for {name or 'the model'}: it need not see its input, got None"
                )
            cutoffs[name] = _edges(layer, _spacings(spacing, layer.ndim))
        return cutoffs
    example = ExampleInputs.of(example_inputs)
    records, session = records_of(model, example, symbolic_inputs=True)
    names = {layer: name for name, layer in learnable_layers(model)}
    inputs = {symbol: key for symbol, key in session.keys.items() if key[0] == "input"}
    given = _spacings(spacing, 1 + max((axis for _, _, axis in inputs.values()), default=0))
    spacings: dict[Any, float] = {symbol: given[axis] for symbol, (_, _, axis) in inputs.items()}
    cutoffs = {}
    for record in records:
        layer, before = record.layer, []
        for size, symbol, new in zip(record.sampled, record.symbols, record.sizes, strict=True):
            before.append(_spacing_of(size, spacings, session, names.get(layer, "")))
            spacings[symbol] = before[-1] * session.value(size) / new
        if layer in names and names[layer] not in cutoffs:
            sizes = [session.value(size) for size in record.sampled]
            cutoffs[names[layer]] = _edges(layer, before, sizes if whole_bins else None)
    return {name: cutoffs[name] for name in names.values() if name in cutoffs}


def _first(model: nn.Module) -> nn.Module:
    """Return the first module of a sequence, or the model itself."""
    while isinstance(model, nn.Sequential) and len(model):
        model = model[0]
    return model


def _spacings(spacing: float | Sequence[float], ndim: int) -> tuple[float, ...]:
    return _validation.positive("spacing", _validation.per_axis("spacing", spacing, ndim))


def _edges(layer: LearnableStrides, spacings: Sequence[float], sizes: Sequence[int] | None = None) -> tuple[float, ...]:
    if sizes is None:
        return tuple(1 / (2 * s * d) for s, d in zip(layer.strides, spacings, strict=True))
    return tuple(
        math.floor(n / (2 * s) + 1e-5) / (n * d) for n, s, d in zip(sizes, layer.strides, spacings, strict=True)
    )


def _spacing_of(size: Any, spacings: dict[Any, float], session: Session, name: str) -> float:
    """Return the spacing of an axis whose size is an expression: `d N/d N'`, with quotients not rounded."""
    symbols = list(size.free_symbols)
    found = [symbol for symbol in symbols if symbol in spacings]
    if len(found) != 1:
        raise ValueError(f"an axis of {name} must be one of the model's input, got the size {size}")
    with torch.inference_mode(False):  # with gradients
        n = {s: torch.tensor(float(session.hints[s]), dtype=torch.float64, requires_grad=True) for s in symbols}
        (relaxed,) = evaluator([size], symbols, {})(*n.values())
        (slope,) = torch.autograd.grad(relaxed, n[found[0]])
    return spacings[found[0]] / float(slope)
