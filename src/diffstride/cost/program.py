"""The cost of a model as a program: from strides to sizes, call by call, and from sizes to multiplications or bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffstride import functional, tracing
from diffstride.backends import DENSE_UP_TO
from diffstride.backends.resample import KEEP_RAMPS_UP_TO
from diffstride.geometry import stride_range
from diffstride.nn.attach import attached
from diffstride.nn.conv import DiffStrideConvNd
from diffstride.nn.diffstride import DiffStrideNd
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.resize import ResizeTo
from diffstride.nn.spectral import SpectralPoolNd
from diffstride.tracing import ExampleInputs, Session

Measure = Literal["macs", "memory"]
MEASURES = ("macs", "memory")
Strides = Callable[[LearnableStrides], tuple[float, ...]]
"""From a layer to its strides."""
# Strides larger than any bound.
_ENORMOUS = 1e30


def in_use(layer: LearnableStrides) -> tuple[float, ...]:
    """The strides of a layer as they are."""
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
    """What the window sees."""
    itemsize: int
    learning: bool
    """Whether the stride gets a gradient."""
    weight_learning: bool
    """Whether the convolution's weight does."""
    symbols: tuple[Any, ...]
    """The sizes of the output."""
    sizes: tuple[int, ...]
    """Their values in the trace."""


def records_of(
    model: nn.Module,
    example: ExampleInputs,
    *,
    strides: Strides = in_use,
    training: bool = False,
    symbolic_inputs: bool = False,
) -> tuple[list[Record], Session]:
    """Run the model with symbols for the sizes that its learnable layers give at these strides."""
    records: list[Record] = []
    raw = {module: strides(module) for module in model.modules() if isinstance(module, LearnableStrides)}

    def forwards(session: Session, name: str, module: nn.Module) -> tracing.Forward | None:
        if isinstance(module, LearnableStrides):
            return _stand_in(session, module, records)
        return fixed(module)

    with pinned(raw):
        session = tracing.run(model, example, forwards, training=training, symbolic_inputs=symbolic_inputs)
    return records, session


def _stand_in(session: Session, layer: LearnableStrides, records: list[Record]) -> tracing.Forward:
    """In place of a layer's forward: an output whose sizes are symbols, and what the layer saves for backward."""

    def forward(x: Tensor) -> Tensor:
        channels = x.shape[-layer.ndim - 1]
        if isinstance(layer, DiffStrideConvNd):
            x, channels = functional.as_autocast(x), layer.out_channels
        *leading, in_channels = tracing.shape(x)[: -layer.ndim]  # type: ignore[index]
        spatial = tracing.shape(x)[-layer.ndim :]  # type: ignore[index]
        current = layer.output_size([session.value(n) for n in spatial])
        sizes = [session.size((len(records), i), n) for i, n in enumerate(current)]
        learning = torch.is_grad_enabled() and layer.learns_strides
        weight_learning = isinstance(layer, DiffStrideConvNd) and layer.weight.requires_grad
        # Where the convolution comes first, it is the one to save the input.
        resampled_first = fused_axes(layer, [session.value(n) for n in spatial], current) > 0
        keeps = learning if resampled_first or not isinstance(layer, DiffStrideConvNd) else weight_learning
        records.append(
            Record(
                layer,
                math.prod(leading, start=tracing.expression(1)),
                int(in_channels),
                spatial,
                tuple(map(session.expanded, sampled(layer, spatial))),
                x.itemsize,
                learning,
                weight_learning,
                tuple(map(tracing.expression, sizes)),
                current,
            )
        )
        shape = [*x.shape[: x.ndim - layer.ndim - 1], channels, *sizes]
        output: Tensor = _StandIn.apply(x, shape, keeps, *layer.parameters())  # type: ignore[no-untyped-call]
        return output

    return forward


class Neighbour(NamedTuple):
    """A stride at which one size is another, and the exact cost there."""

    stride_id: int
    entry: int
    stride: float
    cost: int


