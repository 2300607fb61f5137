"""What the command line knows networks by."""

from torch import nn


class Network(nn.Module):
    """Base of the networks that `diffstride fit` offers by name: inputs `[B, C, ...]` to logits `[B, num_classes]`.

    It asks for nothing. Derive from it to give a network of your own to `fit`: `--model.network my_package.MyNetwork`.
    """
