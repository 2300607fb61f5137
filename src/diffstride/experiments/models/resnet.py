"""Residual networks for CIFAR and ImageNet, with the downsampling method as an argument."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from diffstride.experiments.models.downsample import DownsampleFactory, Stride, make_downsample
from diffstride.experiments.models.network import (
    Initialization,
    Network,
    check_strides,
    comes_first,
    draw_convolutions,
    make_classifier,
    placed,
    widened,
)  # fmt: skip
from diffstride.nn import DiffStride2d
from diffstride.nn.attach import Placement


class _Architecture(NamedTuple):
    blocks: tuple[int, ...]  # residual blocks per stage
    channels: tuple[int, ...]  # of the 3x3 convolutions, per stage
    kernels: tuple[int, ...]  # of the convolutions of one block
    expansion: int  # channels that leave a block over those of its 3x3 convolutions


# He et al. 2016, "Deep residual learning for image recognition", Table 1 and Section 4.2.
_ARCHITECTURES = {
    18: _Architecture((2, 2, 2, 2), (64, 128, 256, 512), (3, 3), 1),
    50: _Architecture((3, 4, 6, 3), (64, 128, 256, 512), (1, 3, 1), 4),
    56: _Architecture((9, 9, 9), (16, 32, 64), (3, 3), 1),
}


class ResidualBlock(nn.Module):
    """A residual block whose main path and shortcut share one downsampling layer (Figure 2 of Riad et al. 2022).

    With `D` the downsampling, `W` the convolutions and `W_s` the 1x1 convolution of the shortcut:

    - post-activation (He et al. 2015), normalisation and ReLU after each convolution:
      `y = relu(bn(W_2 relu(bn(D W_1 x))) + bn(W_s D x))`;
    - pre-activation (He et al. 2016), normalisation and ReLU before it, with `a = relu(bn(x))`:
      `y = W_2 relu(bn(D W_1 a)) + W_s D a`.

    `D` is one module applied twice. On the shortcut it comes before the 1x1 convolution, which is cheaper and gives the
    same result for every linear `D`. For `downsample="conv"` the two convolutions are strided instead. Without a
    projection the shortcut is the identity.

    With `placement="before"`, `W_1 D` replaces `D W_1`. Where `W_1` is the first convolution, both paths use one `D x`.
    With `raw_shortcut`, the shortcut of the second form is `W_s D x`.

    Args:
        in_channels: Channels of the input.
        channels: Channels of each convolution, in order; the last is the block's output.
        kernels: Kernel sizes of the convolutions. The first 3x3 one downsamples.
        stride: Stride of the block; None for a block that has no downsampling.
        preactivation: Use the second form.
        raw_shortcut: Feed the shortcut's projection with the block's input, not with the activated one.
        downsample: See `make_downsample`.
        placement: "after" or "before" the convolution that downsamples; see `ResNet`.
        options: See `make_downsample`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        kernels: Sequence[int],
        *,
        stride: Stride | None = None,
        preactivation: bool = False,
        raw_shortcut: bool = False,
        downsample: str | DownsampleFactory = "conv",
        placement: Placement = "after",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.preactivation, self.raw_shortcut = preactivation, raw_shortcut
        self.downsample_at = kernels.index(3)
        conv_stride, self.down = make_downsample(downsample, stride, **(options or {}))
        widths = [in_channels, *channels]
        self.convs = nn.ModuleList(
            _conv(a, b, kernel, conv_stride if i == self.downsample_at else 1)
            for i, ((a, b), kernel) in enumerate(zip(pairwise(widths), kernels, strict=True))
        )
        self.convs[self.downsample_at] = placed(self.convs[self.downsample_at], self.down, placement)["conv"]
        # Kept, since `ds.freeze` may replace the layers by plain ones. A fused convolution has the shortcut's stride.
        self.down_before = comes_first(placement)
        self.down_after = not self.down_before and not isinstance(self.down, DiffStride2d)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (widths[:-1] if preactivation else channels))
        self.project: nn.Module | None = None
        if stride is not None or in_channels != channels[-1]:
            self.project = _conv(in_channels, channels[-1], 1, conv_stride)
            if not preactivation:
                self.project = nn.Sequential(self.project, nn.BatchNorm2d(channels[-1]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x).relu() if self.preactivation else x
        small = self.down(y)
        shortcut = x if self.project is None else self.project(self.down(x) if self.raw_shortcut else small)
        last = len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if self.preactivation and i > 0:
                y = norm(y).relu()
            if i == self.downsample_at and self.down_before:
                y = small if i == 0 else self.down(y)
            y = conv(y)
            if i == self.downsample_at and self.down_after:
                y = self.down(y)
            if not self.preactivation:
                y = norm(y)
                y = y.relu() if i < last else y
        y = y + shortcut
        return y if self.preactivation else y.relu()


class ResNet(Network):
    """A ResNet-18, -50 or -56 for small or large images, with any downsampling method.

    Networks that differ in `downsample` alone have the same convolutions and, from the same seed, the same initial
    weights, unless a layer made by a function draws random numbers.

    Args:
        depth: 18 (stages of 2, 2, 2, 2 basic blocks with 64 to 512 channels), 50 (3, 4, 6, 3 bottleneck blocks, 256 to
            2048 channels, downsampling at the 3x3 convolution) or 56 (9, 9, 9 basic blocks, 16 to 64 channels).
        num_classes: Number of classes; for several tasks, by their names.
        in_channels: Channels of the images.
        stem: "cifar" is a 3x3 convolution of stride 1, "imagenet" a 7x7 convolution of stride 2 and a 3x3 max pooling
            of stride 2.
        preactivation: Normalise and activate before each convolution instead of after it.
        raw_shortcut: With pre-activation, the projections on shortcuts see the block's input instead of the activated
            one, as in the authors' program.
        width: Factor on the number of channels of every layer.
        downsample: "conv" (strided convolutions), "avg" or "max" (convolution, then pooling), "blur" (convolution,
            then anti-aliased pooling), "spectral" (convolution, then fixed spectral pooling, fractional strides
            allowed), "diffstride" (convolution, then a learned stride), or a function from a stride to a layer.
        strides: Initial strides, numbers or pairs (height, width). They belong to the last of: stem, stage 1, stage 2,
            ... So for ResNet-18 three entries are stages 2 to 4, as in the paper, and five are the stem and all
            stages, as in the authors' release. Every entry gets a layer of its own, also an entry of 1. A stage with
            an entry starts with a projection on the shortcut. A stage without an entry, or with null, does not
            downsample. A stem without an entry is the standard one. An entry for the "imagenet" stem replaces the
            stride of its convolution. Default: 2 for every stage but the first.
        placement: "after" (the paper) or "before" the convolution. Before it, the layer resamples the convolution's
            input, and the convolution works on the small map, which costs what a strided convolution costs. "conv" has
            no layer to place.
        downsample_options: Options of DiffStride2d (smoothness, window, basis, norm, shared, bounds, ...) for every
            downsampling layer. Methods that have no such option ignore it.
        initialization: Of the convolutions: "fan_out" (He et al. 2015, Eq. 14) or "fan_in_truncated" (Keras'
            `he_normal`, as in the authors' program).

    Raises:
        ValueError: There are no strides or too many, or `make_downsample` refuses a stride or the method.

    Shape:
        `[B, in_channels, H, W]` to `[B, num_classes]`, for any `H` and `W`.
    """

    def __init__(
        self,
        *,
        depth: Literal[18, 50, 56] = 18,
        num_classes: int | dict[str, int] = 10,
        in_channels: int = 3,
        stem: Literal["cifar", "imagenet"] = "cifar",
        preactivation: bool = False,
        raw_shortcut: bool = False,
        width: float = 1.0,
        downsample: str | DownsampleFactory = "conv",
        strides: Sequence[Stride | None] | None = None,
        placement: Placement = "after",
        downsample_options: dict[str, Any] | None = None,
        initialization: Initialization = "fan_out",
    ) -> None:
        super().__init__()
        arch = _ARCHITECTURES[depth]
        places = 1 + len(arch.blocks)
        strides = [2.0] * (places - 2) if strides is None else strides
        check_strides(strides, 1, places, f" (the stem and {places - 1} stages, counted from the last)")
        stem_stride, *stage_strides = [None] * (places - len(strides)) + list(strides)

        of_stages = widened(arch.channels, width)
        channels = of_stages[0]
        conv_stride, down = make_downsample(downsample, stem_stride, **(downsample_options or {}))
        if stem == "imagenet" and stem_stride is None:
            conv_stride = 2
        conv = _conv(in_channels, channels, {"cifar": 3, "imagenet": 7}[stem], conv_stride)
        layers = placed(conv, down, placement)
        if not preactivation:
            layers |= {"norm": nn.BatchNorm2d(channels), "relu": nn.ReLU()}
        if stem == "imagenet":
            layers["pool"] = nn.MaxPool2d(3, 2, padding=1)
        self.stem = nn.Sequential(OrderedDict(layers))
        stages = []
        for blocks, base, stage_stride in zip(arch.blocks, of_stages, stage_strides, strict=True):
            widths = [base] * (len(arch.kernels) - 1) + [base * arch.expansion]
            stage = []
            for i in range(blocks):
                block = ResidualBlock(
                    channels, widths, arch.kernels, stride=stage_stride if i == 0 else None,
                    preactivation=preactivation, raw_shortcut=raw_shortcut, downsample=downsample, placement=placement,
                    options=downsample_options,
                )  # fmt: skip
                stage.append(block)
                channels = widths[-1]
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()) if preactivation else nn.Identity()
        self.classifier = make_classifier(channels, num_classes)
        draw_convolutions(self, initialization)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.stages(self.stem(x)))
        return self.classifier(y.mean((-2, -1)))


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int | tuple[int, int]) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