class Program:
    """The cost as expressions, compiled."""

    def __init__(self, model: nn.Module, example: ExampleInputs, measure: Measure, strides: Strides = in_use) -> None:
        self.measure = measure
        self._names = {module: name for name, module in model.named_modules()}
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
        self._by_module = by_module(session)
        modules = {name: module for module, name in self._names.items()}
        self._resizes = [
            (modules[call.module].ndim, tracing.evaluator([*call.input, *call.output], symbols, derived))
            for call in session.calls
            if isinstance(modules[call.module], (ResizeTo, SpectralPoolNd)) and call.input and call.output
        ]
        asked = {relation.expression: relation.truth for relation in session.relations}
        self._answers = [bool(truth) if truth in (True, False) else int(truth) for truth in asked.values()]
        self._asked = tracing.evaluator(list(asked), symbols, derived)

    def count(self, strides: Any) -> int:
        """The exact cost, with `strides` a function from a layer to its strides."""
        sizes = list(self._whole(strides))
        own = sum(
            self._own(record, batch, spatial, new, spatial, new, strides)
            for record, (batch, spatial, new) in zip(self.records, sizes, strict=True)
        )
        total: float = self._others(*(n for _, _, new in sizes for n in new))[0] + own
        return round(total)

    def neighbours(self) -> Iterator[Neighbour]:
        """What the cost would be with one size, of one layer along one axis, a sample smaller or larger."""
        seen = set()
        for record, (_, spatial, new) in zip(self.records, self._whole(in_use), strict=True):
            layer, margin = record.layer, 2 * record.layer.smoothness if record.layer.window == "outer" else 0.0
            for axis, (n, size) in enumerate(zip(sampled(layer, spatial), new, strict=True)):
                entry = 0 if layer.shared else axis
                if (layer.stride_id, entry) in seen or not layer.learns_strides:
                    continue
                seen.add((layer.stride_id, entry))
                for step in (-1, 1):
                    # Half-way between the strides at which the size changes: one is rounded down, the other up.
                    relaxed = size + step - margin + (0.5 if margin else -0.5)
                    if relaxed > 0:
                        stride = (n + layer.size_offset[axis]) / relaxed
                        moved = [stride if i == axis or layer.shared else s for i, s in enumerate(in_use(layer))]
                        cost = self.count(_instead(layer.stride_id, moved))
                        yield Neighbour(layer.stride_id, entry, stride, cost)

    def by_module(self) -> dict[str, int]:
        """Multiply-accumulates by module, at the sizes of the trace."""
        macs = dict(self._by_module)
        for record, (batch, spatial, new) in zip(self.records, self._whole(in_use), strict=True):
            name = self._names[record.layer]
            macs[name] = macs.get(name, 0) + self._own(record, batch, spatial, new, spatial, new)
        return macs

    def resampling_macs(self) -> int:
        """Multiply-accumulates of the resampling itself, where it is dense."""
        sizes = list(self._whole(in_use))
        total = sum(
            batch * stage.macs()
            for record, (batch, spatial, new) in zip(self.records, sizes, strict=True)
            for stage in self._resamplings(record, fused_axes(record.layer, spatial, new), spatial, new, spatial, new)
        )
        for ndim, evaluate in self._resizes:
            shapes = evaluate(*(n for _, _, new in sizes for n in new))
            size, output = shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :]
            for i in range(len(size) - ndim, len(size)):
                length, size[i] = size[i], output[i]
                if max(length, size[i]) <= DENSE_UP_TO[torch.float32]:
                    total += math.prod(size) * length
        return total

    def holds(self, strides: Any) -> bool:
        """Whether all that was asked about sizes in the trace has the same answer at these strides."""
        values = [n for _, _, new in self._whole(strides) for n in new]
        return self._asked(*values) == self._answers

    def runs(self, strides: Strides) -> bool:
        """Whether no map is empty at these strides, where a convolution without padding comes after, say."""
        values: list[int] = []
        for record, evaluate in zip(self.records, self._spatial, strict=True):
            spatial = evaluate(*values)[1:]
            if min(sampled(record.layer, spatial)) < 1:
                return False
            values += _new_sizes(record.layer, spatial, strides(record.layer))
        return min(self._shapes(*values), default=1) >= 1

    def largest_strides(self) -> Strides:
        """The largest that bounds and maps allow, of every layer such that the rest still runs."""
        learned = [r.layer for r in self.records if r.layer.learns_strides]
        chosen: dict[int, list[float]] = {layer.stride_id: [1.0] * len(layer.stride) for layer in learned}

        def strides(layer: LearnableStrides) -> tuple[float, ...]:
            values = tuple(chosen.get(layer.stride_id, in_use(layer)))
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

    def _whole(self, strides: Any) -> Iterator[tuple[int, list[int], tuple[int, ...]]]:
        """Batch, sizes of the input and sizes of the output of each record."""
        values: list[int] = []
        for record, evaluate in zip(self.records, self._spatial, strict=True):
            batch, *spatial = evaluate(*values)
            new = _new_sizes(record.layer, spatial, strides(record.layer))
            yield batch, spatial, new
            values += new

    def gradient(self, strides: Mapping[int, Tensor]) -> Gradient:
        """Return the relaxed cost and its gradient with respect to the strides, in float64 on the host.

        Args:
            strides: the layers' strides by `stride_id`.
        """
        room = {i: torch.zeros(2, stride.numel(), dtype=torch.bool) for i, stride in strides.items()}
        learned = {record.layer.stride_id for record in self.records if record.layer.learns_strides}
        with torch.enable_grad():
            leaves = {i: stride.detach().to("cpu", torch.float64).requires_grad_() for i, stride in strides.items()}
            cost = self._relaxed(leaves, room)
            if cost.requires_grad:
                grads = torch.autograd.grad(cost, [*leaves.values()], allow_unused=True, materialize_grads=True)
            else:  # layers that never run
                grads = tuple(torch.zeros_like(leaf) for leaf in leaves.values())
        return Gradient(cost.item(), list(grads), [can_move & (i in learned) for i, can_move in room.items()])

    def _relaxed(self, strides: Mapping[int, Tensor], room: Mapping[int, Tensor]) -> Tensor:
        """Return the relaxed cost; `strides` are by `stride_id`, in float64, and so is `room`."""
        values: list[Any] = []
        exact: list[int] = []
        own: Any = 0
        for record, evaluate in zip(self.records, self._spatial, strict=True):
            layer = record.layer
            (batch, *spatial), (_, *whole) = evaluate(*values), evaluate(*exact)
            new_whole = _new_sizes(layer, whole, in_use(layer))
            stride = strides[layer.stride_id].expand(layer.ndim)
            seen = zip(sampled(layer, spatial), sampled(layer, whole), stride.unbind(), layer.size_offset, strict=True)
            new = []
            for axis, (n, whole_n, s, more) in enumerate(seen):
                size, moves = _relaxed_size(layer, n + more, whole_n + more, s)
                new.append(size)
                room[layer.stride_id][:, 0 if layer.shared else axis] |= moves
            own = own + self._own(record, batch, spatial, new, whole, new_whole)
            values += new
            exact += new_whole
        return torch.as_tensor(self._others(*values)[0] + own, dtype=torch.float64)

    def _own(
        self,
        record: Record,
        batch: Any,
        spatial: Sequence[Any],
        new: Sequence[Any],
        whole: Sequence[int],
        new_whole: Sequence[int],
        strides: Strides = in_use,
    ) -> Any:
        """The cost of a layer itself; whole sizes decide in which order it works."""
        layer = record.layer
        fused = fused_axes(layer, whole, new_whole)
        if self.measure == "macs":
            if not isinstance(layer, DiffStrideConvNd):
                return 0
            return batch * functional.convolution_work(fused, _channels(layer), spatial, new, layer._convolution)[0]
        stages = self._resamplings(record, fused, spatial, new, whole, new_whole, strides)
        elements = sum(stage.input_elements + stage.kept_on_ramps() for stage in stages) if record.learning else 0
        if fused and record.weight_learning:  # the convolution saves what was resampled for it
            elements = elements + math.prod(stages[0].output) * record.channels
        return batch * record.itemsize * elements

    def _resamplings(
        self,
        record: Record,
        fused: int,
        spatial: Sequence[Any],
        new: Sequence[Any],
        whole: Sequence[int],
        new_whole: Sequence[int],
        strides: Strides = in_use,
    ) -> list[_Resampling]:
        """Those before and after the layer's convolution. The first one's input is the layer's, which others count."""
        layer, ndim = record.layer, record.layer.ndim
        used = strides(layer), new_whole
        kernel = layer.kernel_size if isinstance(layer, DiffStrideConvNd) else (1,) * ndim
        stages = []
        if fused:
            interleaved = [k * n for k, n in zip(kernel, new, strict=True)]
            output = [*interleaved[:fused], *spatial[fused:]]
            stages.append(_Resampling(layer, range(fused), True, record.channels, 0, output, whole, *used))
        if fused < ndim:
            channels, elements = record.channels, 0
            between = [*new[:fused], *sampled(layer, spatial)[fused:]]
            if isinstance(layer, DiffStrideConvNd):
                channels = layer.out_channels
                elements = channels * math.prod(between)
            whole_sampled = [*new_whole[:fused], *sampled(layer, whole)[fused:]]
            rest = range(fused, ndim)
            stages.append(_Resampling(layer, rest, False, channels, elements, list(new), whole_sampled, *used))
        return stages


