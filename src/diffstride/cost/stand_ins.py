"""Forwards in place of those of our layers, for runs in which sizes are symbols."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffstride import functional, tracing
from diffstride.nn._fused import as_autocast
from diffstride.nn.conv import DiffStrideConvNd
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.resize import ResizeTo
from diffstride.nn.spectral import SpectralPoolNd
from diffstride.tracing import ExampleInputs, Session

Strides = Callable[[LearnableStrides], tuple[float, ...]]
"""A function from a layer to its raw strides."""


def raw_strides_of(layer: LearnableStrides) -> tuple[float, ...]:
    """Return the raw strides of a layer."""
    return layer.raw_strides


@contextmanager
def pinned(strides: Mapping[LearnableStrides, tuple[float, ...]]) -> Iterator[None]:
    """Pin the strides of several layers, since the parameters of a trace have no values."""
    with ExitStack() as stack:
        for layer, values in strides.items():
            stack.enter_context(layer.pinned(strides=values))
        yield


class Record(NamedTuple):
    """A call of a learnable layer; sizes are expressions."""

    layer: LearnableStrides
    batch: Any
    channels: int
    spatial: tuple[Any, ...]
    sampled: tuple[Any, ...]
    """The sizes that the window sees."""
    itemsize: int
    learning: bool
    """True where the stride gets a gradient."""
    weight_learning: bool
    """True where the convolution's weight gets one."""
    symbols: tuple[Any, ...]
    """The sizes of the output."""
    sizes: tuple[int, ...]
    """Their values in the trace."""


def records_of(
    model: nn.Module,
    example: ExampleInputs,
    *,
    strides: Strides = raw_strides_of,
    training: bool = False,
    symbolic_inputs: bool = False,
) -> tuple[list[Record], Session]:
    """Run the model with symbols for the sizes that its learnable layers give at these strides."""
    records: list[Record] = []
    raw = {module: strides(module) for module in model.modules() if isinstance(module, LearnableStrides)}

    def forwards(session: Session, name: str, module: nn.Module) -> tracing.Forward | None:
        if isinstance(module, LearnableStrides):
            return _recording_stand_in(session, module, records)
        return stand_in_for_fixed(module)

    with pinned(raw):
        session = tracing.run(model, example, forwards, training=training, symbolic_inputs=symbolic_inputs)
    return records, session


def _recording_stand_in(session: Session, layer: LearnableStrides, records: list[Record]) -> tracing.Forward:
    """Return a forward in place of a layer's: its output has symbols for sizes, and it saves what the layer saves."""

    def forward(x: Tensor) -> Tensor:
        channels = x.shape[-layer.ndim - 1]
        if isinstance(layer, DiffStrideConvNd):
            x, channels = as_autocast(x), layer.out_channels
        *leading, in_channels = tracing.shape(x)[: -layer.ndim]  # type: ignore[index]
        spatial = tracing.shape(x)[-layer.ndim :]  # type: ignore[index]
        current = layer.output_size([session.value(n) for n in spatial])
        sizes = [session.size((len(records), i), n) for i, n in enumerate(current)]
        learning = torch.is_grad_enabled() and layer.learns_strides
        weight_learning = isinstance(layer, DiffStrideConvNd) and layer.weight.requires_grad
        # A convolution that comes first saves the input itself.
        fused = layer.schedule([session.value(n) for n in spatial], current).fused_axes
        keeps = learning if fused or not isinstance(layer, DiffStrideConvNd) else weight_learning
        records.append(
            Record(
                layer=layer,
                batch=math.prod(leading, start=tracing.expression(1)),
                channels=int(in_channels),
                spatial=spatial,
                sampled=tuple(map(session.expanded, layer.window_size(spatial))),
                itemsize=x.itemsize,
                learning=learning,
                weight_learning=weight_learning,
                symbols=tuple(map(tracing.expression, sizes)),
                sizes=current,
            )
        )
        shape = [*x.shape[: x.ndim - layer.ndim - 1], channels, *sizes]
        output: Tensor = _SaveInput.apply(x, shape, keeps, *layer.parameters())  # type: ignore[no-untyped-call]
        return output

    return forward


def stand_in_for_fixed(module: nn.Module) -> tracing.Forward | None:
    """Return a forward in place of that of a layer of ours that learns nothing, since none can work with symbols."""
    if isinstance(module, ResizeTo):
        return lambda x: _empty(x, module.target(x.shape[-module.ndim :]))
    if isinstance(module, SpectralPoolNd):
        return lambda x: _empty(x, functional.pooled_sizes(x.shape[-module.ndim :], module.strides))
    return None


def stand_in_at_current_strides(session: Session, module: LearnableStrides) -> tracing.Forward:
    """Return a forward in place of a learnable layer's: its sizes follow from the values of the input's."""
    channels = module.out_channels if isinstance(module, DiffStrideConvNd) else None
    return lambda x: _empty(
        x, module.output_size([session.value(tracing.expression(n)) for n in x.shape[-module.ndim :]]), channels
    )


def _empty(x: Tensor, sizes: Any, channels: int | None = None) -> Tensor:
    *leading, in_channels = x.shape[: -len(sizes)]
    made: Tensor = _SaveInput.apply(x, [*leading, channels or in_channels, *sizes], False)  # type: ignore[no-untyped-call]
    return made


class _SaveInput(torch.autograd.Function):
    """A function that saves its input as a learnable layer does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Sequence[Any], keeps: bool, *parameters: Tensor) -> Tensor:
        if keeps:
            ctx.save_for_backward(x)
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError
