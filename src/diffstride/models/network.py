"""What the command line knows networks by."""

from torch import nn

from diffstride.nn import DiffStrideConv2d


class Network(nn.Module):
    """Base of the networks that `diffstride fit` offers by name: inputs `[B, C, ...]` to logits `[B, num_classes]`.

    It asks for nothing. Derive from it to give a network of your own to `fit`: `--model.network my_package.MyNetwork`.
    """


def draw_convolutions(network: nn.Module) -> None:
    """Draw the weights of 2-d convolutions as He et al. 2015, Eq. 14 do: normal, of variance ``2 / fan_out``.

    Downsampling layers, known by the name ``down``, keep what they start with and take no random numbers here.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | DiffStrideConv2d) and "down" not in name.split("."):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