class _Resampling(NamedTuple):
    """Some axes of a layer resampled together, which saves the input and, where they are few, what is on the ramps."""

    layer: LearnableStrides
    axes: range
    with_taps: bool
    channels: int
    input_elements: Any
    output: list[Any]
    """Sizes of the output, relaxed."""
    whole: Sequence[int]
    """Whole sizes of the input that the axes in question see."""
    strides: tuple[float, ...]
    new_whole: Sequence[int]

    def kept_on_ramps(self) -> Any:
        """How many coefficients are saved."""
        rows, shrink, share = {}, 1.0, 0.0
        for i in self.axes:
            rows[i], length, size = self._rows(i)
            shrink *= size / length
            share += rows[i] / size
        if shrink * share > KEEP_RAMPS_UP_TO:
            return 0
        return self.channels * sum(
            count * math.prod([size for j, size in enumerate(self.output) if j != i]) for i, count in rows.items()
        )

    def macs(self) -> int:
        """Multiply-accumulates of its dense products, one axis after the other."""
        size = list(self.whole)
        total = 0
        for i in self.axes:
            _, length, new = self._rows(i)
            size[i] = new
            if self.with_taps or max(length, new) <= DENSE_UP_TO[torch.float32] or self.layer.backend == "matmul":
                total += self.channels * math.prod(size) * length
        return total

    def _rows(self, i: int) -> tuple[int, int, int]:
        """Coefficients on the ramp of axis `i`, samples of its input and of its output."""
        layer, n, new = self.layer, self.whole[i], self.new_whole[i]
        kernel, outside, length = 1, 0, n
        if self.with_taps:
            assert isinstance(layer, DiffStrideConvNd)
            convolution = layer._convolution
            kernel, dilation, left = convolution.kernel[i], convolution.dilation[i], convolution.padding[i][0]
            n = convolution.sizes(self.whole)[i]
            seen = range(max(0, (kernel - 1) * dilation - left), min(length, n - left))
            outside = length - len(seen)  # samples that some tap does not see have coefficients of their own
        axis = layer._settings.axis(n, new)
        first, last = axis.ramp(axis.clamp(self.strides[i]))
        waves = 2 if axis.basis == "dft" else 1
        return waves * (last - first) + outside, length, kernel * new


