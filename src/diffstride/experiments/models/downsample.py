"""How a convolution is made to downsample: the one thing in which the baselines of a study differ."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from diffstride import _validation
from diffstride._text import did_you_mean, short_repr
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
# From a stride to a layer. The result is not annotated as nn.Module because jsonargparse would then list every module
# class of torch in --help.
DownsampleFactory: TypeAlias = Callable[[Stride], Any]

_OPTIONS = frozenset(inspect.signature(DiffStride2d).parameters) - {"stride"}
_SPECTRAL_OPTIONS = frozenset(inspect.signature(SpectralPool2d).parameters) - {"stride"}
_LAYERS: dict[int, dict[str, Any]] = {
    1: {"diffstride": DiffStride1d, "spectral": SpectralPool1d, "avg": nn.AvgPool1d, "max": nn.MaxPool1d},
    2: {"diffstride": DiffStride2d, "spectral": SpectralPool2d, "avg": nn.AvgPool2d, "max": nn.MaxPool2d},
}


def make_downsample(
    method: str | DownsampleFactory, stride: Stride, ndim: int = 2, **options: Any
) -> tuple[int | tuple[int, int], nn.Module]:
    """A stride as the two things that realise it: the stride of a convolution, and the layer that follows it.

    A map of ``N`` samples along an axis leaves stride ``S`` with

    - ``ceil(N/S)`` for ``"conv"`` (the convolution itself is strided and padded), ``"avg"`` and ``"max"`` (windows of
      ``S`` samples, the last one cut short at the border) and ``"blur"`` (anti-aliased pooling, Zhang 2019: a binomial
      kernel of ``2 S - 1`` samples per axis, taken for the larger of two unequal strides, then every ``S``-th sample;
      images only);
    - ``floor(N/S)`` for ``"spectral"`` (Rippel et al. 2015), where ``S`` may be fractional;
    - ``DiffStride2d.output_size`` for ``"diffstride"`` (Riad et al. 2022), where ``S`` is also learned. It is a
      learnable layer at ``S = 1`` too.

    Args:
        method: One of the names above, or a function from the stride to a layer.
        stride: The stride, a number or, for images, ``(height, width)``, at least 1.
        ndim: Spatial axes: 2 for images and spectrograms, 1 for waveforms.
        options: Options of :class:`~diffstride.nn.DiffStride2d`. So that one configuration serves every method, the
            other methods accept the same names and leave aside those that mean nothing to them: ``"spectral"`` takes
            ``basis``, ``norm`` and ``backend``, the rest none.

    Returns:
        The stride that the convolution takes (1 except for ``"conv"``), and the layer to put directly after it.

    Raises:
        ValueError: An unknown method, a stride below 1 or not finite or of more than ``ndim`` entries, a fractional
            stride with a method of integer strides, ``"blur"`` on waveforms.
        TypeError: An option that ``DiffStride2d`` does not have, a stride that is neither a number nor a pair.
        ModuleNotFoundError: ``"blur"`` without kornia.
    """
    strides = _validation.strides_at_least_one("stride", _validation.per_axis("stride", stride, ndim))
    if unknown := sorted(options.keys() - _OPTIONS):
        near = did_you_mean(unknown[0], _OPTIONS)
        raise TypeError(
            f"options must be among those of DiffStride2d ({', '.join(sorted(_OPTIONS))}), got {unknown}{near}"
        )
    if callable(method):
        return 1, method(stride if isinstance(stride, int | float) else (strides[0], strides[1]))
    _validation.one_of("downsample", method, METHODS)
    layers = _LAYERS[ndim]
    if method == "diffstride":
        return 1, layers[method](strides, **options)
    if method == "spectral":
        return 1, layers[method](strides, **{k: v for k, v in options.items() if k in _SPECTRAL_OPTIONS})
    if any(s != int(s) for s in strides):
        raise ValueError(
            f"stride must be an integer for downsample={method!r}, got {stride!r}; 'spectral' and 'diffstride' take "
            "fractional strides"
        )
    whole = [int(s) for s in strides]
    if method == "conv":
        return (whole[0], whole[1]) if ndim == 2 else whole[0], nn.Identity()
    if max(whole) == 1:
        return 1, nn.Identity()
    if method == "blur":
        if ndim != 2:
            raise ValueError("downsample must be another method than 'blur' for waveforms, which it is not made for")
        return 1, _blur(whole)
    return 1, layers[method](tuple(whole), ceil_mode=True)


def check_downsample(
    method: str | DownsampleFactory,
    strides: Sequence[Stride],
    options: Mapping[str, Any] | None,
    *,
    ndim: int = 2,
) -> dict[str, Any]:
    """Check what a network's layers will be made of before the first is made, and return the options."""
    options = dict(options or {})
    for stride in strides:
        # What a function gives cannot be known without a call, which may draw random numbers.
        any_layer = callable(method) and not isinstance(method, nn.Module)
        make_downsample(nn.Identity if any_layer else method, stride, ndim, **options)
    return options


def check_strides(strides: Any, least: int, most: int, places: str = "") -> None:
    """Check the number of a network's strides; `places` says what they are of."""
    if not least <= len(strides) <= most:
        entries = "1 entry" if most == 1 else f"{most} entries" if least == most else f"{least} to {most} entries"
        raise ValueError(f"strides must have {entries}{places}, got {len(strides)}: {short_repr(list(strides))}")


def _blur(stride: Sequence[int]) -> nn.Module:
    try:
        from kornia.filters import BlurPool2D
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("downsample='blur' needs kornia: pip install diffstride[train]") from error
    # Annotated as one integer, handed as it is to conv2d, which takes a pair.
    return BlurPool2D(2 * max(stride) - 1, tuple(stride))  # type: ignore[arg-type]
