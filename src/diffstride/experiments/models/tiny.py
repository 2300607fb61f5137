"""The smallest network with one stride to learn."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from diffstride.experiments.models.downsample import DownsampleFactory, Stride, make_downsample
from diffstride.experiments.models.network import Network, check_strides, comes_first, make_classifier
from diffstride.nn.attach import Placement


class TinyCNN(Network):
    """A network of two convolutions with one downsampling between them, the least that a single stride needs.

    `3x3 conv -> downsampling -> bn -> relu -> 3x3 conv -> bn -> relu -> mean -> linear`. Borders wrap around, so that
    the frequencies of periodic images, such as the planted bands, do not change.

    Args:
        num_classes: Number of classes; for several tasks, by their names.
        in_channels: Channels of the images.
        width: Channels of the first convolution; the second has twice as many.
        downsample: See `ResNet`.
        strides: The one initial stride, in a list: a number or a pair (height, width).
        placement: See `ResNet`; of the first convolution.
        downsample_options: See `ResNet`.

    Shape:
        `[B, in_channels, H, W]` to `[B, num_classes]`.
    """

    def __init__(
        self,
        *,
        num_classes: int | dict[str, int] = 4,
        in_channels: int = 1,
        width: int = 16,
        downsample: str | DownsampleFactory = "diffstride",
        strides: Sequence[Stride] = (2.0,),
        placement: Placement = "after",
        downsample_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_strides(strides, 1, 1)
        conv_stride, down = make_downsample(downsample, strides[0], **(downsample_options or {}))
        self.conv = _conv(in_channels, width, conv_stride)
        self.down = down
        self.down_first = comes_first(placement)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, 2 * width, 1)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.classifier = make_classifier(2 * width, num_classes)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(self.down(x)) if self.down_first else self.down(self.conv(x))
        y = self.norm(y).relu()
        y = self.norm2(self.conv2(y)).relu()
        return self.classifier(y.mean((-2, -1)))


def _conv(in_channels: int, out_channels: int, stride: int | tuple[int, int]) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False, padding_mode="circular")
