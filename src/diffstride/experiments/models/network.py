"""The base class of the networks that the command line knows by name, and what they have in common."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from diffstride import _validation
from diffstride._text import short_repr
from diffstride.nn import DiffStride2d, DiffStrideConv2d
from diffstride.nn.attach import Placement


class Network(nn.Module):
    """A base class of networks that `diffstride fit` offers by name.

    A network maps inputs `[B, C, ...]` to logits `[B, num_classes]`, or to a mapping from the names of tasks to logits.
    Derive from this class to train a network of your own: `--model.network my_package.MyNetwork`.
    """


class Heads(nn.ModuleDict):
    """A linear layer for each task: features `[B, in_features]` to a mapping from task to logits `[B, classes]`."""

    def __init__(self, in_features: int, num_classes: Mapping[str, int]) -> None:
        super().__init__({task: nn.Linear(in_features, classes) for task, classes in num_classes.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {task: head(x) for task, head in self.items()}


def make_classifier(in_features: int, num_classes: int | Mapping[str, int]) -> nn.Module:
    """Return the last layer: one linear layer, or one for each task."""
    if isinstance(num_classes, Mapping):
        return Heads(in_features, num_classes)
    return nn.Linear(in_features, num_classes)


def comes_first(placement: Placement) -> bool:
    """Return whether a downsampling layer comes before its convolution."""
    return _validation.one_of("placement", placement, get_args(Placement)) == "before"


def placed(conv: Any, down: nn.Module, placement: Placement) -> dict[str, nn.Module]:
    """Return `conv` and its downsampling layer `down` by these names, in the order of their calls.

    An image layer with a learned stride that comes after the convolution is one operator with it, and `down` an
    identity.
    """
    if comes_first(placement):
        return {"down": down, "conv": conv}
    if isinstance(down, DiffStride2d):
        conv, down = DiffStrideConv2d.fuse(conv, down), nn.Identity()
    return {"conv": conv, "down": down}


def widened(channels: Sequence[int], width: float) -> list[int]:
    """Return numbers of channels times the width, rounded and at least 1."""
    _validation.above_zero("width", width)
    return [max(1, round(width * c)) for c in channels]


def check_strides(strides: Any, least: int, most: int, places: str = "") -> None:
    """Check the number of a network's strides, so that none is silently left out. `places` ends the message."""
    if not least <= len(strides) <= most:
        entries = f"{most} entr{'y' if most == 1 else 'ies'}" if least == most else f"{least} to {most} entries"
        raise ValueError(f"strides must have {entries}{places}, got {short_repr(list(strides))}")


Initialization = Literal["fan_out", "fan_in_truncated"]
_TRUNCATED = 0.87962566103423978  # the deviation of a standard normal distribution cut off at 2


def draw_convolutions(network: nn.Module, initialization: Initialization = "fan_out") -> None:
    """Draw the weights of convolutions from a normal distribution.

    Its variance is `2 / fan_out` (He et al. 2015, Eq. 14); with "fan_in_truncated" it is `2 / fan_in`, and weights
    beyond twice the deviation of the whole distribution are drawn again, as Keras' `he_normal` does. Downsampling
    layers, named `down`, keep their initial values and draw no random numbers here.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | DiffStrideConv2d) and "down" not in name.split("."):
            if initialization == "fan_out":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:
                std = math.sqrt(2 / module.weight[0].numel()) / _TRUNCATED
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
