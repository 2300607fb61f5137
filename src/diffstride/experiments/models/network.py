"""What the command line knows networks by, and what they have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from diffstride import _validation
from diffstride._text import short_repr
from diffstride.nn import DiffStrideConv2d


class Network(nn.Module):
    """Base of the networks that `diffstride fit` offers by name: inputs `[B, C, ...]` to logits `[B, num_classes]`.

    For several tasks at once it gives a mapping from their names to logits. It asks for nothing else. Derive from it to
    give a network of your own to `fit`: `--model.network my_package.MyNetwork`.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs to logits."""
        raise NotImplementedError(
            f"{type(self).__name__} must have a forward, from inputs to logits, got none: define it"
        )


class Heads(nn.ModuleDict):
    """A linear layer for each task: features `[B, in_features]` to a mapping from task to logits `[B, classes]`.

    Args:
        in_features: Number of features.
        num_classes: Number of classes by the name of the task.

    Raises:
        ValueError: No task, or a name with a dot.
    """

    def __init__(self, in_features: int, num_classes: Mapping[str, int]) -> None:
        check_tasks(num_classes)
        super().__init__({task: nn.Linear(in_features, classes) for task, classes in num_classes.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of all tasks."""
        return {task: head(x) for task, head in self.items()}


def check_ends(in_channels: int, num_classes: int | Mapping[str, int]) -> None:
    """Check what every network has at its two ends, before any weight is drawn."""
    _validation.positive_int("in_channels", in_channels)
    if isinstance(num_classes, Mapping):
        check_tasks(num_classes)
    else:
        _validation.positive_int("num_classes", num_classes)


def check_tasks(num_classes: Mapping[str, int]) -> None:
    """Check the numbers of classes of several tasks."""
    if not num_classes or any("." in task or hasattr(nn.ModuleDict(), task) for task in num_classes):
        raise ValueError(
            "num_classes must have names without dots, one at least, and none of nn.ModuleDict's own, got "
            f"{short_repr(dict(num_classes))}"
        )


def check_batch(x: Any, ndim: int, in_channels: int) -> None:
    """Check that a network is given `[B, in_channels, *spatial]`."""
    if isinstance(x, fx.Proxy):  # a symbolic trace, as for quantisation
        return
    if isinstance(x, Tensor) and x.ndim != ndim + 2:
        raise ValueError(f"input must have {ndim + 2} dimensions [B, C, *spatial], got shape {tuple(x.shape)}")
    _validation.spatial_sizes(x, ndim)
    _validation.channels(x, ndim, in_channels)


def make_classifier(in_features: int, num_classes: int | Mapping[str, int]) -> nn.Module:
    """The last layer: one linear layer, or one for each task."""
    if isinstance(num_classes, Mapping):
        return Heads(in_features, num_classes)
    return nn.Linear(in_features, num_classes)


def widened(channels: Sequence[int], width: float) -> list[int]:
    """Numbers of channels times the width: rounded, one at least."""
    _validation.above_zero("width", width)
    return [max(1, round(width * c)) for c in channels]


def draw_convolutions(network: nn.Module) -> None:
    """Draw the weights of convolutions as He et al. 2015, Eq. 14 do: normal, of variance ``2 / fan_out``.

    Downsampling layers, known by the name ``down``, keep what they start with and take no random numbers here.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | DiffStrideConv2d) and "down" not in name.split("."):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
