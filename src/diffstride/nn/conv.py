"""Convolutions whose strides are trained: convolution and `DiffStride` as one operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from diffstride import _validation
from diffstride.backends import Backend
from diffstride.geometry import Basis, Norm, Window
from diffstride.nn._fused import PADDING_MODES, ConvDownsample, Convolution, Schedule, as_autocast, make_schedule
from diffstride.nn._tracers import is_proxy
from diffstride.nn.diffstride import DiffStrideNd
from diffstride.nn.learnable import LearnableStrides
from diffstride.options import Bounds, LayerOptions


def is_plain_convolution(module: nn.Module) -> bool:
    """Return whether a module computes what PyTorch's convolution does and nothing else, so that it can be replaced."""
    base: Any = next((c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, c)), None)
    return (
        base is not None
        and type(module).forward is base.forward
        and type(module)._conv_forward is base._conv_forward  # type: ignore[attr-defined]
        and "forward" not in vars(module)
        and not hasattr(module, "parametrizations")
        and isinstance(module._parameters.get("weight"), nn.Parameter)  # not computed, as by the old weight_norm
        and not any(vars(module)[hooks] for hooks in _HOOKS)
        # An owner may read attributes of its own.
        and all(name[0] == "_" for name in vars(module).keys() - {*base.__constants__, "transposed", "training"})
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class DiffStrideConvNd(LearnableStrides):
    """A convolution of stride 1 followed by `DiffStride`, computed as one exact operator.

    Both are linear. With `P` the resampling of an axis and `Z_i` the zero-filling shift of the convolution's tap `i`,
    `P conv(x) = sum_i W_i (P Z_i) x`. The input is resampled by the shifted operators `P Z_i`, and the convolution runs
    at the coarse resolution with the same weight. Where that costs more (large kernels, strides close to 1), the
    convolution comes first. The results agree to rounding.

    Parameters and arguments are those of `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, and `stride` is learned as in
    `DiffStride2d`. Weights of an `nn.Conv2d` can be loaded. The same seed initialises both alike.

    Shape:
        `[B, in_channels, *spatial]` to `[B, out_channels, *output_size(spatial)]`; also unbatched.
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
        bounds: Bounds = (1.0, None),
        window: Window = "outer",
        basis: Basis = "dft",
        norm: Norm = "forward",
        size_multiple: int = 1,
        backend: Backend = "auto",
        recompute: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layer.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            kernel_size: taps of the convolution, one number or one per axis.
            stride: initial strides >= 1, one number or one per axis; learned.
            padding: samples on both sides of an axis, `"same"` or `"valid"`, as in PyTorch.
            dilation: distance between taps.
            groups: groups of channels.
            bias: learn a bias.
            padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`; all but zeros convolve first.
            smoothness: as in `DiffStride2d`, like all options that follow.
            shared: one stride for all axes.
            bounds: `(lower, upper)` of the strides, or a pair for each axis.
            window: `"outer"`, `"inner"` or `"hard"`; the last two give maps as small as a strided convolution's.
            basis: `"dft"` or `"dct"`.
            norm: `"forward"`, `"ortho"` or `"backward"`.
            size_multiple: round output sizes up to a multiple of this.
            backend: the backend of resampling after the convolution; shifted operators are always dense.
            recompute: resample the input again in backward, in place of keeping the resampled one: less memory in
                training, more time. A compiled graph decides for itself what it keeps.
            device: the device of the parameters.
            dtype: the dtype of weight and bias; the stride is float32 or wider.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as in `DiffStride2d`; or channels are not divisible by `groups`, or a padding is unknown.
        """
        options = LayerOptions(
            smoothness=smoothness, shared=shared, bounds=bounds, window=window, basis=basis, norm=norm,
            size_multiple=size_multiple, backend=backend,
        )  # fmt: skip
        super().__init__(stride, options, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.recompute = recompute
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name} must be divisible by groups={groups}, got {channels}")
        self.kernel_size = _validation.sizes("kernel_size", kernel_size, self.ndim)
        self.dilation = _validation.sizes("dilation", dilation, self.ndim)
        self.padding_mode = _validation.one_of("padding_mode", padding_mode, PADDING_MODES)
        self.padding = (
            _validation.one_of("padding", padding, ("same", "valid"))
            if isinstance(padding, str)
            else tuple(
                _validation.integer("padding", n, 0) for n in _validation.per_axis("padding", padding, self.ndim)
            )
        )
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
        """Make one layer of `nn.Sequential(conv, layer)`, with their parameters (not copies of them).

        Args:
            conv: a convolution of stride 1.
            layer: the `DiffStride` after it. Where it is used elsewhere, too, the stride is shared.

        Raises:
            TypeError: `conv` is not a plain convolution, or `layer` not a `DiffStride`.
            ValueError: `conv` is strided, or the number of axes differs.
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
        initial: Any = layer._initial[0] if layer.shared else layer._initial
        fused = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, initial, conv.padding, conv.dilation, conv.groups,
            conv.bias is not None, conv.padding_mode, device="meta", **asdict(layer.options),
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
        cast = as_autocast(x)
        if torch.compiler.is_compiling():
            schedule = self.schedule(x.shape[-self.ndim :], self._sizes_in_graph(x))
            return schedule.run_in_graph(cast, self.weight, self.bias, self._strides(), self._options_text)
        strides, conv_downsample = self._prepared(cast)
        return conv_downsample(cast, self.weight, self.bias, strides)  # type: ignore[no-any-return]

    def _prepare(self, x: Tensor, spatial: tuple[int, ...], new_sizes: tuple[int, ...]) -> ConvDownsample:
        if x.shape[-self.ndim - 1] != self.in_channels:
            raise ValueError(f"input must have {self.in_channels} channels, got shape {tuple(x.shape)}")
        return ConvDownsample(self.schedule(spatial, new_sizes), x, self.recompute)

    @property
    def convolution(self) -> Convolution:
        """The arguments of the convolution, at stride 1."""
        if isinstance(self.padding, str):
            same = self.padding == "same"
            total = [d * (k - 1) if same else 0 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
            sides = tuple((t // 2, t - t // 2) for t in total)
        else:
            sides = tuple((p, p) for p in self.padding)
        return Convolution(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel=self.kernel_size,
            padding=sides,
            dilation=self.dilation,
            stride=(1,) * self.ndim,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )

    def schedule(self, spatial: Sequence[int], new_sizes: Sequence[int]) -> Schedule:
        """Return the cheapest order of convolution and resampling."""
        return make_schedule(self.convolution, self.options, spatial, new_sizes)

    def window_size(self, spatial: Sequence[Any]) -> Sequence[Any]:
        """Return the sizes that the convolution gives at stride 1, for sizes in any kind of number."""
        return self.convolution.full_sizes(spatial)

    def extra_repr(self) -> str:
        """Return the arguments of the convolution, then those of the strides."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        defaults = {
            "padding": (0,) * self.ndim, "dilation": (1,) * self.ndim, "groups": 1, "padding_mode": "zeros",
        }  # fmt: skip
        parts += [f"{k}={getattr(self, k)!r}" for k, default in defaults.items() if getattr(self, k) != default]
        if self.bias is None:
            parts.append("bias=False")
        if self.recompute:
            parts.append("recompute=True")
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
