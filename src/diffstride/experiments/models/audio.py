"""Networks for sounds, on spectrograms and on waveforms, with the downsampling method as an argument."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from diffstride import _validation
from diffstride.experiments.models.downsample import DownsampleFactory, Stride, make_downsample
from diffstride.experiments.models.network import (
    Network,
    check_strides,
    comes_first,
    draw_convolutions,
    make_classifier,
    placed,
    widened,
)  # fmt: skip
from diffstride.nn.attach import Placement
from diffstride.nn.learnable import LearnableStrides

_CHANNELS = 64, 128, 256, 256, 512, 512  # of the paper's audio network, Section 4.1
_STRIDES = (2, 2), (2, 2), (1, 1), (2, 2), (1, 1), (2, 2)


class SpectrogramBlock(nn.Sequential):
    """A block of `AudioCNN`: convolution along time, then along frequency, then the downsampling.

    `y = bn(relu(D W_f bn(relu(W_t x))))` with `W_t` of 3x1 and `W_f` of 1x3 taps: `[B, in_channels, T, F]` to
    `[B, channels, T', F']`. For `downsample="conv"`, each of the two convolutions is strided along its own axis.
    With `placement="before"`, `D` comes before both convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: Stride,
        downsample: str | DownsampleFactory = "diffstride",
        downsample_options: Mapping[str, Any] | None = None,
        placement: Placement = "after",
    ) -> None:
        strides, down = make_downsample(downsample, stride, **(downsample_options or {}))
        time, frequency = (strides, strides) if isinstance(strides, int) else strides
        block = OrderedDict[str, nn.Module](
            time=nn.Conv2d(in_channels, channels, (3, 1), (time, 1), padding=(1, 0)),
            relu=nn.ReLU(),
            norm=nn.BatchNorm2d(channels),
            frequency=nn.Conv2d(channels, channels, (1, 3), (1, frequency), padding=(0, 1)),
            down=down,
            relu2=nn.ReLU(),
            norm2=nn.BatchNorm2d(channels),
        )
        if comes_first(placement):
            block.move_to_end("down", last=False)
        super().__init__(block)


