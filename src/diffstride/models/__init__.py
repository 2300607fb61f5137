"""Networks of the studies, in which the way of downsampling is one argument."""

from diffstride.models.audio import AudioCNN, SpectrogramBlock, WaveformCNN
from diffstride.models.densenet import DenseLayer, DenseNet
from diffstride.models.downsample import DownsampleFactory, make_downsample
from diffstride.models.network import Heads, Network
from diffstride.models.resnet import ResidualBlock, ResNet
from diffstride.models.tiny import TinyCNN

__all__ = [
    "AudioCNN",
    "DenseLayer",
    "DenseNet",
    "DownsampleFactory",
    "Heads",
    "Network",
    "ResNet",
    "ResidualBlock",
    "SpectrogramBlock",
    "TinyCNN",
    "WaveformCNN",
    "make_downsample",
]
