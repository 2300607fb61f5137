"""Small models with random weights on which `ds.convert` is tested: other people's and our own.

No model draws random numbers in its forward (dropout and its kin are off), so that two calls in training mode agree.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Case(NamedTuple):
    """A model, inputs of two sizes, and options of its conversion.

    `inputs(0)` and `inputs(1)` are a tensor, a tuple or a dict of keywords.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    options: Mapping[str, Any] = {}


def bare_call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensor_of(output: Any) -> torch.Tensor:
    """Return the main tensor of a model's output: logits, last hidden state, or the first tensor."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        named = [output[name] for name in ("logits", "last_hidden_state") if output.get(name) is not None]
        output = named or output.values()
    return tensor_of(next(value for value in output if isinstance(value, (torch.Tensor, Mapping, tuple, list))))


def maps(*sizes: tuple[int, ...], channels: int = 3) -> Callable[[int], torch.Tensor]:
    return lambda scale: torch.randn(2, channels, *sizes[scale])


def pixels(*sizes: tuple[int, ...]) -> Callable[[int], dict[str, torch.Tensor]]:
    return lambda scale: {"pixel_values": maps(*sizes)(scale)}


def pairs(*sizes: tuple[int, ...]) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    return lambda scale: (maps(*sizes)(scale), maps(*sizes)(scale))


# transformers, from their configs. Scales are such that the outputs depend on the inputs by more than rounding.


def resnet(layer_type):
    """A strided stem and a max pooling; two branches with strides meet in an addition in place."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24, 32], "depths": [1, 2, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type=layer_type, num_labels=10))


def convnext():
    """Patches of 4, then convolutions whose kernel is their stride; sizes round down. The head is a mean over axes."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = {"num_stages": 3, "hidden_sizes": [8, 16, 24], "depths": [1, 2, 1]}
    return ConvNextForImageClassification(ConvNextConfig(**sizes, layer_scale_init_value=1.0, num_labels=10))


def regnet():
    """Grouped strided convolutions with squeeze and excitation; the first stage has a stride too."""
    from transformers import RegNetConfig, RegNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24, 32], "depths": [1, 2, 1], "groups_width": 8}
    return RegNetForImageClassification(RegNetConfig(**sizes, num_labels=10))


def mobilenet_v1():
    """Pads as TensorFlow: `convolution.stride` and the map's size are read outside of the (depthwise) convolution."""
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    config = MobileNetV1Config(depth_multiplier=0.25, classifier_dropout_prob=0.0, initializer_range=0.3, num_labels=10)
    return MobileNetV1ForImageClassification(config)


