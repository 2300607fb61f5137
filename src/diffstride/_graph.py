"""Resampling as one operator in the graphs of `torch.compile`, at sizes that a graph takes as ints.

The operator is opaque to the compiler, which has no code for complex numbers. Inside, it does what eager mode does, so
that one graph serves all strides. Its arguments are numbers and text, since compiled graphs are kept on disks.

The size of a layer's output follows from its stride, whose value a graph cannot read. So each call of a layer in a
graph gets a `Slot`: a tensor without data, an attribute of the layer, whose shape is the size of the output. A graph
sees the sizes of such a tensor as symbols. `refresh` computes the sizes again after every step of an optimizer. It
needs the size of the layer's input for that: the compiler's own expression of it, in the symbols of earlier slots.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from diffstride.backends import Kind, Resampling, is_channels_last
from diffstride.geometry import Axis, Taps, gain
from diffstride.options import LayerOptions

if TYPE_CHECKING:
    from diffstride.nn.learnable import LearnableStrides


def resample(
    x: Tensor,
    axes: Sequence[tuple[Any, Any, tuple[int, int, int] | None] | None],
    options: str,
    strides: Tensor | None = None,
    *,
    scaled: bool = False,
) -> Tensor:
    """Resample the last axes of `x` in a graph, differentiably in `x` and `strides`.

    Args:
        x: a tensor whose dtype and memory format the result has.
        axes: for each axis the size that the window sees, the new size, and kernel, dilation and padding of a
            convolution before it, if there is one; None leaves an axis as it is.
        options: `LayerOptions.as_text`, or a part of it.
        strides: raw strides, one per axis or one for all; None for operators without a window.
        scaled: leave a float16 result scaled by the factors of `headroom`.
    """
    if all(axis is None for axis in axes):
        return x
    numbers: list[Any] = []
    for axis in axes:
        window, size, taps = axis or (0, _LEFT, None)
        numbers += [window, size, *(taps or (0, 0, 0))]
    y: Tensor = torch.ops.diffstride.resample(x, strides, numbers, options, scaled)
    return y


_NUMBERS = 5  # by axis: the size that the window sees, the new size, and kernel (0: none), dilation and padding
_LEFT = -1  # the new size of an axis that is left as it is


@lru_cache(maxsize=256)
def _resampling(
    kind: Kind, spatial: Sequence[int], numbers: Sequence[int], text: str, fixed: bool, scaled: bool
) -> Resampling:
    options = LayerOptions.from_text(text)
    axes: list[Axis | None] = []
    for i, samples in enumerate(spatial):
        n, new, kernel, dilation, left = numbers[_NUMBERS * i : _NUMBERS * (i + 1)]
        if new == _LEFT:
            axes.append(None)
        elif fixed:
            axes.append(Axis(n, new, options.basis, gain(n, new, options.norm)))
        else:
            axes.append(options.axis(i, n, new, Taps(kernel, dilation, left, samples) if kernel else None))
    return Resampling(kind, axes, options.backend, scaled=scaled)


def _prepared(
    kind: Kind, spatial: Sequence[int], strides: Tensor | None, numbers: Sequence[int], options: str, scaled: bool
) -> tuple[Resampling, Any]:
    resampling = _resampling(kind, tuple(spatial), tuple(numbers), options, strides is None, scaled)
    host_strides = None if strides is None else strides.tolist() * (len(spatial) if len(strides) == 1 else 1)
    return resampling, resampling.operators(host_strides)


@torch.library.custom_op("diffstride::resample", mutates_args=())
def _resample(x: Tensor, strides: Tensor | None, numbers: Sequence[int], options: str, scaled: bool) -> Tensor:
    spatial = x.shape[x.ndim - len(numbers) // _NUMBERS :]
    resampling, operators = _prepared(Kind.of(x), spatial, strides, numbers, options, scaled)
    with torch.no_grad():
        return resampling(x, strides, operators)


@_resample.register_fake
def _(x: Tensor, strides: Any, numbers: Any, options: str, scaled: bool) -> Tensor:
    shape = list(x.shape)
    first = x.ndim - len(numbers) // _NUMBERS
    for i, (size, kernel) in enumerate(zip(numbers[1::_NUMBERS], numbers[2::_NUMBERS], strict=True), start=first):
        if not (isinstance(size, int) and size == _LEFT):
            shape[i] = size * (kernel or 1)  # under a fused convolution every tap has samples of its own
    return _empty(shape, x, is_channels_last(x))


def _empty(shape: Sequence[int], like: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(shape)
    batch, channels, *spatial = shape
    return like.new_empty([batch, *spatial, channels]).movedim(-1, 1)


@torch.library.custom_op("diffstride::resample_backward", mutates_args=())
def _resample_backward(
    grad: Tensor,
    x: Tensor | None,
    strides: Tensor | None,
    spatial: Sequence[int],
    channels_last: bool,
    needs_x: bool,
    numbers: Sequence[int],
    options: str,
    scaled: bool,
) -> tuple[Tensor, Tensor]:
    kind = Kind.of(grad)._replace(channels_last=channels_last)
    resampling, operators = _prepared(kind, spatial, strides, numbers, options, scaled)
    with torch.no_grad():
        found = resampling.backward(grad, x, strides, operators, needs_x)
    of_x, of_strides = [grad.new_empty(0) if gradient is None else gradient for gradient in found]
    return of_x.clone() if of_x is grad else of_x, of_strides


@_resample_backward.register_fake
def _(
    grad: Tensor, x: Any, strides: Any, spatial: Any, channels_last: bool, needs_x: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    shape = [*grad.shape[: grad.ndim - len(spatial)], *spatial]
    of_x = _empty(shape, grad, channels_last) if needs_x else grad.new_empty(0)
    return of_x, grad.new_empty(0) if x is None else torch.empty_like(strides)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, strides, *ctx.arguments = inputs
    learning = strides is not None and ctx.needs_input_grad[1]
    ctx.spatial = x.shape[x.ndim - len(ctx.arguments[0]) // _NUMBERS :]
    ctx.channels_last = is_channels_last(x)
    ctx.save_for_backward(x if learning else None, strides)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, strides = ctx.saved_tensors
    of_x, of_strides = torch.ops.diffstride.resample_backward(
        grad, x, strides, ctx.spatial, ctx.channels_last, ctx.needs_input_grad[0], *ctx.arguments
    )
    return of_x if ctx.needs_input_grad[0] else None, None if x is None else of_strides, *[None] * len(ctx.arguments)


_resample.register_autograd(_backward, setup_context=_save)


class Slot:
    """The size of a layer's output in one graph."""

    def __init__(self, layer: LearnableStrides, scaled: bool) -> None:
        self.layer, self.scaled = weakref.ref(layer), scaled
        self.number = next(_numbers)
        self.graph: _Graph | None = None
        self.inputs: tuple[Any, ...] = ()
        """The compiler's expressions for the sizes of the input."""
        self.symbols: tuple[Any, ...] = ()
        """Its symbols for those of the output."""
        self.first_size: list[int] = []
        """The sizes of the input with which the graph is made."""
        self.holder = torch.empty(1)
        """A tensor of the sizes of the output."""
        _slots[self.number] = self

    def note_input(self, x: Tensor, ndim: int) -> None:
        """Keep how the sizes of the input follow from those of earlier slots, while a graph is made."""
        environment = x.fake_mode.shape_env  # type: ignore[attr-defined]
        self.graph = _graphs.setdefault(environment, _Graph())
        known = {symbol for slot in self.graph.slots for symbol in slot.symbols}
        spatial: tuple[Any, ...] = x.shape[x.ndim - ndim :]
        # Other symbols, as of images of any size, have values that only the call knows: the graph is for one of them.
        self.inputs = tuple(
            n.node.expr if isinstance(n, torch.SymInt) and n.node.expr.free_symbols <= known else int(n)
            for n in spatial
        )
        self.first_size = [n.node.hint if isinstance(n, torch.SymInt) else n for n in spatial]

    def note_output(self, sizes: Sequence[Any]) -> None:
        """Keep the symbols of the sizes of the output."""
        if self.graph is not None and not self.symbols:
            self.symbols = tuple(n.node.expr if isinstance(n, torch.SymInt) else n for n in sizes)
            self.graph.slots.append(self)

    def settle(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Compute the sizes of the output for an input of sizes `spatial`."""
        layer = self.layer()
        assert layer is not None
        sizes = layer.sizes_at(layer._raw_strides(self.scaled), spatial)
        if sizes != tuple(self.holder.shape):
            self.holder = torch.empty(1, device="cpu").expand(sizes)
            for i in range(len(sizes)):
                torch._dynamo.maybe_mark_dynamic(self.holder, i)
        return sizes


class _Graph:
    """The slots of one graph, in the order of its calls."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []

    def refresh(self) -> None:
        self.slots = [slot for slot in self.slots if slot.layer() is not None]
        values: dict[Any, int] = {}
        for slot in self.slots:
            spatial = [n if isinstance(n, int) else int(n.xreplace(values)) for n in slot.inputs]
            values.update(zip(slot.symbols, slot.settle(spatial), strict=True))


_numbers = itertools.count()
_slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()
_graphs: weakref.WeakKeyDictionary[Any, _Graph] = weakref.WeakKeyDictionary()


def layers() -> list[LearnableStrides]:
    """Return the layers that are part of a graph."""
    found = {id(layer): layer for slot in list(_slots.values()) if (layer := slot.layer()) is not None}
    return list(found.values())


def refresh(changed: Collection[LearnableStrides]) -> None:
    """Compute the sizes in the graphs of these layers from the present strides."""
    graphs = {id(slot.graph): slot.graph for slot in list(_slots.values()) if slot.layer() in changed}
    for graph in graphs.values():
        if graph is not None:
            _refresh_eagerly()(graph)


@lru_cache(maxsize=1)  # the compiler is loaded by now
def _refresh_eagerly() -> Callable[[_Graph], None]:
    return torch.compiler.disable(_Graph.refresh)  # type: ignore[no-untyped-call, no-any-return]


@lru_cache(maxsize=1)  # once per process, and not on import
def refresh_after_steps() -> None:
    """Refresh the sizes in graphs after each step of an optimizer that has a parameter of one of their layers."""
    register_optimizer_step_post_hook(_refresh)


def _refresh(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    written = {id(p) for group in optimizer.param_groups for p in group["params"]}
    refresh([layer for layer in layers() if any(id(p) in written for p in layer.parameters())])


@torch.library.custom_op("diffstride::note_sizes", mutates_args=())
def _note_sizes(x: Tensor, ndim: int, sizes: Sequence[int], slot: int) -> Tensor:
    return x.new_empty(0)


@_note_sizes.register_fake
def _(x: Tensor, ndim: int, sizes: Any, slot: int) -> Tensor:
    """Note sizes while a graph is made. Nothing uses the result, so that compilers leave the operator out."""
    if slot in _slots and sizes:
        _slots[slot].note_output(sizes)
    elif slot in _slots:
        _slots[slot].note_input(x, ndim)
    return x.new_empty(0)
