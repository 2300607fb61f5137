"""Bad input: one line that names the argument, the bound and the value."""

import math
import re

import pytest
import torch

import diffstride as ds
from diffstride import functional as F

X = torch.randn(2, 3, 8, 8)

CASES = [
    (lambda: ds.DiffStride2d(0.5), ValueError, r"stride must be >= 1, got 0\.5"),
    (lambda: ds.DiffStride2d((2, -1)), ValueError, r"stride must be >= 1, got 2, -1"),
    (lambda: ds.DiffStride2d(math.nan), ValueError, r"stride must be finite, got nan"),
    (lambda: ds.DiffStride2d(math.inf), ValueError, r"stride must be finite, got inf"),
    (lambda: ds.DiffStride2d((2, 2, 2)), ValueError, r"stride must have 2 entries \(one per axis\), got 3"),
    (lambda: ds.DiffStride2d("2"), TypeError, r"stride must be a number or a sequence of 2 numbers, got '2'"),
    (lambda: ds.DiffStride2d(None), TypeError, r"stride must be a number or a sequence of 2 numbers, got None"),
    (lambda: ds.DiffStride2d(True), TypeError, r"stride must be a number"),
    (lambda: ds.DiffStride2d((2, 3), shared=True), ValueError, r"one number when shared=True, got \(2\.0, 3\.0\)"),
    (lambda: ds.DiffStride2d(shared="no"), TypeError, r"shared must be True or False, got 'no'"),
    (lambda: ds.DiffStride2d(smoothness=0), ValueError, r"smoothness must be > 0 .*use SpectralPool.*, got 0"),
    (lambda: ds.DiffStride2d(smoothness=-1), ValueError, r"smoothness must be > 0 and finite, got -1"),
    (lambda: ds.DiffStride2d(smoothness="4"), TypeError, r"smoothness must be a number, got '4'"),
    (lambda: ds.DiffStride2d(bounds=(0.5, None)), ValueError, r"bounds must satisfy 1 <= lower <= upper, got"),
    (lambda: ds.DiffStride2d(bounds=(3, 2)), ValueError, r"bounds must satisfy 1 <= lower <= upper, got \(3, 2\)"),
    (lambda: ds.DiffStride2d(bounds=3), TypeError, r"bounds must be a pair \(lower, upper\), got 3"),
    (lambda: ds.DiffStride2d(5, bounds=(1, 4)), ValueError, r"stride must lie within bounds \(1\.0, 4\.0\), got"),
    (lambda: ds.DiffStride2d(window="middle"), ValueError, r"window must be one of 'outer', 'inner', got 'middle'"),
    (lambda: ds.DiffStride2d(basis="dst"), ValueError, r"basis must be one of 'dft', 'dct', got 'dst'"),
    (lambda: ds.DiffStride2d(norm="max"), ValueError, r"norm must be one of 'forward', .*, got 'max'"),
    (lambda: ds.DiffStride2d(backend="cuda"), ValueError, r"backend must be one of 'auto', .*, got 'cuda'"),
    (lambda: ds.DiffStride2d(size_multiple=0), ValueError, r"size_multiple must be >= 1, got 0"),
    (lambda: ds.DiffStride2d(size_multiple=2.5), TypeError, r"size_multiple must be an int, got 2\.5"),
    (lambda: ds.DiffStride2d()(X[0, 0]), ValueError, r"input must have 4 dimensions .* or 3 .*, got shape \(8, 8\)"),
    (lambda: ds.DiffStride2d()(X[None]), ValueError, r"input must have 4 dimensions .*, got shape \(1, 2, 3, 8, 8\)"),
    (lambda: ds.DiffStride1d()(X), ValueError, r"input must have 3 dimensions .* for 1 spatial axis, got shape"),
    (lambda: ds.DiffStride2d()(X.int()), TypeError, r"input must be floating point .*, got torch\.int32"),
    (lambda: ds.DiffStride2d()(X + 0j), TypeError, r"input must be floating point .*, got torch\.complex64"),
    (lambda: ds.DiffStride2d()([[1.0]]), TypeError, r"input must be a torch\.Tensor, got list"),
    (lambda: ds.DiffStride2d()(X[:, :, :0]), ValueError, r"spatial sizes must be >= 1, got shape \(2, 3, 0, 8\)"),
    (lambda: ds.DiffStride2d().output_size(0), ValueError, r"size must be >= 1, got 0"),
    (lambda: ds.DiffStride2d().output_size((8, 8, 8)), ValueError, r"size must have 2 entries .*, got 3"),
    (lambda: ds.SpectralPool2d(0.5), ValueError, r"stride must be >= 1, got 0\.5"),
    (lambda: ds.SpectralPool2d(9)(X), ValueError, r"strides must be <= the input's sizes \(8, 8\), got \(9\.0, 9\.0\)"),
    (lambda: ds.SpectralPool2d(2)(X.long()), TypeError, r"input must be floating point .*, got torch\.int64"),
    (lambda: F.stride_mask(8, 0.5, 4), ValueError, r"stride must be >= 1, got 0\.5"),
    (lambda: F.stride_mask(8, torch.tensor(math.nan), 4), ValueError, r"stride must be finite, got nan"),
    (lambda: F.stride_mask(0, 2.0, 4), ValueError, r"size must be >= 1, got 0"),
    (lambda: F.stride_mask(8, 2.0, -1), ValueError, r"smoothness must be > 0 and finite, got -1"),
    (lambda: F.diffstride(X, torch.tensor([2, 2])), TypeError, r"strides must be floating point, got torch\.int64"),
    (lambda: F.diffstride(X, torch.tensor(2.0)), ValueError, r"strides must have shape \[d\], .*, got shape \(\)"),
    (lambda: F.diffstride(X, 2.0), TypeError, r"strides must be a sequence with one number per axis, got 2\.0"),
    (lambda: F.diffstride(X, (2.0, math.inf)), ValueError, r"stride must be finite, got 2, inf"),
    (lambda: F.diffstride(X, (2.0, 2.0), 0), ValueError, r"smoothness must be > 0 .*got 0"),
    (lambda: F.diffstride(X, (2.0, 2.0), output_size=(4, 0)), ValueError, r"output_size must be >= 1, got 0"),
    (lambda: F.spectral_pool(X, (2.0, 0.1)), ValueError, r"strides must be >= 1, got 2, 0\.1"),
    (lambda: F.spectral_pool(X, 2.0), TypeError, r"strides must be a sequence with one number per axis, got 2\.0"),
    (lambda: ds.spectral_resize(X, 0), ValueError, r"size must be >= 1, got 0"),
    (lambda: ds.spectral_resize(X, 2.5), TypeError, r"size must be a sequence with one number per axis, got 2\.5"),
    (lambda: ds.spectral_resize(X, (4, 4, 4, 4)), ValueError, r"input must have 6 dimensions"),
    (lambda: ds.param_groups(ds.DiffStride2d(), -1), ValueError, r"lr must be >= 0, got -1"),
    (lambda: ds.param_groups(torch.nn.ReLU(), 0.1), ValueError, r"model must have trainable parameters, got none in"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[m for _, _, m in CASES])
def test_one_line_that_names_argument_bound_and_value(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_stride_that_went_astray_names_its_layer(value):
    layer = ds.DiffStride2d((2.0, 3.0), window="inner")
    with torch.no_grad():
        layer.stride[1] = value
    with pytest.raises(ValueError, match=re.escape("in DiffStride2d(stride=(2, ")):
        layer(X)


@pytest.mark.parametrize("layer", [ds.DiffStride2d(2.0), ds.SpectralPool2d(2.0)])
@pytest.mark.parametrize("backend", ["fft", "matmul"])
def test_an_empty_batch_works(layer, backend):
    layer.backend = backend
    y = layer(torch.empty(0, 3, 16, 17, requires_grad=True))
    assert y.shape == (0, 3, *layer.output_size((16, 17)))
    y.sum().backward()
