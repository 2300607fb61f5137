"""What the command line knows networks by, and what they have in common."""

from collections.abc import Mapping

from torch import Tensor, nn

from diffstride.nn import DiffStrideConv2d


class Network(nn.Module):
    """Base of the networks that `diffstride fit` offers by name: inputs `[B, C, ...]` to logits `[B, num_classes]`.

    For several tasks at once it gives a mapping from their names to logits. It asks for nothing else. Derive from it to
    give a network of your own to `fit`: `--model.network my_package.MyNetwork`.
    """


class Heads(nn.ModuleDict):
    """A linear layer for each task: features `[B, in_features]` to a mapping from task to logits `[B, classes]`.

    Args:
        in_features: Number of features.
        num_classes: Number of classes by the name of the task.

    Raises:
        ValueError: No task, or a name with a dot.
    """

    def __init__(self, in_features: int, num_classes: Mapping[str, int]) -> None:
        if not num_classes or any("." in task or hasattr(nn.ModuleDict(), task) for task in num_classes):
            raise ValueError(
                "num_classes must have names without dots, one at least, and none of nn.ModuleDict's own, got "
                f"{dict(num_classes)}"
            )
        super().__init__({task: nn.Linear(in_features, classes) for task, classes in num_classes.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of all tasks."""
        return {task: head(x) for task, head in self.items()}


def make_classifier(in_features: int, num_classes: int | Mapping[str, int]) -> nn.Module:
    """The last layer: one linear layer, or one for each task."""
    return nn.Linear(in_features, num_classes) if isinstance(num_classes, int) else Heads(in_features, num_classes)


def widened(channels: int, width: float) -> int:
    """A number of channels times the width: rounded, one at least."""
    return max(1, round(width * channels))


def draw_convolutions(network: nn.Module) -> None:
    """Draw the weights of convolutions as He et al. 2015, Eq. 14 do: normal, of variance ``2 / fan_out``.

    Downsampling layers, known by the name ``down``, keep what they start with and take no random numbers here.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | DiffStrideConv2d) and "down" not in name.split("."):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
