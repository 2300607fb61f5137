"""A stride that the host can read without waiting for the device while it has not changed."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from diffstride._validation import FREEZE_FIRST
from diffstride.errors import UsageError
from diffstride.tracing._torch import FakeTensor


class StrideParameter(nn.Parameter):
    """A parameter whose values are copied to the host at most once between two changes.

    Sizes must be ints on the host. All strides on a device that have changed are read in one copy: after the step of an
    optimizer, or where one of them is asked for. PyTorch counts in-place writes (`_version`), except those through
    `.data`. So this class keeps weak references to the aliases from `.data` and `.detach()`, and reads again as long as
    one lives.
    """

    _host: tuple[int, tuple[float, ...]] | None = None

    def __new__(cls, data: Tensor, requires_grad: bool = True, **_: Any) -> StrideParameter:
        """Make a parameter with the values of `data`; the attributes that accelerate passes are ignored."""
        made: StrideParameter = super().__new__(cls, torch.Tensor.detach(data), requires_grad)
        return made

    @property
    def data(self) -> Tensor:
        """The storage without history, as for any tensor."""
        return self._hand_out(super().data)

    @data.setter
    def data(self, value: Tensor) -> None:
        self._host = None
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def detach(self) -> Tensor:
        """Return the values without history, as for any tensor."""
        return self._hand_out(super().detach())

    def tolist(self) -> list[float]:
        """Return the values as floats, with at most one copy from the device per change of any stride."""
        if not self._is_remote():
            return super().tolist()
        if self._is_stale():
            _remote[self] = None
            _install()
            read(list(_remote))
        assert self._host is not None
        return [*self._host[1]]

    def write(self, values: Sequence[float]) -> None:
        """Set the values in place, without waiting for the device."""
        rounded = torch.tensor(values, dtype=self.dtype, device="cpu")
        self.copy_(rounded, non_blocking=True)
        if self._is_remote() and not self.is_meta:
            self._host = (self._version, tuple(rounded.tolist()))

    def _is_remote(self) -> bool:
        return not (self.is_cpu or self.is_inference())  # inference tensors do not count writes

    def _is_stale(self) -> bool:
        return self._host is None or self._host[0] != self._version or bool(self._live_aliases())

    def _hand_out(self, alias: Tensor) -> Tensor:
        self._aliases = [*self._live_aliases(), weakref.ref(alias)]
        self._host = None
        return alias

    def _live_aliases(self) -> list[weakref.ref[Tensor]]:
        return [alias for alias in getattr(self, "_aliases", ()) if alias() is not None]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # On disk it is a parameter like any other, which `torch.load` takes without trusting code.
        return nn.Parameter(super().detach(), self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


# The strides on devices that the host has asked for.
_remote: WeakIdKeyDictionary = WeakIdKeyDictionary()


def read(strides: Sequence[Tensor]) -> None:
    """Copy the strides that have changed to the host, in one copy for each device."""
    stale = [s for s in strides if isinstance(s, StrideParameter) and s in _remote and s._is_stale()]
    for device in {stride.device for stride in stale}:
        here = [stride for stride in stale if stride.device == device]
        values = iter(_copy_to_host([torch.Tensor.detach(stride) for stride in here]))
        for stride in here:
            stride._host = (stride._version, tuple(itertools.islice(values, len(stride))))


def _copy_to_host(strides: Sequence[Tensor]) -> list[float]:
    values: list[float] = torch.cat([*strides]).tolist()
    return values


@lru_cache(maxsize=1)  # once per process, and not on import
def _install() -> None:
    register_optimizer_step_post_hook(_read_after_step)


def _read_after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Read what a step has changed, so that no forward pass waits for the device."""
    read([parameter for group in optimizer.param_groups for parameter in group["params"]])


def host_values(stride: Tensor) -> tuple[float, ...]:
    """Return the entries of `stride` as floats, without a copy from the device where that can be avoided."""
    if stride.is_meta:
        raise ValueError("stride must have values, got none on the meta device: use to_empty, then reset_parameters")
    if isinstance(stride, StrideParameter):
        return tuple(stride.tolist())
    if isinstance(stride, FakeTensor):
        raise UsageError(f"stride must have values, got a fake tensor, as in torch.export: {FREEZE_FIRST}")
    if hasattr(stride, "placements"):  # a DTensor: this process has a part
        raise ValueError(
            "stride must be whole in every process, got a sharded one: "
            "fully_shard(model, ignored_params=ds.replicate_strides(model))"
        )
    # Entry by entry: before torch 2.10 `tolist` does not work inside `torch.func`'s transforms.
    return tuple(entry.item() for entry in stride)


def carry_over(layer: nn.Module, stride: nn.Parameter | None, successor: StrideParameter | None) -> None:
    """Keep the stride of `layer` tracked and shared after torch may have put another parameter in its place.

    Moving off the meta device and `load_state_dict(assign=True)` give every layer a parameter of its own. The first
    layer that moves stores its new parameter on the old one, which the layers that share it still have.

    Args:
        layer: the layer, after the change.
        stride: its parameter before the change.
        successor: `successor_of(stride)` before the change, since a swap of tensors exchanges their attributes.
    """
    now = layer._parameters.get("stride")
    if now is None or type(now) not in (nn.Parameter, StrideParameter):
        return  # a parametrization or a sharded tensor has its place
    alike = successor is not None and (successor.device, successor.dtype) == (now.device, now.dtype)
    if successor is not None and (alike or now.is_meta):
        now = successor
    elif not isinstance(now, StrideParameter):
        now = StrideParameter(now.detach(), now.requires_grad)
    if stride is not None and stride is not now:
        stride._successor = now  # type: ignore[attr-defined]
    layer._parameters["stride"] = now


def successor_of(stride: nn.Parameter | None) -> StrideParameter | None:
    """Return the parameter that has taken the place of `stride` in another layer, if one has."""
    found: StrideParameter | None = getattr(stride, "_successor", None)
    return found
