"""The suites of `diffstride bench`: host, layers, convolutions, steps; and the calibration of the backends."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from kornia.filters import BlurPool2D
from torch import Tensor, nn
from torch.nn import functional as F

import diffstride as ds
from diffstride.experiments.benchmark.baselines import AxisByAxisFFT, JointFFT, NaiveFFT, move_data
from diffstride.experiments.benchmark.measure import Candidate, Case, Row
from diffstride.experiments.models import ResNet
from diffstride.nn.attach import Placement

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Settings(NamedTuple):
    """The options of the command line that choose cases."""

    dtypes: Sequence[str]
    quick: bool
    full: bool


def layer_step(layer: Callable[[Tensor], Tensor], x: Tensor) -> Candidate:
    """Return a forward and backward pass with the gradients of the input and of all parameters."""
    module = layer if isinstance(layer, nn.Module) else None
    inputs = [x, *(module.parameters() if module else ())]
    upstream: list[Tensor] = []

    def step() -> object:
        y = layer(x)
        if not upstream:  # drawn once, in the size and memory format of the result
            upstream.append(torch.randn_like(y))
        return torch.autograd.grad(y, inputs, upstream)

    return Candidate(step, module)


def host(settings: Settings) -> Iterator[Case]:
    """Yield cases of small maps, where the work of the host decides."""
    for dtype in settings.dtypes:
        facts = {"shape": [2, 4, 32, 32], "stride": 2, "dtype": dtype, "memory_format": "contiguous"}
        references = {"avg_pool2d": None, "convolution, avg_pool2d": [f"DiffStrideConv2d, {way}" for way in _STRIDES]}
        yield Case("host", facts, _host, references, rounds=1 if settings.quick else 50, host=True)


_STRIDES = "stride held", "stride moved"


def _host(facts: Mapping[str, Any], device: torch.device) -> dict[str, Candidate]:
    x = _input(facts, device)
    pool, conv = nn.AvgPool2d(2), nn.Conv2d(4, 4, 3, padding=1, device=device, dtype=x.dtype)
    steps = {"avg_pool2d": layer_step(pool, x), "convolution, avg_pool2d": layer_step(nn.Sequential(conv, pool), x)}
    for way in _STRIDES:
        layer = ds.DiffStride2d(2, device=device)
        one = ds.DiffStrideConv2d(4, 4, 3, 2, padding=1, device=device, dtype=x.dtype)
        for name, module in ("DiffStride2d", layer), ("DiffStrideConv2d", one):
            step = layer_step(module, x)
            steps[f"{name}, {way}"] = step if way == "stride moved" else Candidate(step.step)
    return steps


def layers(settings: Settings) -> Iterator[Case]:
    """Yield cases of single layers of stride 2."""
    shapes = [(2, 4, 12, 12)] if settings.quick else [(64, 64, 32, 32), (16, 64, 56, 56), (16, 64, 112, 112)]
    for dtype in settings.dtypes:
        for shape, memory_format in [*((shape, "contiguous") for shape in shapes), (shapes[0], "channels_last")]:
            facts = {"shape": list(shape), "stride": 2, "dtype": dtype, "memory_format": memory_format}
            yield Case("layers", facts, _layers, {"avg_pool2d": None})


def _layers(facts: Mapping[str, Any], device: torch.device) -> dict[str, Candidate]:
    x = _input(facts, device)
    channels, size = x.shape[1], [n // 2 for n in x.shape[2:]]
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "data movement": move_data,
        "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
        "blur pooling": BlurPool2D(3, 2),
        "antialiased bilinear": lambda x: F.interpolate(x, size, mode="bilinear", antialias=True),
        "strided convolution": nn.Conv2d(channels, channels, 3, stride=2, padding=1, dtype=x.dtype),
        "FFT, naive port, R=4": NaiveFFT(smoothness=4),
        "FFT, axis by axis, R=1": AxisByAxisFFT(smoothness=1),
        "FFT, axis by axis, R=4": AxisByAxisFFT(smoothness=4),
        "FFT, joint, R=1": JointFFT(smoothness=1),
        "FFT, joint, R=4": JointFFT(smoothness=4),
        "DiffStride, R=1": ds.DiffStride2d(2, 1),
        "DiffStride, R=4": ds.DiffStride2d(2, 4),
        "DiffStride, inner window": ds.DiffStride2d(2, window="inner"),
        "DiffStride, DCT, R=4": ds.DiffStride2d(2, 4, basis="dct"),
        "DiffStride, by FFT, R=4": ds.DiffStride2d(2, 4, backend="fft"),
        "SpectralPool": ds.SpectralPool2d(2),
    }
    for function in functions.values():
        if isinstance(function, nn.Module):
            function.to(device, memory_format=MEMORY_FORMATS[facts["memory_format"]])  # type: ignore[call-overload]
    return {name: layer_step(function, x) for name, function in functions.items()}


def convolutions(settings: Settings) -> Iterator[Case]:
    """Yield cases of a convolution and its downsampling."""
    shapes = [((2, 4, 12, 12), 8)] if settings.quick else [((32, 64, 32, 32), 128), ((32, 128, 16, 16), 256)]
    for dtype in settings.dtypes:
        for shape, channels in shapes:
            for stride, smoothness, window in [(2, 1, "outer"), (2, 4, "outer"), (3, 1, "outer"), (2, 4, "inner")]:
                facts = {
                    "shape": list(shape), "channels": [shape[1], channels], "stride": stride, "smoothness": smoothness,
                    "window": window, "dtype": dtype, "memory_format": "channels_last",
                }  # fmt: skip
                yield Case("convolutions", facts, _convolutions, {"convolution, then layer": None})


def _convolutions(facts: Mapping[str, Any], device: torch.device) -> dict[str, Candidate]:
    x = _input(facts, device)
    (cin, cout), stride = facts["channels"], facts["stride"]
    options: dict[str, Any] = {"smoothness": facts["smoothness"], "window": facts["window"]}
    modules: dict[str, nn.Module] = {
        "convolution, then layer": nn.Sequential(
            nn.Conv2d(cin, cout, 3, padding=1), ds.DiffStride2d(stride, **options)
        ),
        "one operator": ds.DiffStrideConv2d(cin, cout, 3, stride, padding=1, **options),
        "strided convolution": nn.Conv2d(cin, cout, 3, stride, padding=1),
    }
    for module in modules.values():
        module.to(device, x.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {name: layer_step(module, x) for name, module in modules.items()}


# The downsampling of each network and its options.
_INNER = {"smoothness": 4, "window": "inner"}
NETWORKS: dict[str, tuple[Any, ...]] = {
    "strided convolution": ("conv", {}),
    "average pooling": ("avg", {}),
    "blur pooling": ("blur", {}),
    "spectral pooling": ("spectral", {}),
    "DiffStride, inner window": ("diffstride", _INNER),
    "DiffStride, inner window, before": ("diffstride", _INNER, "before"),
    "DiffStride, R=1": ("diffstride", {"smoothness": 1}),
    "DiffStride, R=4": ("diffstride", {"smoothness": 4}),
}
# Networks with average pooling to maps of the same sizes, so that the ratio is that of the layers alone.
CONTROLS = {
    "average pooling to sizes of inner window": "DiffStride, inner window",
    "average pooling to sizes of R=4": "DiffStride, R=4",
}


def steps(settings: Settings) -> Iterator[Case]:
    """Yield cases of training steps of a ResNet-18 on images of CIFAR's size."""
    shape = (4, 3, 16, 16) if settings.quick else (128, 3, 32, 32)
    # With 4 channels, torch 2.13's strided 1x1 convolutions in channels_last crash on CPUs without AVX-512.
    widths = [1 / 8 if settings.quick else 1 / 4, *([1.0] if settings.full else [])]
    comparisons = {"strided convolution": None, **{control: [name] for control, name in CONTROLS.items()}}
    for dtype in settings.dtypes:
        for width in widths:
            facts = {"width": width, "shape": list(shape), "dtype": dtype, "memory_format": "channels_last"}
            yield Case("steps", facts, _steps, comparisons)


