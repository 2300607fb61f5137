"""Networks of the studies, in which the way of downsampling is one argument."""

from diffstride.experiments.models.audio import AudioCNN, SpectrogramBlock, WaveformCNN
from diffstride.experiments.models.built import Built
from diffstride.experiments.models.densenet import DenseLayer, DenseNet
from diffstride.experiments.models.downsample import DownsampleFactory, make_downsample
from diffstride.experiments.models.network import Heads, Network
from diffstride.experiments.models.released import ReleasedDiffStride2d
from diffstride.experiments.models.resnet import ResidualBlock, ResNet
from diffstride.experiments.models.tiny import TinyCNN

__all__ = [
    "AudioCNN", "Built", "DenseLayer", "DenseNet", "DownsampleFactory", "Heads", "Network", "ReleasedDiffStride2d",
    "ResNet", "ResidualBlock", "SpectrogramBlock", "TinyCNN", "WaveformCNN", "make_downsample",
]  # fmt: skip
