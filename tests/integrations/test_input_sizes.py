"""Sizes that reach the layers of a model while it trains."""

import torch
from torch import nn

from diffstride import DiffStride2d
from diffstride.integrations.input_sizes import InputSizes


def test_sizes_at_scaled_strides_of_another_layer_hold_until_others_are_known():
    model = nn.Sequential(DiffStride2d(4.0, 1), DiffStride2d(4.0, 1))
    watch = InputSizes(model)
    x = torch.randn(1, 1, 64, 64)
    model[0].set_stride_scale(0.5)
    model(x)
    assert watch.sizes == {"0": (64, 64), "1": (34, 34)}  # 64/2 + 2
    model[0].set_stride_scale(0.25)
    model(x)
    assert watch.sizes["1"] == (64, 64)
    model[0].set_stride_scale(None)
    model[1].set_stride_scale(0.5)  # does not change what reaches it
    model(x)
    assert watch.sizes["1"] == (18, 18)
    model[0].set_stride_scale(0.5)
    model(x)
    assert watch.sizes["1"] == (18, 18)
    with torch.no_grad():
        model[0].stride.fill_(8.0)
    model.eval()(x)
    assert watch.sizes["1"] == (10, 10)