def _steps(facts: Mapping[str, Any], device: torch.device) -> dict[str, Candidate]:
    # Half precision is that of autocast: images and weights stay float32.
    images = _input({**facts, "dtype": "float32"}, device).detach()

    def network(downsample: Any, options: dict[str, Any], placement: Placement = "after") -> ResNet:
        options = {"downsample_options": options, "placement": placement}
        made = ResNet(width=facts["width"], downsample=downsample, strides=(2, 2, 2), **options)
        return made.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    networks = {name: network(*arguments) for name, arguments in NETWORKS.items()}
    for control, name in CONTROLS.items():
        networks[control] = network(partial(_pooling_to_the_next, iter(stage_sizes(networks[name], images))), {})
    return {name: training_step(made, images, DTYPES[facts["dtype"]]) for name, made in networks.items()}


def stage_sizes(network: ResNet, images: Tensor) -> list[tuple[int, ...]]:
    """Return height and width of the maps of the stages that downsample: all but the first."""
    sizes: list[tuple[int, ...]] = []
    with torch.no_grad():
        x = network.stem(images)
        for stage in network.stages:
            x = stage(x)
            sizes.append(tuple(x.shape[-2:]))
    return sizes[1:]


def _pooling_to_the_next(sizes: Iterator[tuple[int, ...]], _stride: object) -> nn.Module:
    return nn.AdaptiveAvgPool2d(next(sizes))


