"""The cost of a model as a program: from strides to sizes, call by call, and from sizes to operations or bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffstride import functional, tracing
from diffstride.cost.stand_ins import Record, Strides, raw_strides_of, records_of, stand_in_for_fixed
from diffstride.nn._fused import as_autocast, convolver, dense_macs
from diffstride.nn.attach import attached
from diffstride.nn.conv import DiffStrideConvNd
from diffstride.nn.diffstride import DiffStrideNd
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.resize import ResizeTo
from diffstride.nn.spectral import SpectralPoolNd
from diffstride.tracing import ExampleInputs, Session

Measure = Literal["macs", "memory"]
MEASURES = ("macs", "memory")
# Strides larger than any bound.
_ENORMOUS = 1e30


class Neighbour(NamedTuple):
    """A stride at which one size is a sample smaller or larger, and the exact cost there."""

    stride_id: int
    entry: int
    stride: float
    cost: int


class Entry(NamedTuple):
    """An entry of a stride that can learn, and the axis of the layer that it concerns first."""

    layer: LearnableStrides
    position: int
    axis: int
    n: int
    """The samples along the axis, with `size_offset`."""
    size: int
    """The present size of the output."""

    @property
    def margin(self) -> float:
        """The samples of the output beyond `N/S`."""
        return 2 * self.layer.smoothness if self.layer.window == "outer" else 0.0

    @property
    def next_sizes(self) -> tuple[int, int]:
        """The next smaller and the next larger size."""
        multiple = self.layer.size_multiple
        return multiple * math.ceil(self.size / multiple - 1), multiple * (self.size // multiple + 1)

    def moved(self, stride: float) -> tuple[float, ...]:
        """Return the raw strides of the layer, one per axis, with another one for the entry."""
        raw = raw_strides_of(self.layer)
        return tuple(stride if self.layer.shared or axis == self.axis else s for axis, s in enumerate(raw))


class _Sizes(NamedTuple):
    """The sizes in a call of a layer, exact or relaxed."""

    batch: Any
    spatial: Sequence[Any]
    new: Sequence[Any]


class Program:
    """The cost as expressions, compiled."""

    def __init__(
        self, model: nn.Module, example: ExampleInputs, measure: Measure, strides: Strides = raw_strides_of
    ) -> None:
        self.measure = measure
        self.records, session = records_of(model, example, strides=strides, training=measure == "memory")
        symbols, derived = [s for s in session.hints if s not in session.derived], session.derived
        self._spatial = []
        first = 0
        for record in self.records:
            self._spatial.append(tracing.evaluator([record.batch, *record.spatial], symbols[:first], derived))
            first += record.layer.ndim
        terms = session.storages if measure == "memory" else [work.macs for work in session.work]
        self._others = tracing.evaluator([sum(terms, tracing.expression(0))], symbols, derived)
        shapes = {n for call in session.calls for n in call.output or () if not n.is_Integer}
        self._shapes = tracing.evaluator(list(shapes), symbols, derived)
        self.by_module = partial(macs_at_present, model, session)
        self._resizes = [
            (layer, tracing.evaluator([*shape, *output], symbols, derived))
            for layer, shape, output in _resizes(model, session)
        ]
        asked = {relation.expression: relation.truth for relation in session.relations}
        self._answers = [bool(truth) if truth in (True, False) else int(truth) for truth in asked.values()]
        self._asked = tracing.evaluator(list(asked), symbols, derived)

    def count(self, strides: Strides) -> int:
        """Return the exact cost at these strides."""
        calls = list(self._exact(strides))
        own = sum(self._own(record, sizes, sizes, strides) for record, sizes in calls)
        outputs = _outputs(calls)
        total: float = self._others(*outputs)[0] + own + self._resized(outputs, outputs)
        return round(total)

    def entries(self) -> Iterator[Entry]:
        """Yield the entries of the strides that can learn, once each, in the order in which their layers run."""
        seen = set()
        for record, (_, spatial, new) in self._exact(raw_strides_of):
            layer = record.layer
            for axis, (n, size) in enumerate(zip(layer.window_size(spatial), new, strict=True)):
                position = 0 if layer.shared else axis
                fixed = layer.options.is_left(axis) or not layer.learns_strides
                if not fixed and (layer.stride_id, position) not in seen:
                    seen.add((layer.stride_id, position))
                    yield Entry(layer, position, axis, n + layer.size_offset[axis], size)

    def neighbours(self) -> Iterator[Neighbour]:
        """Yield the exact costs with one size, of one layer along one axis, a step smaller or larger.

        The step is a sample, or the layer's `size_multiple`. Sizes at which the model does not run are left out.
        """
        for entry in self.entries():
            multiple = entry.layer.size_multiple
            for step, size in zip((-1, 1), entry.next_sizes, strict=True):
                # Half-way between the strides at which the size changes. Outer sizes are rounded down, inner up.
                relaxed = size - entry.margin - multiple / 2 + (1 if entry.margin else 0)
                if relaxed > 0:
                    stride = entry.n / relaxed
                    strides = instead(entry.layer.stride_id, entry.moved(stride))
                    if step > 0 or self.runs(strides):  # larger maps run where the present ones do
                        yield Neighbour(entry.layer.stride_id, entry.position, stride, self.count(strides))

    def resampling_macs(self) -> int:
        """Return the multiply-accumulates of the resampling, where it is dense."""
        calls = list(self._exact(raw_strides_of))
        outputs = _outputs(calls)
        own = sum(_macs(record, sizes, sizes, raw_strides_of)[1] for record, sizes in calls)
        return int(own + self._resized(outputs, outputs))

    def _resized(self, outputs: Sequence[Any], whole: Sequence[int]) -> Any:
        """Return the multiply-accumulates of fixed resamplings, given the output sizes of all calls of layers."""
        if self.measure != "macs":
            return 0
        return sum(_fixed_resampling(layer, evaluate(*outputs), evaluate(*whole)) for layer, evaluate in self._resizes)

    def holds(self, strides: Strides) -> bool:
        """Return whether every question about sizes in the trace has the same answer at these strides."""
        return self._asked(*_outputs(self._exact(strides))) == self._answers

    def runs(self, strides: Strides) -> bool:
        """Return whether no map is empty at these strides."""
        values: list[int] = []
        try:
            for record, evaluate in zip(self.records, self._spatial, strict=True):
                spatial = evaluate(*values)[1:]
                if min(record.layer.window_size(spatial)) < 1:
                    return False
                values += record.layer.sizes_at(strides(record.layer), spatial)
            return min(self._shapes(*values), default=1) >= 1
        except ZeroDivisionError:  # a size that is divided by the size of an empty map
            return False

    def largest_strides(self) -> Strides:
        """Return the largest strides that bounds allow and that leave no map empty, layer by layer."""
        learned = [r.layer for r in self.records if r.layer.learns_strides]
        chosen: dict[int, list[float]] = {layer.stride_id: [1.0] * len(layer.stride) for layer in learned}

        def strides(layer: LearnableStrides) -> tuple[float, ...]:
            values = tuple(chosen.get(layer.stride_id, raw_strides_of(layer)))
            return values * layer.ndim if len(values) < layer.ndim else values

        for values in chosen.values():  # in the order of the calls
            for i in range(len(values)):
                values[i] = _ENORMOUS
                if self.runs(strides):
                    continue
                low, high = 0.0, math.log(1e6)
                for _ in range(40):
                    middle = (low + high) / 2
                    values[i] = math.exp(middle)
                    low, high = (middle, high) if self.runs(strides) else (low, middle)
                values[i] = math.exp(low)
        return strides

    def _exact(self, strides: Strides) -> Iterator[tuple[Record, _Sizes]]:
        """Yield the calls with their exact sizes at these strides."""
        values: list[int] = []
        for record, evaluate in zip(self.records, self._spatial, strict=True):
            batch, *spatial = evaluate(*values)
            new = record.layer.sizes_at(strides(record.layer), spatial)
            yield record, _Sizes(batch, spatial, new)
            values += new

    def gradient(self, strides: Mapping[int, Tensor], resampling: bool = True) -> Gradient:
        """Return the relaxed cost and its gradient with respect to the strides, in float64 on the host.

        Args:
            strides: the layers' strides by `stride_id`.
            resampling: count the multiply-accumulates of the resampling, too.
        """
        room = {i: torch.zeros(2, stride.numel(), dtype=torch.bool) for i, stride in strides.items()}
        learned = {record.layer.stride_id for record in self.records if record.layer.learns_strides}
        with torch.enable_grad():
            leaves = {i: stride.detach().to("cpu", torch.float64).requires_grad_() for i, stride in strides.items()}
            cost = self._relaxed(leaves, room, resampling)
            if cost.requires_grad:
                grads = torch.autograd.grad(cost, [*leaves.values()], allow_unused=True, materialize_grads=True)
            else:  # layers that never run
                grads = tuple(torch.zeros_like(leaf) for leaf in leaves.values())
        return Gradient(cost.item(), list(grads), [can_move & (i in learned) for i, can_move in room.items()])

    def _relaxed(self, strides: Mapping[int, Tensor], room: Mapping[int, Tensor], resampling: bool) -> Tensor:
        """Return the relaxed cost at strides by `stride_id`, and note in `room` which of them can move."""
        values: list[Any] = []
        own: Any = 0
        calls = list(self._exact(raw_strides_of))
        for (record, whole), evaluate in zip(calls, self._spatial, strict=True):
            layer = record.layer
            batch, *spatial = evaluate(*values)
            stride = strides[layer.stride_id].expand(layer.ndim)
            seen, whole_seen = layer.window_size(spatial), layer.window_size(whole.spatial)
            new = []
            for axis, more in enumerate(layer.size_offset):
                if layer.options.is_left(axis):
                    new.append(seen[axis] + more)
                    continue
                size, moves = _relaxed_size(layer, axis, seen[axis] + more, whole_seen[axis] + more, stride[axis])
                new.append(size)
                room[layer.stride_id][:, 0 if layer.shared else axis] |= moves
            sizes = _Sizes(batch, spatial, new)
            own = own + (self._own(record, sizes, whole) if resampling else _macs(record, sizes, whole)[0])
            values += new
        if resampling:
            own = own + self._resized(values, _outputs(calls))
        return torch.as_tensor(self._others(*values)[0] + own, dtype=torch.float64)

    def _own(self, record: Record, sizes: _Sizes, whole: _Sizes, strides: Strides = raw_strides_of) -> Any:
        """Return the cost of a layer itself; the whole sizes decide in which order it works."""
        if self.measure == "macs":
            return sum(_macs(record, sizes, whole, strides))
        schedule = record.layer.schedule(whole.spatial, whole.new)
        device = record.layer.stride.device
        elements = schedule.saved_elements(
            record.channels,
            sizes.spatial,
            sizes.new,
            strides(record.layer),
            learning=record.learning,
            weight_learning=record.weight_learning and not record.layer.recompute,
            small=schedule.are_small(whole.batch, record.channels, whole.spatial, whole.new, device),
        )
        return sizes.batch * record.itemsize * elements


def _macs(record: Record, sizes: _Sizes, whole: _Sizes, strides: Strides = raw_strides_of) -> tuple[Any, Any]:
    """Return the multiply-accumulates of a layer's convolution and of its resampling."""
    schedule = record.layer.schedule(whole.spatial, whole.new)
    resampling = schedule.resampling_macs(record.channels, sizes.spatial, sizes.new, strides(record.layer))
    return sizes.batch * schedule.macs(sizes.spatial, sizes.new), sizes.batch * resampling


