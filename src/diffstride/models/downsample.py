"""How a convolution is made to downsample: the one thing in which the baselines of a study differ."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from diffstride import _check
from diffstride.nn import DiffStride2d, SpectralPool2d

METHODS = ("conv", "avg", "max", "blur", "spectral", "diffstride")
Stride: TypeAlias = float | tuple[float, float]
# From a stride to a layer. The result is not annotated as nn.Module because jsonargparse would then list every module
# class of torch in --help.
DownsampleFactory: TypeAlias = Callable[[Stride], Any]

_OPTIONS = frozenset(inspect.signature(DiffStride2d).parameters) - {"stride"}
_SPECTRAL_OPTIONS = frozenset(inspect.signature(SpectralPool2d).parameters) - {"stride"}


def make_downsample(
    method: str | DownsampleFactory, stride: Stride, **options: Any
) -> tuple[int | tuple[int, int], nn.Module]:
    """A stride as the two things that realise it: the stride of a convolution, and the layer that follows it.

    A map of ``N`` samples along an axis leaves stride ``S`` with

    - ``ceil(N/S)`` for ``"conv"`` (the convolution itself is strided and padded), ``"avg"`` and ``"max"`` (windows of
      ``S`` samples, the last one cut short at the border) and ``"blur"`` (anti-aliased pooling, Zhang 2019: a binomial
      kernel of ``2 S - 1`` samples per axis, taken for the larger of two unequal strides, then every ``S``-th sample);
    - ``floor(N/S)`` for ``"spectral"`` (Rippel et al. 2015), where ``S`` may be fractional;
    - ``DiffStride2d.output_size`` for ``"diffstride"`` (Riad et al. 2022), where ``S`` is also learned. It is a
      learnable layer at ``S = 1`` too.

    Args:
        method: One of the names above, or a function from the stride to a layer.
        stride: The stride, a number or ``(height, width)``, at least 1.
        options: Options of :class:`~diffstride.nn.DiffStride2d`. So that one configuration serves every method, the
            other methods accept the same names and leave aside those that mean nothing to them: ``"spectral"`` takes
            ``basis``, ``norm`` and ``backend``, the rest none.

    Returns:
        The stride that the convolution takes (1 except for ``"conv"``), and the layer to put directly after it.

    Raises:
        ValueError: An unknown method, a stride below 1 or not finite or of more than two entries, a fractional stride
            with a method of integer strides.
        TypeError: An option that ``DiffStride2d`` does not have, a stride that is neither a number nor a pair.
        ModuleNotFoundError: ``"blur"`` without kornia.
    """
    height, width = _check.strides_at_least_one("stride", _check.per_axis("stride", stride, 2))
    if unknown := sorted(options.keys() - _OPTIONS):
        raise TypeError(f"options must be among those of DiffStride2d ({', '.join(sorted(_OPTIONS))}), got {unknown}")
    if callable(method):
        return 1, method(stride if isinstance(stride, int | float) else (height, width))
    if method == "diffstride":
        return 1, DiffStride2d((height, width), **options)
    if method == "spectral":
        return 1, SpectralPool2d((height, width), **{k: v for k, v in options.items() if k in _SPECTRAL_OPTIONS})
    _check.one_of("downsample", method, METHODS)
    if height != int(height) or width != int(width):
        raise ValueError(
            f"stride must be an integer for downsample={method!r}, got {stride!r}; 'spectral' and 'diffstride' take "
            "fractional strides"
        )
    whole = int(height), int(width)
    if method == "conv":
        return whole, nn.Identity()
    if whole == (1, 1):
        return 1, nn.Identity()
    if method == "avg":
        return 1, nn.AvgPool2d(whole, ceil_mode=True)
    if method == "max":
        return 1, nn.MaxPool2d(whole, ceil_mode=True)
    return 1, _blur(whole)


def _blur(stride: tuple[int, int]) -> nn.Module:
    try:
        from kornia.filters import BlurPool2D
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("downsample='blur' needs kornia: pip install diffstride[train]") from error
    # Annotated as one integer, handed as it is to conv2d, which takes a pair.
    return BlurPool2D(2 * max(stride) - 1, stride)  # type: ignore[arg-type]