def mobilenet_v2():
    """A network like `mobilenet_v1`, with `int(shape)` and a residual; behind an output stride of 16 it dilates."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    sizes = {"depth_multiplier": 0.25, "finegrained_output": False, "output_stride": 16}
    config = MobileNetV2Config(**sizes, classifier_dropout_prob=0.0, initializer_range=0.3, num_labels=10)
    return MobileNetV2ForImageClassification(config)


def efficientnet():
    """Strided convolutions without padding behind ZeroPad2d, a subclass of Conv2d, and for the global pooling an
    AvgPool2d of stride 640 with ceil_mode whose output is reshaped to one sample.
    """
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        width_coefficient=0.5, depth_coefficient=1.0, in_channels=[32, 16, 24, 40], out_channels=[16, 24, 40, 80],
        kernel_sizes=[3, 3, 5, 3], strides=[1, 2, 2, 2], num_block_repeats=[1, 2, 1, 1], expand_ratios=[1, 4, 4, 4],
        hidden_dim=640, dropout_rate=0.0, drop_connect_rate=0.0, initializer_range=0.6, num_labels=10,
    )  # fmt: skip
    return EfficientNetForImageClassification(config)


def swin():
    """Patches from a strided convolution, then windows of 3 by 3 on [batch, length, channels]. Merging slices, with no
    module to convert. A layer that once sees a map as small as its window keeps its shift at 0 for good; a smaller map
    raises.
    """
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"image_size": 64, "embed_dim": 8, "depths": [2, 2, 1], "num_heads": [2, 2, 4], "window_size": 3}
    return SwinForImageClassification(SwinConfig(**sizes, drop_path_rate=0.0, initializer_range=0.2, num_labels=10))


def wav2vec2():
    """Four 1-D convolutions with strides and no padding, the first with a norm over time; then a transformer. In
    training mode forward sets requires_grad on a view of its input, and raises where the input needs a gradient.
    """
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    dropouts = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop")
    config = Wav2Vec2Config(
        conv_dim=[8, 16, 16, 24], conv_stride=[5, 2, 2, 2], conv_kernel=[10, 3, 3, 2], hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, apply_spec_augment=False, mask_time_prob=0.0, initializer_range=0.2,
        **dict.fromkeys(dropouts, 0.0),
    )  # fmt: skip
    return Wav2Vec2Model(config)


# Our own.


def conv_bn(inputs, outputs, kernel=3, stride=1, *, dim=2, padding=None, **options):
    convolution, norm = getattr(nn, f"Conv{dim}d"), getattr(nn, f"BatchNorm{dim}d")
    padding = kernel // 2 if padding is None else padding
    layer = convolution(inputs, outputs, kernel, stride, padding, bias=False, **options)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return [layer, norm(outputs)]


def block(*arguments, **options):
    return nn.Sequential(*conv_bn(*arguments, **options), nn.ReLU(inplace=True))


def head(width, dim=2):
    return [getattr(nn, f"AdaptiveAvgPool{dim}d")(1), nn.Flatten(), nn.Linear(width, 10, bias=False)]


def vgg():
    """A Sequential with activations in place and max poolings."""
    layers, width = [], 3
    for outputs in (8, 16, 24):
        layers += [block(width, outputs), block(outputs, outputs), nn.MaxPool2d(2)]
        width = outputs
    return nn.Sequential(*layers, *head(width))


class DenseBlock(nn.Module):
    """Every layer sees the maps of all before it."""

    def __init__(self, width, growth, depth):
        super().__init__()
        self.layers = nn.ModuleList(block(width + i * growth, growth) for i in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


def densenet():
    """Concatenations at one size; between them 1x1 convolutions and average poolings."""
    layers = [block(3, 8, 3, 2)]
    for _ in range(2):
        layers += [DenseBlock(8, 4, 3), nn.Sequential(block(20, 8, 1), nn.AvgPool2d(2))]
    return nn.Sequential(*layers, DenseBlock(8, 4, 2), *head(16))


class Reduction(nn.Module):
    """Three branches of three kinds that must come out at one size, whatever the padding."""

    def __init__(self, width, outputs, padding):
        super().__init__()
        self.short = block(width, outputs, 3, 2, padding=padding)
        last = block(outputs, outputs, 3, 2, padding=padding)
        self.long = nn.Sequential(block(width, outputs, 1), block(outputs, outputs), last)
        self.pool = nn.MaxPool2d(3, stride=2, padding=padding)

    def forward(self, x):
        return torch.cat([self.short(x), self.long(x), self.pool(x)], dim=1)


def inception():
    """Two reductions, padded and not, whose branches are concatenated."""
    reductions = [Reduction(8, 8, padding=1), block(24, 16), Reduction(16, 8, padding=0)]
    return nn.Sequential(block(3, 8, 3, 2, padding=0), *reductions, block(32, 24, 1), *head(24))


class Residual(nn.Module):
    """A block whose shortcut is given from outside."""

    def __init__(self, inputs, outputs, stride, shortcut, dim=2):
        super().__init__()
        last = nn.Sequential(*conv_bn(outputs, outputs, dim=dim))
        self.main = nn.Sequential(block(inputs, outputs, 3, stride, dim=dim), last)
        self.shortcut = shortcut

    def forward(self, x):
        return F.relu(self.main(x) + self.shortcut(x))


def resnet_d():
    """Shortcuts of AvgPool2d(2, 2) round down, main paths round up: the sizes must be even."""
    layers, width = [block(3, 8, 3, 2)], 8
    for outputs in (16, 24):
        shortcut = nn.Sequential(nn.AvgPool2d(2, 2), *conv_bn(width, outputs, 1))
        layers += [Residual(width, outputs, 2, shortcut), Residual(outputs, outputs, 1, nn.Identity())]
        width = outputs
    return nn.Sequential(*layers, *head(width))


def resnet_3d():
    """A residual network whose short axis of time is halved twice, to 2 samples."""
    layers, width = [block(1, 8, 3, (1, 2, 2), dim=3)], 8
    for outputs in (8, 16, 16):
        stride = 1 if outputs == width else 2
        shortcut = nn.Identity() if stride == 1 else nn.Sequential(*conv_bn(width, outputs, 1, stride, dim=3))
        layers += [Residual(width, outputs, stride, shortcut, dim=3)]
        width = outputs
    layers += [block(width, 24, 3, 2, dim=3)]
    return nn.Sequential(*layers, *head(24, dim=3))


class UNet(nn.Module):
    """Max poolings down, Upsample by 2 and a concatenated skip up: the sizes must be multiples of 8."""

    def __init__(self, widths=(8, 12, 16), bottom=24):
        super().__init__()
        inputs = (3, *widths)
        self.down = nn.ModuleList(block(i, o) for i, o in zip(inputs, widths, strict=False))
        self.pool = nn.ModuleList(nn.MaxPool2d(2) for _ in widths)
        self.bottom = block(widths[-1], bottom)
        self.grow = nn.ModuleList(nn.Upsample(scale_factor=2) for _ in widths)
        above = (*widths[1:], bottom)
        self.up = nn.ModuleList(block(i + o, o) for i, o in zip(above, widths, strict=True))
        self.head = nn.Conv2d(widths[0], 5, 1)

    def forward(self, x):
        skips = []
        for layer, pool in zip(self.down, self.pool, strict=True):
            skips.append(layer(x))
            x = pool(skips[-1])
        x = self.bottom(x)
        for i, skip in reversed(list(enumerate(skips))):
            x = self.up[i](torch.cat([self.grown(i, x, skip), skip], dim=1))
        return self.head(x)

    def grown(self, i, x, skip):
        return self.grow[i](x)


class TransposedUNet(nn.Module):
    """Strided convolutions down, transposed ones with an added skip up: the sizes must be multiples of 4."""

    def __init__(self):
        super().__init__()
        self.stem = block(3, 8)
        self.down = nn.ModuleList([block(8, 16, 3, 2), block(16, 24, 3, 2)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.ConvTranspose2d(16, 8, 2, 2)])
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        skips = [self.stem(x)]
        for layer in self.down:
            skips.append(layer(skips[-1]))
        x = skips.pop()
        for layer in self.up:
            x = F.relu(layer(x)) + skips.pop()
        return self.head(x)


class BlurPool2d(nn.Module):
    """Anti-aliased downsampling: a binomial filter with a stride, in code."""

    def __init__(self, channels, stride=2):
        super().__init__()
        self.channels, self.stride = channels, stride
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", torch.outer(taps, taps).expand(channels, 1, 3, 3).contiguous(), persistent=False)

    def forward(self, x):
        return F.conv2d(F.pad(x, [1] * 4, mode="reflect"), self.filt, stride=self.stride, groups=self.channels)


def resnet_blur():
    """Blur pooling in the stem and on both paths of the blocks."""
    layers, width = [block(3, 8), BlurPool2d(8)], 8
    for outputs in (16, 24):
        layer = Residual(width, outputs, 1, nn.Sequential(BlurPool2d(width), *conv_bn(width, outputs, 1)))
        layer.main.insert(1, BlurPool2d(outputs))
        layers.append(layer)
        width = outputs
    return nn.Sequential(*layers, *head(width))


class InCode(nn.Module):
    """A downsampling in the code of the forward, between two that are modules."""

    def __init__(self, downsample):
        super().__init__()
        self.stem, self.body, self.last, self.head = block(3, 8, 3, 2), block(8, 12), block(12, 16, 3, 2), head(16)
        self.head, self.downsample = nn.Sequential(*self.head), downsample

    def forward(self, x):
        return self.head(self.last(self.body(self.downsample(self.stem(x)))))


def halved(x):
    return F.max_pool2d(x, 2)


def every_other(x):
    return x[..., ::2, ::2]


class Pyramid(nn.Module):
    """A feature pyramid with functional upsampling: only the first map can change, to multiples of 4."""

    def __init__(self):
        super().__init__()
        widths = 3, 8, 12, 16
        self.down = nn.ModuleList(block(i, o, 3, 2) for i, o in itertools.pairwise(widths))
        self.lateral = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in widths[1:])
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        maps = []
        for layer in self.down:
            maps.append(x := layer(x))
        *others, y = [layer(x) for layer, x in zip(self.lateral, maps, strict=True)]
        for other in reversed(others):
            y = F.interpolate(y, scale_factor=2.0, mode="nearest") + other
        return self.head(y)


class UNetBySize(UNet):
    """The decoder interpolates to the size of the skip connection in its code."""

    def grown(self, i, x, skip):
        return F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)


class SelectiveKernel(nn.Module):
    """Two branches are stacked and weighed by attention over them."""

    def __init__(self):
        super().__init__()
        self.stem = block(3, 8, 3, 2)
        self.small, self.large = block(8, 12, 3, 2), block(8, 12, 5, 2)
        self.weigh, self.head = nn.Linear(12, 24), nn.Sequential(*head(12))

    def forward(self, x):
        x = self.stem(x)
        x = torch.stack([self.small(x), self.large(x)], 1)
        weights = self.weigh(x.sum(1).mean((-1, -2))).view(-1, 2, 12, 1, 1).softmax(1)
        return self.head((x * weights).sum(1))


@functools.lru_cache(maxsize=32)
def sine_positions(height, width, channels):
    """Sine embeddings of positions, kept by size as in DETR."""
    rates = 0.1 ** (torch.arange(channels // 4) / (channels // 4))
    rows, columns = torch.arange(height)[:, None, None] * rates, torch.arange(width)[None, :, None] * rates
    waves = [f(a).expand(height, width, -1) for a in (rows, columns) for f in (torch.sin, torch.cos)]
    return torch.cat(waves, -1).flatten(0, 1)


class Detr(nn.Module):
    """A convolutional backbone, and attention over its map with cached embeddings of positions."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(block(3, 8, 3, 2), nn.MaxPool2d(3, 2, 1), block(8, 16, 3, 2))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.queries, self.head = nn.Parameter(torch.randn(4, 16)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.backbone(x)
        tokens = x.flatten(2).mT
        keys = tokens + sine_positions(*x.shape[-2:], 16).to(tokens)
        found, _ = self.attention(self.queries.repeat(x.shape[0], 1, 1), keys, tokens, need_weights=False)
        return self.head(found)