def _resizes(model: nn.Module, session: Session) -> Iterator[tuple[ResizeTo | SpectralPoolNd, Any, Any]]:
    """Yield the calls of layers that resample and learn nothing, with the shapes of their inputs and outputs."""
    modules = dict(model.named_modules())
    for call in session.calls:
        layer = modules[call.module]
        if isinstance(layer, (ResizeTo, SpectralPoolNd)) and call.input and call.output:
            yield layer, call.input, call.output


def _fixed_resampling(layer: ResizeTo | SpectralPoolNd, shapes: Sequence[Any], whole: Sequence[int]) -> Any:
    """Return the multiply-accumulates of a call, given the shapes of its input and output in one row."""
    both, ndim = len(shapes) // 2, layer.ndim
    axes = functional.resize_axes(whole[both - ndim : both], whole[-ndim:], layer.basis, layer.norm)
    samples, new = shapes[both - ndim : both], shapes[-ndim:]
    return math.prod(shapes[: both - ndim]) * dense_macs(
        axes, getattr(layer, "backend", "auto"), samples, new, [None] * ndim
    )


def macs_at_present(model: nn.Module, session: Session) -> dict[str, int]:
    """Return the multiply-accumulates by module of a trace in which the layers have their present sizes."""
    macs: dict[str, int] = defaultdict(int)
    for work in session.work:
        macs[work.module] += session.value(work.macs)
    modules = dict(model.named_modules())
    for call in session.calls:
        layer = modules[call.module]
        if not call.input or not call.output:
            continue
        shape, output = [*map(session.value, call.input)], [*map(session.value, call.output)]
        if isinstance(layer, LearnableStrides):
            *leading, channels = shape[: -layer.ndim]
            spatial, new = shape[-layer.ndim :], output[-layer.ndim :]
            schedule = layer.schedule(spatial, new)
            own = schedule.macs(spatial, new) + schedule.resampling_macs(channels, spatial, new, raw_strides_of(layer))
            macs[call.module] += math.prod(leading) * own
        elif isinstance(layer, (ResizeTo, SpectralPoolNd)):
            macs[call.module] += _fixed_resampling(layer, shape + output, shape + output)
    return macs