def training_step(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Candidate:
    """Return a step of SGD on the cross-entropy; half precision by autocast."""
    labels = torch.randint(10, (len(images),), device=images.device)
    optimizer = torch.optim.SGD(ds.param_groups(network, lr=1e-3, weight_decay=5e-4), momentum=0.9)

    def step() -> None:
        with nullcontext() if dtype == torch.float32 else torch.autocast(images.device.type, dtype):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return Candidate(step, network)


def calibration(settings: Settings) -> Iterator[Case]:
    """Yield cases of axes of growing length, as dense products and as FFTs: signals (R = N/16) and images (R = 4).

    The time of an FFT depends on the prime factors of the sizes, and learned strides give any size: so there are
    several strides.
    """
    lengths = (16, 32) if settings.quick else (64, 128, 192, 256, 384, 512, 768, 1024)
    elements = 1 << (12 if settings.quick else 21)
    for dtype in settings.dtypes:
        for n in lengths:
            for shape in ([elements // (16 * n), 16, n], [max(1, elements // (16 * n * n)), 16, n, n]):
                for stride in (1.5, 2, 2.3, 3.1):
                    facts = {"shape": shape, "stride": stride, "dtype": dtype, "memory_format": "contiguous"}
                    yield Case("calibrate", facts, _backends, {"fft": None})


def _backends(facts: Mapping[str, Any], device: torch.device) -> dict[str, Candidate]:
    x = _input(facts, device)
    signal = x.ndim == 3
    make = ds.DiffStride1d if signal else ds.DiffStride2d
    smoothness = x.shape[-1] / 16 if signal else 4.0
    return {
        name: layer_step(make(facts["stride"], smoothness, backend=name, device=device), x)
        for name in ("fft", "matmul")
    }


def crossovers(rows: Iterable[Row]) -> dict[str, int]:
    """Return the largest length at which the median ratio of dense products to FFTs is at most 1, or 0, by dtype."""
    ratios: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["name"] == "matmul":
            by_length = ratios.setdefault(row["case"]["dtype"], {})
            by_length.setdefault(row["case"]["shape"][-1], []).append(row["ratio"])
    return {
        dtype: max((length for length, values in by_length.items() if statistics.median(values) <= 1), default=0)
        for dtype, by_length in ratios.items()
    }


def _input(facts: Mapping[str, Any], device: torch.device) -> Tensor:
    x = torch.randn(facts["shape"], device=device, dtype=DTYPES[facts["dtype"]])
    return x.contiguous(memory_format=MEMORY_FORMATS[facts["memory_format"]]).requires_grad_()


SUITES = {"host": host, "layers": layers, "convolutions": convolutions, "steps": steps}
