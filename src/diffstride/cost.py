"""What strides cost: Eq. 6 of the paper, multiply-accumulates and memory of the real model, and budgets of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import sympy
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffstride import _check, functional, trace
from diffstride.backends import DENSE_UP_TO, KEEP_RAMPS_UP_TO
from diffstride.geometry import clamp_stride, stride_range
from diffstride.nn.attach import attached
from diffstride.nn.conv import DiffStrideConvNd
from diffstride.nn.diffstride import DiffStrideNd
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.resize import ResizeTo
from diffstride.nn.spectral import SpectralPoolNd
from diffstride.nn.strides import learnable_layers
from diffstride.trace import ExampleInputs, Session

Measure = Literal["macs", "memory"]
MEASURES = ("macs", "memory")


def stride_cost(model: nn.Module) -> Tensor:
    """Eq. 6: `J = sum_l prod_{i <= l} prod_axes 1 / S_i` over the model's learnable downsamplings.

    In the order in which the layers are registered, a shared layer once. Computation and memory are proportional to it
    where the number of channels is constant. Differentiable in the strides (clamped to the users' bounds); weighed
    into a loss it pushes strides up.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: a model without learnable strides.
    """
    inverse_strides = [(1 / _in_bounds(layer)).prod() for _, layer in learnable_layers(model)]
    if not inverse_strides:
        raise ValueError(f"model must have learnable strides (DiffStride layers), got none in {type(model).__name__}")
    return torch.stack(inverse_strides).cumprod(0).sum()


def _in_bounds(layer: LearnableStrides) -> Tensor:
    lower, upper = layer.bounds
    return clamp_stride(layer.stride, lower, float("inf") if upper is None else upper).expand(layer.ndim)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Macs(NamedTuple):
    """Multiply-accumulates of one forward pass."""

    model: int
    """Convolutions and linear layers."""
    resampling: int
    """The dense products of the resampling itself (none where it runs as an FFT)."""


@torch.no_grad()
def count_macs(model: nn.Module, *inputs: Any) -> Macs:
    """Count the multiply-accumulates of `model(*inputs)` at the strides now in use, with torch's `FlopCounterMode`.

    The model runs in evaluation mode and is left in the mode it was in.
    """
    convolutions = 0  # of layers that resample and convolve

    def count(layer: DiffStrideConvNd, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal convolutions
        (x,) = inputs
        batch = x.shape[0] if x.ndim == layer.ndim + 2 else 1
        convolutions += batch * layer.convolution_macs(x.shape[-layer.ndim :])

    with evaluation(model):
        model(*inputs)  # builds the operators, whose own products are not those of a forward pass
        handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, DiffStrideConvNd)]
        try:
            with FlopCounterMode(display=False) as counter:
                model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
    total = counter.get_total_flops()
    by_module = counter.get_flop_counts()
    prefix = type(model).__name__
    in_layers = sum(
        sum(by_module.get(f"{prefix}.{name}" if name else prefix, {}).values())
        for name, module in model.named_modules()
        if isinstance(module, (LearnableStrides, SpectralPoolNd))
    )
    resampling = in_layers // 2 - convolutions
    return Macs(total // 2 - resampling, resampling)


class CostModel:
    """What a model costs as a differentiable function of its strides.

    Made from one pass with symbols for the sizes that strides decide (`diffstride.trace`): every other size, through
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
                `diffstride.trace.ExampleInputs(*args, **kwargs)` for both.
            measure: `"macs"` or `"memory"`.

        Raises:
            UserError: a model that cannot be traced (it looks at values, it raises).
            ValueError: an unknown measure.
        """
        _check.one_of("measure", measure, MEASURES)
        self.model, self.measure = model, measure
        self.example = ExampleInputs.of(example_inputs)
        self._program = Program(model, self.example, measure)

    def __call__(self) -> Tensor:
        """The relaxed cost, a 0-d tensor, differentiable in the strides; computed on the host."""
        self._settle()
        strides = [layer.stride for _, layer in learnable_layers(self.model)]
        if not strides:
            return torch.tensor(float(self.count()))
        cost: Tensor = _OnHost.apply(self._program.relaxed, strides, *strides)  # type: ignore[no-untyped-call]
        return cost

    def count(self) -> int:
        """The exact cost at the sizes now in use."""
        self._settle()
        return self._program.count(_in_use)

    def start(self) -> int:
        """The exact cost at the strides that the layers were constructed with."""
        return self._program.count(lambda layer: layer.initial_strides)

    def original(self) -> int:
        """The cost of the model with strided layers in place of the learnable ones, at their initial strides.

        Of a model that `diffstride.convert` has converted, the cost that it had before. A strided layer is taken to
        give `ceil(N/S)` samples where what it was is not known.
        """
        return _of_strided_twin(self.model, self.example, self.measure)

    def least(self) -> int:
        """The cost at the largest strides that bounds and maps allow."""
        return self._program.count(lambda layer: (_ENORMOUS,) * layer.ndim)

    def most(self) -> int:
        """The cost at the smallest strides that bounds and maps allow."""
        return self._program.count(lambda layer: (1.0,) * layer.ndim)

    def budget(self, amount: float, of: Literal["original", "start", "absolute"] = "original") -> Budget:
        """A loss term that holds the cost at a budget.

        Args:
            amount: a fraction of the cost that `of` names, or the cost itself.
            of: `"original"` (see `original`), `"start"` (see `start`) or `"absolute"`.

        Raises:
            UserError: a budget out of reach, with the least and the most that strides can make of the cost.
            ValueError: an amount not above 0, an unknown `of`.
        """
        _check.one_of("of", of, ("original", "start", "absolute"))
        if not 0 < amount < math.inf:
            raise ValueError(f"amount must be > 0 and finite, got {amount}")
        whole = {"original": self.original, "start": self.start, "absolute": lambda: 1}[of]()
        target, least, most = amount * whole, self.least(), self.most()
        if not least <= target <= most:
            share = "" if of == "absolute" else f" of the {of} cost ({whole:.4g})"
            unit = "" if of == "absolute" else f", {least / whole:.3f} to {most / whole:.3f} of it"
            raise _check.UserError(
                f"amount must be between the least and the most that strides can reach, {least:.4g} to {most:.4g}"
                f"{unit}, got {amount:g}{share}"
            )
        return Budget(self, target)

    def _settle(self) -> None:
        """Trace again where the model's code, or torch's, would take another turn at the sizes now in use."""
        if not self._program.holds(_in_use):
            self._program = Program(self.model, self.example, self.measure)


_ENORMOUS = 1e30


def _in_use(layer: LearnableStrides) -> tuple[float, ...]:
    return layer._raw_strides()


class _Record(NamedTuple):
    """A call of a learnable layer; sizes are expressions."""

    layer: LearnableStrides
    batch: Any
    channels: int
    spatial: tuple[Any, ...]
    sampled: tuple[Any, ...]
    """What the window sees."""
    itemsize: int
    learning: bool


class Program:
    """The cost as expressions, compiled."""

    def __init__(self, model: nn.Module, example: ExampleInputs, measure: Measure) -> None:
        self.measure = measure
        self.records: list[_Record] = []
        self.symbols: list[list[tuple[Any, int]]] = []
        """Of each record, the symbols of its output's sizes and their values in the trace."""
        self._names = {module: name for name, module in model.named_modules()}
        raw = {module: module._raw_strides() for module in model.modules() if isinstance(module, LearnableStrides)}

        def forwards(session: Session, name: str, module: nn.Module) -> trace.Forward | None:
            if isinstance(module, LearnableStrides):
                vars(module)["_raw_strides"] = lambda: raw[module]  # those of fake parameters have no values
                return self._stand_in(session, module)
            return _resized(module) if isinstance(module, ResizeTo) else None

        session = trace.run(model, example, forwards, training=measure == "memory")
        symbols, derived = [s for s in session.hints if s not in session.derived], session.derived
        self._spatial = []
        first = 0
        for record in self.records:
            self._spatial.append(trace.evaluator([record.batch, *record.spatial], symbols[:first], derived))
            first += record.layer.ndim
        terms = session.storages if measure == "memory" else [work.macs for work in session.work]
        self._others = trace.evaluator([sympy.sympify(sum(terms))], symbols, derived)
        self._by_module = by_module(session)
        asked = {relation.expression: relation.truth for relation in session.relations}
        self._answers = [bool(truth) if truth in (True, False) else int(truth) for truth in asked.values()]
        self._asked = trace.evaluator(list(asked), symbols, derived)

    def _stand_in(self, session: Session, layer: LearnableStrides) -> trace.Forward:
        """In place of a layer's forward: an output whose sizes are symbols, and what the layer saves for backward."""

        def forward(x: Tensor) -> Tensor:
            ndim = layer.ndim
            convolution = isinstance(layer, DiffStrideConvNd)
            if convolution:
                x = functional.as_autocast(x)
            spatial = trace.shape(x)[-ndim:]  # type: ignore[index]
            current = layer.output_size([session.value(n) for n in spatial])
            sizes = [session.size((len(self.records), i), n) for i, n in enumerate(current)]
            leading = math.prod(trace.shape(x)[: x.ndim - ndim - 1])  # type: ignore[index]
            parameters = list(layer.parameters())
            learning = torch.is_grad_enabled() and layer.stride.requires_grad
            sampled = tuple(map(session.expanded, _sampled(layer, spatial)))
            record = _Record(layer, leading, x.shape[-ndim - 1], spatial, sampled, x.itemsize, learning)
            self.records.append(record)
            self.symbols.append([(trace.expression(s), n) for s, n in zip(sizes, current, strict=True)])
            channels = layer.out_channels if isinstance(layer, DiffStrideConvNd) else x.shape[-ndim - 1]
            shape = [*x.shape[: x.ndim - ndim - 1], channels, *sizes]
            output: Tensor = _StandIn.apply(x, shape, *parameters)  # type: ignore[no-untyped-call]
            return output

        return forward

    def count(self, strides: Any) -> int:
        """The exact cost, with `strides` a function from a layer to its strides."""
        sizes = list(self._whole(strides))
        own = sum(
            self._own(record, batch, spatial, new, spatial, new)
            for record, (batch, spatial, new) in zip(self.records, sizes, strict=True)
        )
        return round(self._others(*(n for _, _, new in sizes for n in new))[0] + own)

    def by_module(self) -> dict[str, int]:
        """Multiply-accumulates by module, at the sizes of the trace."""
        macs = dict(self._by_module)
        for record, (batch, spatial, new) in zip(self.records, self._whole(_in_use), strict=True):
            name = self._names[record.layer]
            macs[name] = macs.get(name, 0) + self._own(record, batch, spatial, new, spatial, new)
        return macs

    def resampling_macs(self) -> int:
        """Multiply-accumulates of the resampling itself, where it is dense."""
        return sum(
            batch * stage.macs()
            for record, (batch, spatial, new) in zip(self.records, self._whole(_in_use), strict=True)
            for stage in self._resamplings(record, self._folded(record, spatial, new), spatial, new, spatial, new)
        )

    def holds(self, strides: Any) -> bool:
        """Whether all that was asked about sizes in the trace has the same answer at these strides."""
        values = [n for _, _, new in self._whole(strides) for n in new]
        return self._asked(*values) == self._answers

    def _whole(self, strides: Any) -> Iterator[tuple[int, list[int], tuple[int, ...]]]:
        """Batch, sizes of the input and sizes of the output of each record."""
        values: list[int] = []
        for record, evaluate in zip(self.records, self._spatial, strict=True):
            batch, *spatial = evaluate(*values)
            new = _new_sizes(record.layer, spatial, strides(record.layer))
            yield batch, spatial, new
            values += new

    def relaxed(self, strides: Mapping[int, Tensor]) -> Tensor:
        """The relaxed cost; `strides` by the id of the layers' parameters, in float64."""
        values: list[Any] = []
        exact: list[int] = []
        own: Any = 0
        for record, evaluate in zip(self.records, self._spatial, strict=True):
            layer = record.layer
            (batch, *spatial), (_, *whole) = evaluate(*values), evaluate(*exact)
            new_whole = _new_sizes(layer, whole, _in_use(layer))
            stride = strides[id(layer.stride)].expand(layer.ndim)
            seen = zip(_sampled(layer, spatial), _sampled(layer, whole), stride.unbind(), layer.excess, strict=True)
            new = [_relaxed_size(layer, n + more, whole_n + more, s) for n, whole_n, s, more in seen]
            own = own + self._own(record, batch, spatial, new, whole, new_whole)
            values += new
            exact += new_whole
        return torch.as_tensor(self._others(*values)[0] + own, dtype=torch.float64)

    def _own(
        self,
        record: _Record,
        batch: Any,
        spatial: Sequence[Any],
        new: Sequence[Any],
        whole: Sequence[int],
        new_whole: Sequence[int],
    ) -> Any:
        """The cost of a layer itself; whole sizes decide in which order it works."""
        layer = record.layer
        folded = self._folded(record, whole, new_whole)
        if self.measure == "macs":
            if not isinstance(layer, DiffStrideConvNd):
                return 0
            return batch * functional.convolution_work(folded, _channels(layer), spatial, new, layer._convolution)[0]
        stages = self._resamplings(record, folded, spatial, new, whole, new_whole)
        elements = sum(stage.input_elements + stage.kept_on_ramps() for stage in stages) if record.learning else 0
        if folded:  # the convolution saves what was resampled for it
            elements = elements + math.prod(stages[0].output) * record.channels
        return batch * record.itemsize * elements

    def _folded(self, record: _Record, whole: Sequence[int], new_whole: Sequence[int]) -> int:
        """How many axes are resampled before the layer's convolution."""
        layer = record.layer
        if not isinstance(layer, DiffStrideConvNd):
            return 0
        order = functional.cheapest_order(_channels(layer), whole, new_whole, layer._convolution)
        return functional.folded_axes(order, layer.ndim)

    def _resamplings(
        self,
        record: _Record,
        folded: int,
        spatial: Sequence[Any],
        new: Sequence[Any],
        whole: Sequence[int],
        new_whole: Sequence[int],
    ) -> list[_Resampling]:
        """Those before and after the layer's convolution. The first one's input is the layer's, which others count."""
        layer, ndim = record.layer, record.layer.ndim
        kernel = layer.kernel_size if isinstance(layer, DiffStrideConvNd) else (1,) * ndim
        stages = []
        if folded:
            interleaved = [k * n for k, n in zip(kernel, new, strict=True)]
            output = [*interleaved[:folded], *spatial[folded:]]
            stages.append(_Resampling(layer, range(folded), True, record.channels, 0, output, whole, new_whole))
        if folded < ndim:
            channels, elements = record.channels, 0
            sampled = [*new[:folded], *_sampled(layer, spatial)[folded:]]
            if isinstance(layer, DiffStrideConvNd):
                channels = layer.out_channels
                elements = channels * math.prod(sampled)
            whole_sampled = _sampled(layer, whole)
            rest = range(folded, ndim)
            stages.append(_Resampling(layer, rest, False, channels, elements, list(new), whole_sampled, new_whole))
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
        first, last = axis.ramp(axis.clamp(_in_use(layer)[i]))
        waves = 2 if axis.basis == "dft" else 1
        return waves * (last - first) + outside, length, kernel * new


def by_module(session: Session) -> dict[str, int]:
    """Multiply-accumulates of a trace by module, at its sizes."""
    macs: dict[str, int] = {}
    for work in session.work:
        macs[work.module] = macs.get(work.module, 0) + session.value(work.macs)
    return macs


def _channels(layer: DiffStrideConvNd) -> tuple[int, int]:
    return layer.out_channels, layer.in_channels // layer.groups


def _sampled(layer: LearnableStrides, spatial: Sequence[Any]) -> Sequence[Any]:
    """The sizes that a layer's window sees."""
    return layer._convolution.unchecked_sizes(spatial) if isinstance(layer, DiffStrideConvNd) else spatial


def _new_sizes(layer: LearnableStrides, spatial: Sequence[int], strides: Sequence[float]) -> tuple[int, ...]:
    """The sizes that a layer would give at these strides."""
    sampled = [n + more for n, more in zip(_sampled(layer, spatial), layer.excess, strict=True)]
    return functional.output_sizes(sampled, strides, layer._settings, owner=layer)


def _relaxed_size(layer: LearnableStrides, n: Any, whole: int, stride: Tensor) -> Tensor:
    """`min(N, N/S + 2R)` (outer) or `N/S` (inner) of `n` samples, of which there are `whole` in fact."""
    settings = layer._settings
    lower, upper = stride_range(whole, settings.smoothness, settings.bounds, settings.window, settings.basis)
    stride = clamp_stride(stride, lower, upper)
    margin = 2 * settings.smoothness if settings.window == "outer" else 0.0
    size: Tensor = n / stride + margin
    samples = n.detach() if isinstance(n, Tensor) else n
    if size.item() < samples:
        return size
    # Saturated: the value does not move, but what would make the map smaller passes.
    pushed = samples / stride
    here = pushed.item()
    return n + (clamp_stride(pushed, -math.inf, here) - here)


def _resized(module: ResizeTo) -> trace.Forward:
    """In place of a resizing's forward, which cannot work with symbols."""
    return lambda x: x.new_empty([*x.shape[: -module.ndim], *module.size])  # type: ignore[misc]


class _StandIn(torch.autograd.Function):
    """Saves the input as a learnable layer does; nothing is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Sequence[Any], *parameters: Tensor) -> Tensor:
        if any(p.requires_grad for p in parameters):
            ctx.save_for_backward(x)
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


class _OnHost(torch.autograd.Function):
    """A function of strides computed on the host in float64 with its gradient, wherever the strides are."""

    @staticmethod
    def forward(ctx: Any, function: Any, parameters: Sequence[Tensor], *strides: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [stride.detach().to("cpu", torch.float64).requires_grad_() for stride in strides]
            cost = function({id(p): leaf for p, leaf in zip(parameters, leaves, strict=True)})
            ctx.grads = torch.autograd.grad(cost, leaves, allow_unused=True, materialize_grads=True)
        return cost.detach().to(strides[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        return None, None, *(g.to(grad) * grad for g in ctx.grads)


def _of_strided_twin(model: nn.Module, example: ExampleInputs, measure: Measure) -> int:
    """The cost of the model with strided layers in place of learnable ones."""

    def forwards(session: Session, name: str, module: nn.Module) -> trace.Forward | None:
        layer = attached(module)
        if isinstance(layer, DiffStrideNd):
            module.stride = tuple(math.ceil(s) for s in layer.initial_strides)  # type: ignore[assignment]
            vars(layer)["forward"] = lambda x: x
        if isinstance(module, DiffStrideConvNd):
            return _strided(module)
        if isinstance(module, DiffStrideNd) and "forward" not in vars(module):
            return lambda x: x.new_empty([*x.shape[: -module.ndim], *_nominal(module, x.shape[-module.ndim :])])
        if isinstance(module, ResizeTo):
            return _resized(module)
        return None

    session = trace.run(model, example, forwards, training=measure == "memory")
    terms = session.storages if measure == "memory" else [work.macs for work in session.work]
    return int(sum(terms))


def _nominal(layer: LearnableStrides, sampled: Sequence[int]) -> list[int]:
    """The map of a strided layer: every S-th sample."""
    return [
        math.ceil((n + more) / s - 1e-5)
        for n, more, s in zip(sampled, layer.excess, layer.initial_strides, strict=True)
    ]


def _strided(layer: DiffStrideConvNd) -> trace.Forward:
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


class Budget(nn.Module):
    """A loss term that holds a model's cost at a budget, from both sides: `CostModel.budget` makes it.

    An augmented Lagrangian. With the exact cost `C` and the target `T`, `g = log(C/T)` is how far off it is (within
    `tolerance` of the target: 0). The gradient with respect to the strides is `(lambda + weight g) d log(cost)/d S`, in
    which `cost` is the relaxed one, and each call in training mode moves the multiplier `lambda` by `rate g` within
    `[-limit, limit]`. So the push grows for as long as the budget is missed, and stays where it is met. A cost below
    the target is pushed up: compute that is allowed is used.

    The multiplier is a buffer: it is in checkpoints.
    """

    multiplier: Tensor

    def __init__(
        self,
        cost: CostModel,
        target: float,
        *,
        weight: float = 10.0,
        rate: float = 0.1,
        limit: float = 10.0,
        tolerance: float = 0.01,
    ) -> None:
        """Made by `CostModel.budget`; the options' defaults were found on small trainings.

        Args:
            cost: of the model.
            target: the cost to reach, in multiply-accumulates or bytes.
            weight: of the quadratic term.
            rate: of the multiplier.
            limit: of the multiplier.
            tolerance: relative distance from the target within which the multiplier rests.
        """
        super().__init__()
        self.cost, self.target = cost, target
        self.weight, self.rate, self.limit, self.tolerance = weight, rate, limit, tolerance
        self.register_buffer("multiplier", torch.zeros((), dtype=torch.float64))

    def forward(self) -> Tensor:
        """The term to add to the loss."""
        miss = self.miss()
        multiplier = float(self.multiplier)
        relaxed = self.cost().log()
        push = multiplier + self.weight * miss
        value = multiplier * miss + self.weight / 2 * miss**2
        if self.training and torch.is_grad_enabled():
            self.multiplier.fill_(min(max(multiplier + self.rate * miss, -self.limit), self.limit))
        return push * (relaxed - relaxed.detach()) + value

    def miss(self) -> float:
        """`log(C/T)`, 0 within the tolerance."""
        miss = math.log(self.cost.count() / self.target)
        return math.copysign(max(0.0, abs(miss) - self.tolerance), miss)

    def extra_repr(self) -> str:
        """The target."""
        return f"target={self.target:.4g}, measure={self.cost.measure!r}"
