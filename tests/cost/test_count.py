"""Multiply-accumulates of a forward pass against the arithmetic. test_model.py compares them on whole models."""

import torch
from torch import nn

from diffstride import DiffStride2d
from diffstride.cost import count_macs


def test_macs_of_convolutions_and_linear_layers_and_those_of_resampling_apart():
    pool = DiffStride2d((2.0, 4.0), 1, backend="matmul")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), pool, nn.Conv2d(8, 4, 1, groups=4), nn.Flatten(), nn.LazyLinear(5)
    )
    x = torch.randn(2, 3, 16, 20)
    model(x)
    model.train()
    model[2].eval()
    h, w = 10, 7
    assert pool.output_size((16, 20)) == (h, w)
    expected = 2 * (16 * 20 * 8 * 27 + h * w * 4 * 2 + 4 * h * w * 5)
    macs = count_macs(model, x)
    assert macs.model == expected
    assert macs.resampling == 2 * 8 * (20 * h * 16 + h * w * 20)
    assert model.training
    assert not model[2].training
    assert count_macs(nn.Sequential(nn.Conv2d(3, 8, 1), DiffStride2d(2.0, backend="fft")), x).resampling == 0
