"""Downsampling of a convolution's output: the one thing in which the baselines of a study differ."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from torch import nn

from diffstride import _validation
from diffstride._text import did_you_mean
from diffstride.nn import DiffStride1d, DiffStride2d, SpectralPool1d, SpectralPool2d

METHODS = {  # with their titles
    "conv": "strided convolution",
    "avg": "average pooling",
    "max": "max pooling",
    "blur": "blur pooling",
    "spectral": "spectral pooling",
    "diffstride": "DiffStride",
}
Stride: TypeAlias = float | tuple[float, float]
# A function from a stride to a layer. The result is not annotated as nn.Module because jsonargparse would then list
# every module class of torch in --help.
DownsampleFactory: TypeAlias = Callable[[Stride], Any]

_OPTIONS = frozenset(inspect.signature(DiffStride2d).parameters) - {"stride"}
_SPECTRAL_OPTIONS = frozenset(inspect.signature(SpectralPool2d).parameters) - {"stride"}
_LAYERS: dict[int, dict[str, Any]] = {
    1: {"diffstride": DiffStride1d, "spectral": SpectralPool1d, "avg": nn.AvgPool1d, "max": nn.MaxPool1d},
    2: {"diffstride": DiffStride2d, "spectral": SpectralPool2d, "avg": nn.AvgPool2d, "max": nn.MaxPool2d},
}


def imported(argument: str, path: str) -> Any:
    """Return what a path such as `timm.create_model` names; `argument` is named in errors."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{argument} must be a path such as timm.create_model, got {path!r}: {error}") from error


def make_downsample(
    method: str | DownsampleFactory, stride: Stride | None, ndim: int = 2, **options: Any
) -> tuple[int | tuple[int, int], nn.Module]:
    """Return a stride as its two parts: the stride of a convolution, and the layer that follows it.

    The output of stride `S` has, for `N` samples along an axis,

    - `ceil(N/S)` samples for `"conv"` (the convolution itself is strided and padded), `"avg"` and `"max"` (windows of
      `S` samples, the last one cut short at the border) and `"blur"` (anti-aliased pooling, Zhang 2019: a binomial
      kernel of `2 S - 1` samples per axis for the larger of two strides, then every `S`-th sample; images only);
    - `floor(N/S)` samples for `"spectral"` (Rippel et al. 2015), where `S` may be fractional;
    - `DiffStride2d.output_size` samples for `"diffstride"` (Riad et al. 2022), where `S` is learned, also from `S = 1`.

    Args:
        method: One of the names above, or a function from the stride to a layer, itself or by its path
            (`package.function`).
        stride: The stride, a number or, for images, `(height, width)`, at least 1. None: no downsampling.
        ndim: Spatial axes: 2 for images and spectrograms, 1 for waveforms.
        options: Options of `DiffStride2d`. So that one configuration serves every method, the other methods accept the
            same names and ignore those without a meaning for them: `"spectral"` uses `basis`, `norm` and `backend`,
            the rest use none.

    Returns:
        The stride for the convolution (1 except for `"conv"`), and the layer to put directly after it.

    Raises:
        ValueError: The method is unknown, or the stride is below 1, or fractional for a method of integer strides.
        TypeError: `DiffStride2d` does not have an option.
    """
    if stride is None:
        return 1, nn.Identity()
    strides = _validation.strides_at_least_one("stride", _validation.per_axis("stride", stride, ndim))
    if unknown := sorted(options.keys() - _OPTIONS):
        near = did_you_mean(unknown[0], _OPTIONS)
        raise TypeError(
            f"options must be among those of DiffStride2d ({', '.join(sorted(_OPTIONS))}), got {unknown}{near}"
        )
    if isinstance(method, str) and "." in method:
        method = cast(DownsampleFactory, imported("downsample", method))
    if callable(method):
        return 1, method(stride if isinstance(stride, int | float) else (strides[0], strides[1]))
    _validation.one_of("downsample", method, [name for name in METHODS if ndim == 2 or name != "blur"])
    layers = _LAYERS[ndim]
    if method == "diffstride":
        return 1, layers[method](strides, **options)
    if method == "spectral":
        return 1, layers[method](strides, **{k: v for k, v in options.items() if k in _SPECTRAL_OPTIONS})
    integers = tuple(int(s) for s in strides)
    if integers != strides:
        raise ValueError(
            f"stride must be an integer for downsample={method!r}, got {stride}: 'spectral' takes fractions"
        )
    if method == "conv":
        return (integers[0], integers[1]) if ndim == 2 else integers[0], nn.Identity()
    if max(integers) == 1:
        return 1, nn.Identity()
    if method == "blur":
        from kornia.filters import BlurPool2D  # its import takes seconds

        # The stride is annotated as one integer, and passed on to conv2d, which takes a pair.
        return 1, BlurPool2D(2 * max(integers) - 1, integers)  # type: ignore[arg-type]
    return 1, layers[method](integers, ceil_mode=True)