def audio_1d():
    """Strides 4, 2, 2 in wide kernels, the first without padding; a max pooling between."""
    first = block(1, 8, 9, 4, dim=1, padding=0)
    layers = [block(8, 16, 5, 2, dim=1), nn.MaxPool1d(3, 2, 1), block(16, 24, 3, 2, dim=1)]
    return nn.Sequential(first, *layers, *head(24, dim=1))


class SameConv2d(nn.Conv2d):
    """TensorFlow's padding: what the map's size and the stride ask for, the odd sample at the end."""

    def forward(self, x):
        sides = []
        for size, kernel, stride in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides = [total // 2, total - total // 2, *sides]
        return super().forward(F.pad(x, sides))


class Mixed(nn.Module):
    """Two images go through one strided stem. Then groups, dilation, ceil_mode and a stride on one axis alone."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(SameConv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = block(16, 16, 3, (2, 1), groups=4)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.dilated = block(16, 24, 3, 2, padding=2, dilation=2)
        self.average = nn.AvgPool2d((2, 3), (1, 2), ceil_mode=True, count_include_pad=False)
        self.head = nn.Sequential(*head(24))

    def forward(self, left, right):
        x = torch.cat([self.stem(left), self.stem(right)], dim=1)
        return self.head(self.average(self.dilated(self.pool(self.grouped(x)))))


IMAGES = (64, 64), (75, 53)
CASES = {
    "resnet": Case(lambda: resnet("basic"), pixels(*IMAGES)),
    "resnet-bottleneck": Case(lambda: resnet("bottleneck"), pixels(*IMAGES)),
    "convnext": Case(convnext, pixels(*IMAGES)),
    "regnet": Case(regnet, pixels(*IMAGES)),
    "mobilenet-v1": Case(mobilenet_v1, pixels(*IMAGES)),
    "mobilenet-v2": Case(mobilenet_v2, pixels(*IMAGES)),
    "efficientnet": Case(efficientnet, pixels(*IMAGES)),
    "swin": Case(swin, pixels(*IMAGES)),
    "wav2vec2": Case(wav2vec2, lambda scale: {"input_values": torch.randn(2, (4000, 3333)[scale])}),
    "vgg": Case(vgg, maps((32, 32), (45, 27))),
    "densenet": Case(densenet, maps((32, 32), (45, 27))),
    "inception": Case(inception, maps((32, 32), (45, 37))),
    "resnet-d": Case(resnet_d, maps((32, 32), (40, 24))),
    "unet": Case(UNet, maps((32, 32), (40, 56)), {"upsample": True}),
    "unet-transposed": Case(TransposedUNet, maps((32, 32), (44, 28)), {"upsample": True}),
    "resnet-blur": Case(resnet_blur, maps((32, 32), (45, 27))),
    "pool-in-code": Case(lambda: InCode(halved), maps((32, 32), (45, 27))),
    "slices": Case(lambda: InCode(every_other), maps((32, 32), (45, 27))),
    "pyramid": Case(Pyramid, maps((64, 64), (40, 56))),
    "unet-by-size": Case(UNetBySize, maps((32, 32), (45, 27))),
    "selective-kernel": Case(SelectiveKernel, maps((32, 32), (45, 27))),
    "detr": Case(Detr, maps((64, 64), (75, 53))),
    "resnet-3d": Case(resnet_3d, maps((8, 16, 16), (7, 21, 18), channels=1)),
    "audio-1d": Case(audio_1d, maps((1000,), (777,), channels=1)),
    "mixed": Case(Mixed, pairs((64, 64), (77, 61))),
}
BEFORE = {f"{name}-before": name for name in ("resnet", "resnet-d", "resnet-3d", "unet-transposed", "mixed")}
"""Cases with layers before convolutions."""
CASES |= {
    name: CASES[after]._replace(options={**CASES[after].options, "placement": "before"})
    for name, after in BEFORE.items()
}


@functools.cache
def _made(name: str) -> tuple[nn.Module, nn.Module, Any]:
    import diffstride as ds

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CASES[name].build()
        original = copy.deepcopy(model)
        plan = ds.convert(model, CASES[name].inputs(0), **CASES[name].options)
    return original, model, plan


def converted(name: str) -> tuple[nn.Module, nn.Module, Any]:
    """Return a model of `CASES`, its converted twin and the plan. The models are copies, made once for all tests."""
    original, model, plan = _made(name)
    return copy.deepcopy(original), copy.deepcopy(model), plan


def products(model: nn.Module, inputs: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return multiply-accumulates in evaluation mode, as torch counts them while the real model runs.

    The first result is by module, each with its children ("" is the model). The second has those of resampling alone,
    by the layer that resamples: all that is not a convolution there.
    """
    import diffstride as ds
    from diffstride.nn.learnable import LearnableStrides
    from diffstride.nn.resize import ResizeTo

    model.eval()
    # Products on AMD may be written as convolutions.
    with torch.no_grad(), mock.patch("diffstride.backends.matmul._convolution_is_faster", return_value=False):
        bare_call(model, inputs)  # builds the operators, once
        with FlopCounterMode(display=False) as counter:
            bare_call(model, inputs)
    counts, prefix = counter.get_flop_counts(), type(model).__name__
    total, resampling = {}, {}
    for name, module in model.named_modules():
        by_operation = counts.get(f"{prefix}.{name}" if name else prefix, {})
        total[name] = sum(by_operation.values()) // 2
        if isinstance(module, (LearnableStrides, ResizeTo, ds.SpectralPool2d)):
            resampling[name] = sum(n for op, n in by_operation.items() if "convolution" not in str(op)) // 2
    return total, resampling


def saved_bytes(model: nn.Module, inputs: Any) -> int:
    """Return the bytes that the real model saves for backward in training mode, except parameters."""
    seen = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    parameters = set(seen)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = bare_call(model.train(), inputs)
    del output
    return sum(storage.nbytes() for pointer, storage in seen.items() if pointer not in parameters)


# Models that cannot be converted, or have nothing to convert.


def flatten_head():
    """The head counts the samples of one size of map. No other input size runs."""
    return nn.Sequential(block(3, 8, 3, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 8 * 8, 10))


def flatten_at_once():
    """The only downsampling is before a head that counts samples."""
    return nn.Sequential(block(3, 8, 3, 2), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))


class FunctionalPooling(nn.Module):
    """A network that halves the size twice, with no module to convert."""

    def __init__(self):
        super().__init__()
        self.first, self.second = block(3, 8), block(8, 16)
        self.head = nn.Sequential(*head(16))

    def forward(self, x):
        x = F.max_pool2d(self.first(x), 2)
        return self.head(F.max_pool2d(self.second(x), 2))


def no_downsampling():
    """A stride of 1 everywhere, a pooling included; the global pooling is no stride."""
    return nn.Sequential(block(3, 8), nn.AvgPool2d(3, 1, 1), block(8, 8), *head(8))


BROKEN = {
    "flatten-at-once": Case(flatten_at_once, maps((32, 32), (32, 32))),
    "functional-pooling": Case(FunctionalPooling, maps((32, 32), (45, 37))),
    "no-downsampling": Case(no_downsampling, maps((32, 32), (45, 37))),
}
