"""A model with every kind of layer, for the tests of exports."""

import torch
from torch import nn

import diffstride as ds
from diffstride.nn.attach import attach


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def image_model():
    """Every kind of layer, one of them after a convolution that stays in place."""
    torch.manual_seed(0)
    kept = nn.Conv2d(8, 8, 3, padding=1)
    attach(kept, ds.DiffStride2d((1.4, 2.2), window="inner"))
    return nn.Sequential(
        ds.DiffStrideConv2d(3, 8, 3, 1.3, padding=1, smoothness=2),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        ds.DiffStride2d((1.2, 1.6), 2.0, basis="dct"),
        kept,
        nn.ReLU(inplace=True),
        ds.SpectralPool2d((1.5, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