def _outputs(calls: Iterable[tuple[Record, _Sizes]]) -> list[Any]:
    """Return the output sizes of all calls."""
    return [n for _, sizes in calls for n in sizes.new]


def instead(stride_id: int, strides: tuple[float, ...]) -> Strides:
    """Return a function that gives layers of this `stride_id` other strides than those in use."""
    return lambda layer: strides if layer.stride_id == stride_id else raw_strides_of(layer)


def _relaxed_size(layer: LearnableStrides, axis: int, n: Any, whole: int, stride: Tensor) -> tuple[Tensor, Tensor]:
    """Return `min(N, N/S + 2R)` (outer window) or `N/S` (inner), and whether it can fall and whether it can rise.

    At a bound the value does not move, but it has the gradient that it would have without bounds.

    Args:
        layer: the layer.
        axis: the axis.
        n: the relaxed number of samples.
        whole: their exact number.
        stride: the raw stride.
    """
    options = layer.options
    lower, upper = options.stride_range(axis, whole)
    raw = stride.item()
    stride = stride + (min(max(raw, lower), upper) - raw)
    margin = 2 * options.smoothness if options.window == "outer" else 0.0
    size: Tensor = n / stride + margin
    samples = n.detach() if isinstance(n, Tensor) else n
    saturated = size.item() >= samples
    if saturated:
        pushed = samples / stride
        size = n + (pushed - pushed.detach())
    return size, torch.tensor([raw < upper, raw > lower and not saturated])