def _instead(stride_id: int, strides: Sequence[float]) -> Any:
    """Return a function that gives layers of this `stride_id` other strides than those in use."""
    return lambda layer: strides if layer.stride_id == stride_id else in_use(layer)


def by_module(session: Session) -> dict[str, int]:
    """Multiply-accumulates of a trace by module, at its sizes."""
    macs: dict[str, int] = {}
    for work in session.work:
        macs[work.module] = macs.get(work.module, 0) + session.value(work.macs)
    return macs


def fused_axes(layer: LearnableStrides, spatial: Sequence[int], new_sizes: Sequence[int]) -> int:
    """How many axes are resampled before the layer's convolution."""
    if not isinstance(layer, DiffStrideConvNd):
        return 0
    order = functional.cheapest_order(_channels(layer), spatial, new_sizes, layer._convolution)
    return functional.fused_axes(order, layer.ndim)


def _channels(layer: DiffStrideConvNd) -> tuple[int, int]:
    return layer.out_channels, layer.in_channels // layer.groups


def sampled(layer: LearnableStrides, spatial: Sequence[Any]) -> Sequence[Any]:
    """The sizes that a layer's window sees."""
    return layer._convolution.unchecked_sizes(spatial) if isinstance(layer, DiffStrideConvNd) else spatial


def _new_sizes(layer: LearnableStrides, spatial: Sequence[int], strides: Sequence[float]) -> tuple[int, ...]:
    """The sizes that a layer would give at these strides."""
    seen = [n + more for n, more in zip(sampled(layer, spatial), layer.size_offset, strict=True)]
    return functional.output_sizes(seen, strides, layer._settings, owner=layer)


