"""A stride that the host can read without waiting for the device while it has not changed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


class StrideParameter(nn.Parameter):
    """A parameter whose values are copied to the host at most once between two changes.

    Sizes must be ints on the host. PyTorch counts in-place writes (`_version`), except those through `.data`; so
    this class counts who was handed `.data`, and reads again as long as such an alias lives.
    """

    @property
    def data(self) -> Tensor:
        alias = super().data
        self._aliases = [*(a for a in self._live_aliases() if a() is not None), weakref.ref(alias)]
        self._host: tuple[int, tuple[float, ...]] | None = None
        return alias

    @data.setter
    def data(self, value: Tensor) -> None:
        self._host = None
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def _live_aliases(self) -> list[weakref.ref[Tensor]]:
        return getattr(self, "_aliases", [])

    def host(self) -> tuple[float, ...]:
        """The values as floats. At most one device-to-host copy per change; on the CPU they are simply read."""
        if self.is_cpu:
            return tuple(self.tolist())
        return self._cached_host()

    def _cached_host(self) -> tuple[float, ...]:
        cached: tuple[int, tuple[float, ...]] | None = getattr(self, "_host", None)
        if cached is not None and cached[0] == self._version and not any(a() is not None for a in self._live_aliases()):
            return cached[1]
        values = tuple(self.tolist())
        self._host = (self._version, values)
        return values

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.detach(), self.requires_grad)


def host_values(stride: Tensor) -> tuple[float, ...]:
    """The entries of `stride` as floats, without a copy from the device where that can be avoided."""
    return stride.host() if isinstance(stride, StrideParameter) else tuple(stride.tolist())
