"""DenseNet for CIFAR, with the downsampling method of its transitions as an argument."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffstride import _validation
from diffstride.experiments.models.downsample import DownsampleFactory, Stride, make_downsample
from diffstride.experiments.models.network import Network, check_strides, draw_convolutions, make_classifier, placed
from diffstride.nn.attach import Placement


class DenseLayer(nn.Module):
    """A bottleneck layer that appends `growth` channels to its input (Huang et al. 2017, DenseNet-B).

    `y = [x, W_2 relu(bn(W_1 relu(bn(x))))]` with `W_1` of 1x1 and `4 growth` channels, `W_2` of 3x3.
    """

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, in_channels + growth, H, W]` from `[B, in_channels, H, W]`."""
        y = self.conv1(self.norm1(x).relu())
        y = self.conv2(self.norm2(y).relu())
        return torch.cat([x, y], 1)


class DenseNet(Network):
    """A DenseNet-BC for small images (Huang et al. 2017), with any downsampling method in its transitions.

    It has a 3x3 convolution, three dense blocks with a transition after the first and the second, global average
    pooling and a linear layer. A transition is `D W relu(bn(x))` with `W` of 1x1 and `D` the downsampling. In the paper
    `D` is 2x2 average pooling, `downsample="avg"`. Riad et al. 2022 name this the architecture where learned strides
    are hard: all maps of a block have one size, so that one stride determines the cost of all later layers.

    Cost in million multiply-accumulates of an image of 32x32 at strides (2, 2), without resampling:

    | downsampling                    | L = 40, k = 12 | L = 100, k = 12 |
    |---------------------------------|----------------|-----------------|
    | average pooling                 | 72             | 288             |
    | strided convolution             | 67             | 261             |
    | learned, inner window           | 72             | 261             |
    | learned, outer window, R = 1    | 80             | 313             |
    | learned, outer window, R = 4    | 111            | 467             |
    | learned, both strides fall to 1 | 174            | 760             |

    More than six tenths of the standard network's cost is in the first block, which no transition makes smaller.

    Networks that differ in `downsample` alone have the same convolutions and, from the same seed, the same initial
    weights.

    Args:
        depth: Number of layers with weights, `6 n + 4` for `n` layers a block.
        growth: Channels that every layer appends.
        compression: Fraction of the channels that a transition keeps, above 0 and at most 1.
        num_classes: Number of classes; for several tasks, by their names.
        in_channels: Channels of the images.
        downsample: See `ResNet`.
        strides: Initial strides, numbers or pairs (height, width), of the last of: stem, transition 1, transition 2.
        placement: See `ResNet`; in a transition, of the order of `D` and `W`.
        downsample_options: See `ResNet`.

    Raises:
        ValueError: The depth is not `6 n + 4`, there are no strides or more than three, or the compression is out of
            range.

    Shape:
        `[B, in_channels, H, W]` to `[B, num_classes]`, for any `H` and `W`.
    """

    def __init__(
        self,
        *,
        depth: int = 100,
        growth: int = 12,
        compression: float = 0.5,
        num_classes: int | dict[str, int] = 10,
        in_channels: int = 3,
        downsample: str | DownsampleFactory = "avg",
        strides: Sequence[Stride] = (2.0, 2.0),
        placement: Placement = "after",
        downsample_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 with n >= 1, as 40 and 100 are, got {depth}")
        _validation.positive_up_to("compression", compression, 1)
        check_strides(strides, 1, 3, " (the stem and 2 transitions, counted from the last)")
        stem_stride, *transition_strides = [None] * (3 - len(strides)) + list(strides)

        def convolve(in_channels: int, out_channels: int, kernel: int, stride: Stride | None) -> dict[str, nn.Module]:
            conv_stride, down = make_downsample(downsample, stride, **(downsample_options or {}))
            conv = nn.Conv2d(in_channels, out_channels, kernel, conv_stride, padding=kernel // 2, bias=False)
            return placed(conv, down, placement)

        channels = 2 * growth
        self.stem = nn.Sequential(OrderedDict(convolve(in_channels, channels, 3, stem_stride)))
        parts: list[nn.Module] = []
        for i in range(3):
            layers = []
            for _ in range((depth - 4) // 6):
                layers.append(DenseLayer(channels, growth))
                channels += growth
            parts.append(nn.Sequential(*layers))
            if i < 2:
                kept = max(1, int(compression * channels))
                transition = {"norm": nn.BatchNorm2d(channels), "relu": nn.ReLU()}
                transition |= convolve(channels, kept, 1, transition_strides[i])
                parts.append(nn.Sequential(OrderedDict(transition)))
                channels = kept
        self.blocks = nn.Sequential(*parts)
        self.norm = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = make_classifier(channels, num_classes)
        draw_convolutions(self)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.blocks(self.stem(x)))
        return self.classifier(y.mean((-2, -1)))
