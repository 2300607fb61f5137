"""Networks of the studies, in which the way of downsampling is one argument."""

from diffstride.models.densenet import DenseLayer, DenseNet
from diffstride.models.downsample import DownsampleFactory, make_downsample
from diffstride.models.network import Network
from diffstride.models.resnet import ResidualBlock, ResNet
from diffstride.models.tiny import TinyCNN

__all__ = [
    "DenseLayer",
    "DenseNet",
    "DownsampleFactory",
    "Network",
    "ResNet",
    "ResidualBlock",
    "TinyCNN",
    "make_downsample",
]
