"""Convolutions whose strides are trained: convolution and `DiffStride` as one operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from diffstride import _validation, functional
from diffstride.backends import Backend
from diffstride.functional import PADDING_MODES, Convolution
from diffstride.geometry import Basis, Norm, Window
from diffstride.nn._tracers import is_proxy
from diffstride.nn.diffstride import DiffStrideNd
from diffstride.nn.learnable import LearnableStrides


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module does what PyTorch's convolution does and nothing else, so that another can take its place."""
    base: Any = next((c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, c)), None)
    return (
        base is not None
        and type(module).forward is base.forward
        and type(module)._conv_forward is base._conv_forward  # type: ignore[attr-defined]
        and "forward" not in vars(module)
        and not hasattr(module, "parametrizations")
        and isinstance(module._parameters.get("weight"), nn.Parameter)  # not computed, as by the old weight_norm
        and not any(vars(module)[hooks] for hooks in _HOOKS)
        and all(name[0] == "_" for name in vars(module).keys() - _attributes_of(base))  # no owner reads them here
    )


@lru_cache(maxsize=3)
def _attributes_of(convolution: Any) -> frozenset[str]:
    return frozenset(vars(convolution(1, 1, 1, device="meta")))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class DiffStrideConvNd(LearnableStrides):
    """A convolution of stride 1 followed by `DiffStride`, computed as one exact operator.

    Both are linear. With `P` the resampling of an axis and `Z_i` the zero-filling shift of the convolution's tap `i`,
    `P conv(x) = sum_i W_i (P Z_i) x`: the input is resampled by the shifted operators `P Z_i`, and the convolution
    runs at the coarse resolution with its weight unchanged. Where that costs more (large kernels, strides close
    to 1), the convolution comes first; the results agree to rounding.

    Parameters and arguments are those of `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, and `stride` is learned as in
    `DiffStride2d`. The weight of an `nn.Conv2d` may be loaded; from the same seed it is initialised alike.

    Shape:
        `[B, in_channels, *spatial]` to `[B, out_channels, *output_size(spatial)]`; unbatched likewise.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: float | Sequence[float] = 2.0,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        smoothness: float = 4.0,
        shared: bool = False,
        bounds: tuple[float, float | None] = (1.0, None),
        window: Window = "outer",
        basis: Basis = "dft",
        norm: Norm = "forward",
        size_multiple: int = 1,
        backend: Backend = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layer.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            kernel_size: taps of the convolution, one number or one per axis.
            stride: initial strides >= 1, one number or one per axis; learned.
            padding: zeros (or what `padding_mode` says) on both sides of an axis; `"same"` and `"valid"` as in PyTorch.
            dilation: distance between taps.
            groups: groups of channels.
            bias: whether a bias is learned.
            padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`; all but zeros convolve first.
            smoothness: as in `DiffStride2d`, likewise all that follow.
            shared: one stride for all axes.
            bounds: `(lower, upper)` of the strides.
            window: `"outer"` or `"inner"`; the inner one gives maps as small as a strided convolution's.
            basis: `"dft"` or `"dct"`.
            norm: `"forward"`, `"ortho"` or `"backward"`.
            size_multiple: round output sizes up to a multiple of this.
            backend: of the resampling after a convolution; shifted operators are always dense.
            device: of the parameters.
            dtype: of weight and bias; the stride is never narrower than float32.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: as in `DiffStride2d`; channels not divisible by `groups`, an unknown padding or padding mode.
        """
        super().__init__(
            stride,
            smoothness,
            shared=shared,
            bounds=bounds,
            window=window,
            basis=basis,
            norm=norm,
            size_multiple=size_multiple,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name} must be divisible by groups={groups}, got {channels}")
        self.kernel_size = _validation.sizes("kernel_size", kernel_size, self.ndim)
        self.dilation = _validation.sizes("dilation", dilation, self.ndim)
        self.padding_mode = _validation.one_of("padding_mode", padding_mode, PADDING_MODES)
        self.padding = _validation.padding(padding, self.ndim)
        self.weight = nn.Parameter(
            torch.empty(self.out_channels, self.in_channels // groups, *self.kernel_size, device=device, dtype=dtype)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def fuse(cls, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, layer: DiffStrideNd) -> Self:
        """`nn.Sequential(conv, layer)` as one layer, with their parameters (not copies of them).

        Args:
            conv: a convolution of stride 1.
            layer: the `DiffStride` after it. It may serve elsewhere too, and the stride is shared. Keeps `size_offset`.

        Raises:
            TypeError: other modules than these.
            ValueError: a convolution that is strided, a layer with another number of axes.
        """
        if not is_plain_convolution(conv) or not isinstance(layer, DiffStrideNd) or "stride" not in layer._parameters:
            raise TypeError(
                "conv and layer must be a plain nn.Conv (no forward of its own, hooks or parametrizations) and a "
                f"DiffStride, got {type(conv).__name__}, {type(layer).__name__}"
            )
        if conv.stride != (1,) * cls.ndim or layer.ndim != cls.ndim:
            raise ValueError(
                f"conv must have stride 1 and {cls.ndim} spatial axes like the layer, got stride {conv.stride} "
                f"and a layer of {layer.ndim}"
            )
        fused = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, layer.initial_strides, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, shared=layer.shared, device="meta",
            **layer._settings._asdict(),
        )  # fmt: skip
        fused.size_offset = layer.size_offset
        fused.weight, fused.bias, fused.stride = conv.weight, conv.bias, layer.stride  # type: ignore[assignment]
        return fused

    def reset_parameters(self) -> None:
        """Draw weight and bias as PyTorch's convolutions do, and set the strides back to the initial ones."""
        self.reset_strides()
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and downsample `x`."""
        if is_proxy(x):
            return self.as_leaf(x)  # type: ignore[no-any-return]
        spatial = _validation.spatial_sizes(x, self.ndim)
        _validation.channels(x, self.ndim, self.in_channels)
        return functional.conv_downsample(
            x, self.weight, self.bias, *self._resolved(spatial), self._convolution, self._settings
        )

    def convolution_macs(self, spatial: Sequence[int]) -> int:
        """Multiply-accumulates of the convolution itself on one input of these sizes, at the size at which it runs."""
        out_channels, in_channels = self.weight.shape[:2]
        return functional.convolution_macs(
            (out_channels, in_channels), spatial, self.output_size(spatial), self._convolution
        )

    @property
    def _convolution(self) -> Convolution:
        if isinstance(self.padding, str):
            total = [
                d * (k - 1) if self.padding == "same" else 0
                for k, d in zip(self.kernel_size, self.dilation, strict=True)
            ]
            sides = tuple((t // 2, t - t // 2) for t in total)
        else:
            sides = tuple((p, p) for p in self.padding)
        return Convolution(self.kernel_size, sides, self.dilation, self.groups, self.padding_mode)

    def _window_size(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        return self._convolution.sizes(spatial)

    def extra_repr(self) -> str:
        """Those of the convolution, then those of the strides."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        defaults = {
            "padding": (0,) * self.ndim, "dilation": (1,) * self.ndim, "groups": 1, "padding_mode": "zeros",
        }  # fmt: skip
        parts += [f"{k}={getattr(self, k)!r}" for k, default in defaults.items() if getattr(self, k) != default]
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join([*parts, super().extra_repr()])


@final
class DiffStrideConv1d(DiffStrideConvNd):
    """Convolution with a learnable stride, for `[B, C, L]` or `[C, L]`."""

    ndim = 1


@final
class DiffStrideConv2d(DiffStrideConvNd):
    """Convolution with learnable strides along height and width, for `[B, C, H, W]` or `[C, H, W]`."""

    ndim = 2


@final
class DiffStrideConv3d(DiffStrideConvNd):
    """Convolution with learnable strides along depth, height and width, for `[B, C, D, H, W]` or `[C, D, H, W]`."""

    ndim = 3