class Gradient(NamedTuple):
    """The relaxed cost and its gradient."""

    value: float
    grads: list[Tensor]
    """The gradient by parameter, as if there were no bounds."""
    room: list[Tensor]
    """By parameter `[2, entries]`: a larger stride can lower the cost, a smaller stride can raise it."""


class OnHost(torch.autograd.Function):
    """A value with given gradients with respect to strides, without the parts that point out of the bounds."""

    @staticmethod
    def forward(ctx: Any, value: float, grads: Sequence[Tensor], room: Sequence[Tensor], *strides: Tensor) -> Tensor:
        ctx.grads, ctx.room = grads, room
        return strides[0].new_tensor(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (grad,) = upstream
        found = []
        for known, (larger, smaller) in zip(ctx.grads, ctx.room, strict=True):
            g = known.to(grad) * grad
            # A descent step moves against the gradient: a negative one lets the stride grow.
            g = g.masked_fill((g < 0) & ~larger.to(g.device), 0)
            found.append(g.masked_fill((g > 0) & ~smaller.to(g.device), 0))
        return None, None, None, *found


def of_strided_model(model: nn.Module, example: ExampleInputs, measure: Measure) -> int:
    """Return the cost of the model with strided layers in place of learnable ones."""

    def forwards(session: Session, name: str, module: nn.Module) -> tracing.Forward | None:
        for placement in ("before", "after"):
            layer = attached(module, placement)
            if isinstance(layer, DiffStrideNd) and not isinstance(module, nn.Sequential):  # whose children run below
                if max(layer.initial_strides) > 1:  # else it was inserted, and the module has its own stride
                    strides: Any = zip(layer.initial_strides, module.stride, strict=True)  # type: ignore[arg-type]
                    module.stride = tuple(math.ceil(s) * own for s, own in strides)  # type: ignore[assignment]
                vars(layer)["forward"] = lambda x: x
        if isinstance(module, DiffStrideConvNd):
            return _strided(module)
        if isinstance(module, DiffStrideNd) and "forward" not in vars(module):
            return lambda x: x.new_empty([*x.shape[: -module.ndim], *_nominal(module, x.shape[-module.ndim :])])
        return stand_in_for_fixed(module)

    session = tracing.run(model, example, forwards, training=measure == "memory")
    if measure == "memory":
        return int(sum(session.storages))
    resampling = 0
    for layer, shape, output in _resizes(model, session):
        if isinstance(layer, SpectralPoolNd):  # the others came with the conversion
            sizes = [*map(session.value, [*shape, *output])]
            resampling += _fixed_resampling(layer, sizes, sizes)
    return int(sum(work.macs for work in session.work)) + resampling


def _nominal(layer: LearnableStrides, seen: Sequence[int]) -> list[int]:
    """Return the sizes of a strided layer's map, which has every S-th sample."""
    return [
        math.ceil((n + more) / s - 1e-5)
        for n, more, s in zip(seen, layer.size_offset, layer.initial_strides, strict=True)
    ]


def _strided(layer: DiffStrideConvNd) -> tracing.Forward:
    """Return a forward with integer strides, or for a fractional one, on as much of the input as gives the same map."""

    def forward(x: Tensor) -> Tensor:
        x, convolution = as_autocast(x), layer.convolution
        strides: tuple[int, ...] = (1,) * layer.ndim
        if all(s == int(s) for s in layer.initial_strides):
            strides = tuple(map(int, layer.initial_strides))
        else:
            new = _nominal(layer, convolution.full_sizes(x.shape[-layer.ndim :]))
            none = tuple((0, 0) for _ in strides)
            needed = [n + d * (k - 1) for n, k, d in zip(new, convolution.kernel, convolution.dilation, strict=True)]
            x, convolution = x.new_empty([*x.shape[: -layer.ndim], *needed]), convolution._replace(padding=none)
        return convolver(convolution._replace(stride=strides))(x, layer.weight, layer.bias)

    return forward
