"""Output lengths computed from layers, beside the layers themselves."""

import pytest
import torch
from torch import nn

from diffstride.nn.lengths import _output_size

LAYERS = {
    "ceil_mode": nn.MaxPool1d(3, 2, padding=1, ceil_mode=True),
    "ceil_mode of a stride beyond the kernel": nn.AvgPool1d(2, 3, ceil_mode=True),
    "floor": nn.MaxPool1d(3, 2),
    "convolution": nn.Conv1d(1, 1, 3, stride=4, padding=6, dilation=2),
    "same": nn.Conv1d(1, 1, 5, padding="same"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_are_those_of_the_layers(kind):
    for n in range(5, 24):
        assert _output_size(LAYERS[kind], n, 0) == LAYERS[kind](torch.zeros(1, 1, n)).shape[-1], n