def _relaxed_size(layer: LearnableStrides, n: Any, whole: int, stride: Tensor) -> tuple[Tensor, Tensor]:
    """`min(N, N/S + 2R)` (outer) or `N/S` (inner) of `n` samples, of which there are `whole` in fact.

    At a bound the value does not move, but the gradient is as if it did. Whether it can fall and whether it can rise by
    another stride comes second.
    """
    settings = layer._settings
    lower, upper = stride_range(whole, settings.smoothness, settings.bounds, settings.window, settings.basis)
    raw = stride.item()
    stride = stride + (min(max(raw, lower), upper) - raw)
    margin = 2 * settings.smoothness if settings.window == "outer" else 0.0
    size: Tensor = n / stride + margin
    samples = n.detach() if isinstance(n, Tensor) else n
    saturated = size.item() >= samples
    if saturated:
        pushed = samples / stride
        size = n + (pushed - pushed.detach())
    return size, torch.tensor([raw < upper, raw > lower and not saturated])


def fixed(module: nn.Module) -> tracing.Forward | None:
    """In place of the forward of a layer of ours that learns nothing, since none can work with symbols."""
    if isinstance(module, ResizeTo):
        return lambda x: _empty(x, module.target(x.shape[-module.ndim :]))
    if isinstance(module, SpectralPoolNd):
        return lambda x: _empty(x, functional.pooled_sizes(x.shape[-module.ndim :], module.strides))
    return None


def unchanged(session: Session, module: LearnableStrides) -> tracing.Forward:
    """Return a stand-in for a learnable layer's forward: its sizes follow from the values of the input's."""
    channels = module.out_channels if isinstance(module, DiffStrideConvNd) else None
    return lambda x: _empty(
        x, module.output_size([session.value(tracing.expression(n)) for n in x.shape[-module.ndim :]]), channels
    )


def _empty(x: Tensor, sizes: Any, channels: int | None = None) -> Tensor:
    *leading, in_channels = x.shape[: -len(sizes)]
    made: Tensor = _StandIn.apply(x, [*leading, channels or in_channels, *sizes], False)  # type: ignore[no-untyped-call]
    return made


class _StandIn(torch.autograd.Function):
    """Saves the input as a learnable layer does; nothing is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Sequence[Any], keeps: bool, *parameters: Tensor) -> Tensor:
        if keeps:
            ctx.save_for_backward(x)
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


class Gradient(NamedTuple):
    """The relaxed cost and its gradient."""

    value: float
    grads: list[Tensor]
    """By parameter, as if there were no bounds."""
    room: list[Tensor]
    """By parameter `[2, entries]`: whether a larger stride can lower the cost, and a smaller one raise it."""


class OnHost(torch.autograd.Function):
    """A value whose gradients with respect to strides are known; what points out of their bounds is stopped."""

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
    """The cost of the model with strided layers in place of learnable ones."""

    def forwards(session: Session, name: str, module: nn.Module) -> tracing.Forward | None:
        layer = attached(module)
        if isinstance(layer, DiffStrideNd):
            module.stride = tuple(math.ceil(s) for s in layer.initial_strides)  # type: ignore[assignment]
            vars(layer)["forward"] = lambda x: x
        if isinstance(module, DiffStrideConvNd):
            return _strided(module)
        if isinstance(module, DiffStrideNd) and "forward" not in vars(module):
            return lambda x: x.new_empty([*x.shape[: -module.ndim], *_nominal(module, x.shape[-module.ndim :])])
        return fixed(module)

    session = tracing.run(model, example, forwards, training=measure == "memory")
    terms = session.storages if measure == "memory" else [work.macs for work in session.work]
    return int(sum(terms))


def _nominal(layer: LearnableStrides, seen: Sequence[int]) -> list[int]:
    """The map of a strided layer: every S-th sample."""
    return [
        math.ceil((n + more) / s - 1e-5)
        for n, more, s in zip(seen, layer.size_offset, layer.initial_strides, strict=True)
    ]


def _strided(layer: DiffStrideConvNd) -> tracing.Forward:
    """The convolution with the initial strides; where they are not whole, as much of it as gives so many samples."""

    def forward(x: Tensor) -> Tensor:
        x, convolution = functional.as_autocast(x), layer._convolution
        strides: tuple[int, ...] = (1,) * layer.ndim
        if all(s == int(s) for s in layer.initial_strides):
            strides = tuple(map(int, layer.initial_strides))
        else:
            new = _nominal(layer, convolution.sizes(x.shape[-layer.ndim :]))
            none = tuple((0, 0) for _ in strides)
            needed = [n + d * (k - 1) for n, k, d in zip(new, convolution.kernel, convolution.dilation, strict=True)]
            x, convolution = x.new_empty([*x.shape[: -layer.ndim], *needed]), convolution._replace(padding=none)
        return functional.convolve(x, layer.weight, layer.bias, convolution, strides=strides)

    return forward
