"""The cost term of the paper."""

import pytest
from torch import nn

import diffstride as ds
from diffstride import DiffStride2d


def test_stride_cost_is_equation_6():
    model = nn.Sequential(DiffStride2d((2.0, 3.0)), nn.ReLU(), DiffStride2d((1.5, 2.0)), DiffStride2d(4.0, shared=True))
    j = ds.stride_cost(model)
    assert j.item() == pytest.approx(1 / 6 + 1 / 18 + 1 / 288)
    j.backward()
    assert model[2].stride.grad[0].item() == pytest.approx(-(1 / 18 + 1 / 288) / 1.5)
    with pytest.raises(ValueError, match="model must have learnable strides"):
        ds.stride_cost(nn.Identity())
