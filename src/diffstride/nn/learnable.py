"""The base of all layers with trained strides: the parameter, its options, and the sizes that follow from them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from diffstride import _graph, _validation
from diffstride.backends import Backend
from diffstride.geometry import Basis, Norm, Window
from diffstride.nn._fused import Schedule, make_schedule
from diffstride.nn._parameter import StrideParameter, carry_over, host_values, successor_of
from diffstride.nn._tracers import Traceable
from diffstride.options import Bounds, LayerOptions, Limits


def _constant_in_graphs(method: Any) -> Any:
    """Mark a method as `torch.compiler.assume_constant_result` does, without importing the compiler."""
    method._dynamo_marked_constant = True
    return method


def _option(name: str) -> Any:
    """Return a read-only attribute with the option of this name."""
    return property(operator.attrgetter(f"options.{name}"))


class LearnableStrides(Traceable):
    """The strides of a layer as a parameter, one entry per axis (one in all when shared).

    Attributes:
        options: the options, which cannot be changed. Each is an attribute of the layer, too.
        size_offset: zeros by default. An axis of `N` samples gets the output size of one of `N + size_offset` samples
            at the same stride, so that layers whose inputs differ by a few samples agree. The window is still that of
            `N`. The output may exceed `N` by at most `size_offset`; the axis then grows as in `spectral_resize`. After
            a change, call `refresh_sizes` where a graph was compiled.
        stride_scale: None by default, see `set_stride_scale`. It multiplies the strides that a pass in training mode
            uses, for its window and its sizes. `strides`, `output_size`, evaluation, costs and `state_dict` ignore it.
    """

    ndim: ClassVar[int]
    recompute: bool = False
    options: LayerOptions
    smoothness: float = _option("smoothness")
    shared: bool = _option("shared")
    bounds: Bounds = _option("bounds")
    window: Window = _option("window")
    basis: Basis = _option("basis")
    norm: Norm = _option("norm")
    size_multiple: int = _option("size_multiple")
    backend: Backend = _option("backend")
    stride: nn.Parameter
    size_offset: tuple[int, ...]
    stride_scale: tuple[float, ...] | None
    _stride_scale: Tensor | None
    _pinned_strides: tuple[float, ...] | None
    _pinned_size: tuple[int, ...] | None
    _last_call: _Call | None
    _options_text: str
    _slots: _Slots

    def __init__(
        self,
        stride: float | Sequence[float],
        options: LayerOptions,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        initial = _validation.strides_at_least_one("stride", _validation.per_axis("stride", stride, self.ndim))
        options.check_axes(self.ndim)
        if options.shared:  # it does not concern axes that stay as they are
            initial = tuple(s for i, s in enumerate(initial) if not options.is_left(i)) or initial[:1]
            if len(set(initial)) > 1:
                raise ValueError(f"stride must be one number when shared=True, got {initial}")
            initial = initial[:1]
        if _clamped(initial, options.entry_limits(self.ndim)) != initial:
            raise ValueError(f"stride must lie within bounds {options.bounds}, got {initial}")
        self.options, self._options_text = options, options.as_text()
        self.size_offset = (0,) * self.ndim
        self._initial = initial
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self._pinned_strides = self._pinned_size = self._last_call = None
        self._slots = _Slots()
        self.stride = StrideParameter(torch.empty(len(self._initial), device=device, dtype=wide))
        self.stride_scale = None
        self.register_buffer("_stride_scale", None, persistent=False)  # the same numbers where a graph can read them
        self.reset_strides()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__["_last_call"] = None  # which may depend on it

    def reset_strides(self) -> None:
        """Set the strides back to the initial ones."""
        self.write_strides(self._initial)

    def clamp_strides_(self) -> None:
        """Project the raw strides to `bounds`, but for a parametrization that cannot be set."""
        if self.stride.is_meta:
            return
        raw = host_values(self.stride)
        clamped = _clamped(raw, self.options.entry_limits(self.ndim))
        if clamped != raw:
            with suppress(ValueError):
                self.write_strides(clamped)

    @torch.no_grad()
    def write_strides(self, values: Sequence[float]) -> None:
        """Set the raw strides, through the parametrization where there is one.

        Raises:
            ValueError: the parametrization of `stride` has no `right_inverse`.
        """
        stride = self._parameters.get("stride")
        if isinstance(stride, StrideParameter):
            stride.write(values)
        elif stride is not None:
            stride.copy_(torch.tensor(values, dtype=torch.float64, device="cpu"))
        else:
            try:
                self.stride = self.stride.new_tensor(values)  # type: ignore[assignment]  # as torch's parametrizations take it
            except (NotImplementedError, RuntimeError) as error:
                kinds = ", ".join(type(part).__name__ for part in self._modules["parametrizations"]["stride"])  # type: ignore[index]
                raise ValueError(
                    f"stride must have a parametrization with right_inverse to be set, got {kinds}"
                ) from error
        self.refresh_sizes()

    @property
    def initial_strides(self) -> tuple[float, ...]:
        """The strides that the layer was constructed with, one per axis."""
        initial = self._initial * self.ndim if self.shared else self._initial
        return _clamped(initial, [self.options.limits(axis) for axis in range(self.ndim)])

    @property
    def strides(self) -> tuple[float, ...]:
        """The strides in use, one per axis, clamped to `bounds`."""
        return _clamped(self.raw_strides, [self.options.limits(axis) for axis in range(self.ndim)])

    @property
    def entries(self) -> tuple[float, ...]:
        """The strides in use, one for each entry of the parameter."""
        return _clamped(host_values(self.stride), self.options.entry_limits(self.ndim))

    def output_size(self, size: int | Sequence[int], *, scaled: bool = False) -> tuple[int, ...]:
        """Return the spatial sizes of the output.

        Args:
            size: the spatial sizes of the input, one number or one per axis.
            scaled: use the strides times `stride_scale`, as in training mode.
        """
        if self._pinned_size is not None:
            return self._pinned_size
        spatial = _validation.sizes("size", size, self.ndim)
        if min(self.window_size(spatial)) < 1:
            raise ValueError(f"kernel_size must fit the padded input, got sizes {spatial} in {self}")
        return self.sizes_at(self._raw_strides(scaled), spatial)

    def sizes_at(self, strides: Sequence[float], spatial: Sequence[int]) -> tuple[int, ...]:
        """Return the output sizes at these raw strides for an input of sizes `spatial`."""
        sampled = [n + more for n, more in zip(self.window_size(spatial), self.size_offset, strict=True)]
        return self.options.output_sizes(sampled, strides, owner=self)

    def window_size(self, spatial: Sequence[Any]) -> Sequence[Any]:
        """Return the sizes that the window sees, for sizes of the input in any kind of number."""
        return spatial

    def schedule(self, spatial: Sequence[int], new_sizes: Sequence[int]) -> Schedule:
        """Return the layer's operators in their order, for an input of sizes `spatial` that becomes `new_sizes`."""
        return make_schedule(None, self.options, spatial, new_sizes)

    def set_stride_scale(self, factors: float | Sequence[float] | None) -> None:
        """Use the strides times `factors` in training mode from now on.

        Gradients flow through the factors to the parameter. Copies of the layer keep them, a `state_dict` does not.

        Args:
            factors: > 0, one for each entry of the stride (one in all when shared), or one for all. None removes them.

        Raises:
            TypeError: factors are not numbers.
            ValueError: the number of factors is wrong, or one is not > 0 and finite.
        """
        if factors is None:
            self.stride_scale = self._stride_scale = None
        else:
            self.stride_scale = self.check_factors(factors)
            # A new tensor, since a backward pass may still need the one before.
            with torch.inference_mode(False):
                self._stride_scale = torch.tensor(self.stride_scale, dtype=self.stride.dtype, device=self.stride.device)
        self.refresh_sizes()

    def check_factors(self, factors: float | Sequence[float]) -> tuple[float, ...]:
        """Return factors for `set_stride_scale`, one for each entry of the stride; raise what it raises."""
        return _validation.positive("factors", _validation.per_axis("factors", factors, len(self.stride)))

    def _prepared(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return the strides of a forward pass, and the function that `_prepare` gives for their values."""
        stride = self._strides()
        values = self._raw_strides(self.training)
        traced = self._pinned_size is not None or torch._C._get_tracing_state() is not None
        keep = type(x) in (Tensor, nn.Parameter) and not traced
        kind = (x.shape, x.stride(), x.dtype, x.device, self.size_offset) if keep else None
        last = self._last_call if keep else None
        if last is None or last.kind != kind:
            spatial = _validation.spatial_sizes(x, self.ndim)
            new_sizes = self.output_size(spatial, scaled=self.training)
            prepared = self._prepare(x, spatial, new_sizes)
        elif last.strides == values:
            return stride, last.function
        else:
            spatial, new_sizes, prepared = last.spatial, self.sizes_at(values, last.spatial), last.prepared
            if new_sizes != last.new_sizes:
                prepared = self._prepare(x, spatial, new_sizes)
        function = prepared.at(values)
        if keep:  # past `nn.Module.__setattr__`: nobody can observe it
            self.__dict__["_last_call"] = _Call(kind, values, spatial, new_sizes, prepared, function)
        return stride, function

    def _strides(self) -> Tensor:
        """Return the raw strides of a forward pass."""
        stride: Tensor = self.stride
        return stride if self._stride_scale is None or not self.training else stride * self._stride_scale

    def _prepare(self, x: Tensor, spatial: tuple[int, ...], new_sizes: tuple[int, ...]) -> Any:
        """Return what makes a function of `x` and strides for inputs of a kind, by its method `at`."""
        raise NotImplementedError

    def _raw_strides(self, scaled: bool) -> tuple[float, ...]:
        """Return the raw strides, times `stride_scale` if `scaled`."""
        values = self.raw_strides
        if not scaled or self.stride_scale is None:
            return values
        factors = self.stride_scale * self.ndim if self.shared else self.stride_scale
        return tuple(s * factor for s, factor in zip(values, factors, strict=True))

    def _sizes_in_graph(self, x: Tensor) -> tuple[int, ...]:
        """Return the output sizes for a graph of `torch.compile`, which cannot read the stride (see `_graph`)."""
        spatial = _validation.spatial_sizes(x, self.ndim)
        slot: int = self._new_slot()
        torch.ops.diffstride.note_sizes(x, len(spatial), [], slot)
        self._settle_slot(slot)
        sizes = tuple(getattr(self._slots, _slot_name(slot)).holder.shape)
        torch.ops.diffstride.note_sizes(x, len(spatial), sizes, slot)
        return sizes

    @_constant_in_graphs
    def _new_slot(self) -> int:
        slot = _graph.Slot(self, scaled=self.training)
        setattr(self._slots, _slot_name(slot.number), slot)
        _graph.refresh_after_steps()
        return slot.number

    @_constant_in_graphs
    def _settle_slot(self, number: int) -> None:
        slot = getattr(self._slots, _slot_name(number))
        slot.settle(slot.first_size)

    def refresh_sizes(self) -> None:
        """Compute the sizes that compiled graphs use again, from the present strides, for all layers that share one."""
        _graph.refresh([layer for layer in _graph.layers() if layer.stride_id == self.stride_id])

    @property
    def is_scaled(self) -> bool:
        """True where a pass would now use other strides than the learned ones."""
        return self._stride_scale is not None and self.training  # compiled graphs would depend on the numbers

    @property
    def stride_parameters(self) -> list[nn.Parameter]:
        """The parameter `stride`, or the parameters of its parametrization."""
        own = self._parameters.get("stride")
        if own is not None:
            return [own]
        parametrizations = self._modules.get("parametrizations")
        return [] if parametrizations is None else list(parametrizations["stride"].parameters())  # type: ignore[index]

    @property
    def learns_strides(self) -> bool:
        """True where a gradient can change the strides."""
        return any(parameter.requires_grad for parameter in self.stride_parameters)

    @property
    def stride_id(self) -> int:
        """A number that layers have in common where they share a stride."""
        return id(self._parameters.get("stride", self))  # a parametrization makes another tensor at each access

    @property
    def raw_strides(self) -> tuple[float, ...]:
        """The values of the parameter, one per axis, not clamped to `bounds`."""
        if self._pinned_strides is not None:
            return self._pinned_strides
        values = host_values(self.stride)
        return values * self.ndim if self.shared else values

    @contextmanager
    def pinned(
        self, *, strides: tuple[float, ...] | None = None, output_size: tuple[int, ...] | None = None
    ) -> Iterator[None]:
        """Use these strides or sizes inside the context, whatever the parameter holds.

        This is for tracing: the parameters of a trace are fake and have no values.

        Args:
            strides: raw strides, one per axis; None leaves those of the parameter.
            output_size: the result of `output_size` for every input; None leaves the one that follows from the strides.
        """
        before = self._pinned_strides, self._pinned_size
        self._pinned_strides, self._pinned_size = strides or before[0], output_size or before[1]
        try:
            yield
        finally:
            self._pinned_strides, self._pinned_size = before

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert; the stride stays float32 where a model goes to half precision."""
        stride = self._parameters.get("stride")
        strides = {id(t) for p in self.stride_parameters for t in (p, p.grad)} | {id(self._stride_scale)}

        def keep_wide(t: Tensor) -> Tensor:
            new = fn(t)
            narrow = new.is_floating_point() and torch.finfo(new.dtype).bits < 32
            new = t.to(new.device) if narrow and id(t) in strides else new
            return Tensor.detach(new) if new is stride else new  # torch makes no parameter of a `StrideParameter`

        successor = successor_of(stride)
        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        carry_over(self, stride, successor)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_call": None, "_slots": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._slots = _Slots()  # a copy is not watched until it is compiled itself
        stride = self._parameters.get("stride")
        carry_over(self, stride, successor_of(stride))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save a shared stride under its first name, and copies under the others.

        Safetensors, and so `save_pretrained` of transformers, refuse one tensor under two names.
        """
        earlier = {value.data_ptr() for name, value in destination.items() if name.endswith("stride")}
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own = destination.get(f"{prefix}stride")
        if own is not None and not keep_vars and own.data_ptr() in earlier:
            destination[f"{prefix}stride"] = own.clone()

    def _load_from_state_dict(self, *args: Any) -> None:
        stride = self._parameters.get("stride")
        successor = successor_of(stride)
        super()._load_from_state_dict(*args)
        carry_over(self, stride, successor)
        self.refresh_sizes()

    def extra_repr(self) -> str:
        """Return the present strides, the smoothness, and the options that differ from the defaults."""
        values = "meta" if self.stride.is_meta else ", ".join(f"{s:.4g}" for s in self.raw_strides)
        shown = {"smoothness": self.smoothness, **self.options.changed()}
        if any(self.size_offset):
            shown["size_offset"] = self.size_offset
        return ", ".join([f"stride=({values})", *(f"{name}={value!r}" for name, value in shown.items())])


def _clamped(strides: tuple[float, ...], limits: Sequence[Limits]) -> tuple[float, ...]:
    pairs = zip(strides, limits, strict=True)
    return tuple([s if math.isnan(s) else min(max(s, lower), upper or math.inf) for s, (lower, upper) in pairs])


class _Call(NamedTuple):
    """The last forward pass, of which the next one uses what has not changed."""

    kind: Any
    """What operators depend on beside strides: shape, strides in memory, dtype and device of the input, offsets."""
    strides: tuple[float, ...]
    spatial: tuple[int, ...]
    new_sizes: tuple[int, ...]
    prepared: Any
    function: Callable[..., Tensor]


class _Slots:
    """The slots of a layer as attributes: a graph does not see a key added to a dict while it is made."""


def _slot_name(number: int) -> str:
    return f"slot_{number}"
