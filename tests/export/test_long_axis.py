"""Products with small matrices equal the operator of a long axis."""

import io

import numpy as np
import pytest
import torch

import diffstride as ds
from diffstride.export.long_axis import LongAxis
from diffstride.options import LayerOptions
from tests.helpers import reference


@pytest.mark.parametrize("basis", ["dft", "dct"])
@pytest.mark.parametrize(
    ("n", "stride", "options"),
    [
        (1201, 1.3, {"window": "inner"}),
        (1024, 4.0, {"window": "outer"}),
        (1500, 2.0, {"window": "inner", "smoothness": 90.0}),
        (997, 60.0, {"window": "inner", "norm": "backward"}),
    ],
)
def test_the_operator_is_the_naive_sum(n, stride, options, basis):
    options = LayerOptions(**{"smoothness": 4.0, **options}, basis=basis)
    (size,) = options.output_sizes((n,), (stride,))
    axis = options.axis(0, n, size)
    small = LongAxis(axis, axis.weights(axis.clamp(stride), torch.empty((), dtype=torch.float64)))
    x = torch.randn(2, n, dtype=torch.float64)
    expected = reference.diffstride(
        x.numpy(), (stride,), options.smoothness, options.window, basis, options.norm, bounds=(1.0, np.inf)
    )
    assert np.linalg.norm(small(x).numpy() - expected) < 1e-7 * np.linalg.norm(expected)


def test_an_axis_that_grows():
    options = LayerOptions(window="inner")
    axis = options.axis(0, 900, 1300)._replace(smoothness=None)
    small = LongAxis(axis, axis.weights(None, torch.empty((), dtype=torch.float64)))
    x = torch.randn(2, 900, dtype=torch.float64)
    expected = reference.spectral_resize(x.numpy(), (1300,))
    assert np.linalg.norm(small(x).numpy() - expected) < 1e-7 * np.linalg.norm(expected)


def test_the_matrices_are_small():
    options = LayerOptions(window="inner")
    axis = options.axis(0, 4000, 2000)
    small = LongAxis(axis, axis.weights(2.0, torch.empty((), dtype=torch.float64)))
    assert small.rank <= 12
    assert sum(b.numel() for b in small.buffers() if b.is_floating_point()) < 4000 * 2000 / 8


@pytest.mark.parametrize("shape", [(2, 3, 1500), (3, 1500), (2, 3, 1500, 5), (1, 2, 4, 1500)])
def test_frozen_layers_at_any_place_of_the_axis_and_any_batch(shape):
    strides = [1.3 if n == 1500 else 1.4 for n in shape[2 if len(shape) > 2 else 1 :]]
    kind = {1: ds.DiffStride1d, 2: ds.DiffStride2d}[len(strides)]
    model, x = kind(strides, window="inner"), torch.randn(shape)
    frozen = ds.freeze(model, x)
    assert any(name.endswith(".near") for name in frozen.state_dict())
    torch.testing.assert_close(frozen(x), model(x), rtol=0, atol=1e-5)
    if x.ndim > 2:
        more = torch.randn(5, *shape[1:])
        torch.testing.assert_close(frozen(more), model(more), rtol=0, atol=1e-5)
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), frozen(x))
    exported = torch.export.export(frozen, (x,)).module()
    torch.testing.assert_close(exported(x), frozen(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = ds.DiffStride2d((1.6, 1.5), window="inner")
    x = torch.randn(1, 2, 1400, 12).to(dtype)
    exact = model(x.double())
    frozen = ds.freeze(model, x)
    assert any(name.endswith(".near") for name in frozen.state_dict())
    assert (frozen(x) - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_convolution_that_would_be_fused_comes_first():
    model = ds.DiffStrideConv1d(1, 256, 3, 90.0, window="inner")
    x = torch.randn(1, 1, 9000)
    assert model.schedule((9000,), model.output_size(9000)).fused_axes == 1
    torch.testing.assert_close(ds.freeze(model, x)(x), model(x), rtol=0, atol=1e-4 * model(x).abs().max().item())