class AudioCNN(Network):
    """The audio network of Riad et al. 2022, Section 4.1, on log-compressed mel spectrograms.

    Six blocks (`SpectrogramBlock`) of 64, 128, 256, 256, 512 and 512 channels, the maximum over time and
    frequency, and one linear layer per task.

    Args:
        num_classes: Number of classes; for several tasks, by their names.
        in_channels: Channels of the input.
        width: Factor on all channels, which are rounded and at least 1.
        downsample: `"conv"`, `"avg"`, `"max"`, `"blur"`, `"spectral"` or `"diffstride"`, or a function from
            a stride to a layer; see `make_downsample`.
        strides: Initial strides of the six blocks: numbers or pairs (time, frequency). Strides of 1 are learned too.
        placement: "after" (the paper) or "before" the two convolutions of a block. Before them, the layer resamples the
            block's input, and the convolutions work on the small map.
        downsample_options: Options of `DiffStride2d`, such as `smoothness`.

    Shape:
        `[B, in_channels, T, F]` to logits `[B, num_classes]`, or to a mapping from task to logits.
    """

    def __init__(
        self,
        *,
        num_classes: int | dict[str, int] = 10,
        in_channels: int = 1,
        width: float = 1.0,
        downsample: str | DownsampleFactory = "diffstride",
        strides: Sequence[Stride] = _STRIDES,
        placement: Placement = "after",
        downsample_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        channels = widened(_CHANNELS, width)
        check_strides(strides, len(channels), len(channels))
        self.blocks = nn.Sequential()
        for before, after, stride in zip((in_channels, *channels), channels, strides, strict=False):
            self.blocks.append(SpectrogramBlock(before, after, stride, downsample, downsample_options, placement))
        self.classifier = make_classifier(channels[-1], num_classes)
        draw_convolutions(self)

    def forward(self, x: Tensor) -> Any:
        return self.classifier(self.blocks(x).amax((-2, -1)))


class WaveformCNN(Network):
    """A network on raw waveforms and other time series.

    Four blocks `relu(bn(D W x))` of 64, 128, 256 and 512 channels with convolutions of 65, 3, 3 and 3 taps, the
    maximum over time, and one linear layer per task. The first layer downsamples strongly. With `channels` of 128, 256
    and 128, `kernels` of 7, 5 and 3, strides of 1 and the mean over time, it is the fully convolutional network of Wang
    et al. 2017, but for the first kernel, which has 8 taps there.

    The width of the window's ramp is `ramp` times the length of the axis, not a constant. A gradient step on a stride
    `S` moves the window's edge `N/(2S)` by a number of bins that grows with `N`. On an axis of thousands of samples,
    the edge can jump over a ramp of 4 bins, and a frequency behind it then has no gradient that could recover it. On
    the other hand, no stride removes frequencies below the width of the ramp, `ramp` times the sample rate in Hz. The
    price is a larger map: `N' = N/S + 2 ramp N`.

    Args:
        num_classes: Number of classes; for several tasks, by their names.
        in_channels: Channels of the waveform.
        length: Samples of a waveform, which determine the ramps. Waveforms of other lengths are accepted too.
        width: Factor on all channels, which are rounded and at least 1.
        channels: Channels of the blocks at a width of 1.
        kernels: Taps of their convolutions, odd numbers.
        pooling: "max" or "mean" over time, before the linear layer.
        downsample: See `AudioCNN`; `"blur"` is not available.
        strides: Initial strides of the blocks.
        ramp: Width of the ramps as a fraction of the axis at the initial strides.
        placement: "after" or "before" the convolution of a block.
        downsample_options: Options of `DiffStride1d`. A `smoothness`, in bins, overrides `ramp`.

    Shape:
        `[B, in_channels, T]` to logits `[B, num_classes]`, or to a mapping from task to logits.
    """

    def __init__(
        self,
        *,
        num_classes: int | dict[str, int] = 10,
        in_channels: int = 1,
        length: int = 16_000,
        width: float = 1.0,
        channels: Sequence[int] = (64, 128, 256, 512),
        kernels: Sequence[int] = (65, 3, 3, 3),
        pooling: Literal["max", "mean"] = "max",
        downsample: str | DownsampleFactory = "diffstride",
        strides: Sequence[float] = (16, 4, 2, 2),
        placement: Placement = "after",
        ramp: float = 1 / 64,
        downsample_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.pooling = _validation.one_of("pooling", pooling, ("max", "mean"))
        channels = widened(channels, width)
        check_strides(strides, len(channels), len(channels))
        if len(kernels) != len(channels) or not all(kernel % 2 for kernel in kernels):
            raise ValueError(
                f"kernels must be {len(channels)} odd numbers, one for each of channels, got {list(kernels)}"
            )
        self.blocks = nn.Sequential()
        for before, after, kernel, stride in zip((in_channels, *channels), channels, kernels, strides, strict=False):
            options = {"smoothness": ramp * length} | (downsample_options or {})
            conv_stride, down = make_downsample(downsample, stride, ndim=1, **options)
            conv = nn.Conv1d(before, after, kernel, conv_stride, padding=kernel // 2, bias=False)  # type: ignore[arg-type]
            block = placed(conv, down, placement) | {"norm": nn.BatchNorm1d(after), "relu": nn.ReLU()}
            self.blocks.append(nn.Sequential(OrderedDict(block)))
            if isinstance(down, LearnableStrides):
                (length,) = down.output_size(length)
        self.classifier = make_classifier(channels[-1], num_classes)
        draw_convolutions(self)

    def forward(self, x: Tensor) -> Any:
        maps = self.blocks(x)
        return self.classifier(maps.amax(-1) if self.pooling == "max" else maps.mean(-1))
