"""The cost term of the paper."""

import pytest
import torch

import diffstride as ds


def test_stride_cost_is_equation_six():
    layers = [ds.DiffStride2d((2, 3)), ds.DiffStride2d(1.5, shared=True), ds.DiffStride2d((1.0, 4.0))]
    shared_twice = layers[0]
    model = torch.nn.Sequential(*layers, torch.nn.Conv2d(1, 1, 1), shared_twice).double()
    first, second, third = 1 / 6, 1 / 1.5**2, 1 / 4
    cost = ds.stride_cost(model)
    assert cost.item() == pytest.approx(first + first * second + first * second * third, rel=1e-12)
    cost.backward()
    with torch.no_grad():
        layers[1].stride += 1e-6
    assert layers[1].stride.grad.item() == pytest.approx((ds.stride_cost(model).item() - cost.item()) / 1e-6, rel=1e-4)
    bounded = ds.DiffStride1d(3.0, bounds=(2.0, 4.0))
    with torch.no_grad():
        bounded.stride.fill_(9.0)
    assert ds.stride_cost(bounded).item() == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match=r"model must have learnable strides .* got none in Conv2d"):
        ds.stride_cost(torch.nn.Conv2d(1, 1, 1))
