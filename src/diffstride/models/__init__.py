"""Networks of the studies, in which the way of downsampling is one argument."""

from diffstride.models.downsample import DownsampleFactory, DownsampleMethod, make_downsample
from diffstride.models.resnet import ResidualBlock, ResNet

__all__ = ["DownsampleFactory", "DownsampleMethod", "ResNet", "ResidualBlock", "make_downsample"]
