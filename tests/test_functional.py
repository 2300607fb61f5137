"""Both backends against the naive sums of reference.py: all sizes, strides, windows, bases, norms, ranks, dtypes."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

import diffstride as ds
from diffstride import functional as F
from diffstride import geometry
from diffstride.backends import DENSE_UP_TO, matmul
from tests.helpers import reference

BACKENDS = ("fft", "matmul")
NORMS = ("forward", "ortho", "backward")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LAYERS = {1: ds.DiffStride1d, 2: ds.DiffStride2d, 3: ds.DiffStride3d}
POOLS = {1: ds.SpectralPool1d, 2: ds.SpectralPool2d, 3: ds.SpectralPool3d}


def relative_error(actual, expected):
    assert tuple(actual.shape) == np.shape(expected)
    difference = actual.double().numpy() - expected
    return np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-300)


def strides_up_to(size):
    """Return strides from 1 to N: the ends, whole and fractional ones, both sides of the clamps."""
    values = {1.0, 1.1, 1.6, 2.0, 2.6, 3.0, 4.0, math.pi, size / 3, size / 2, float(size)}
    return sorted(s for s in values if 1 <= s <= size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("basis", ["dft", "dct"])
@pytest.mark.parametrize("window", ["outer", "inner", "hard"])
def test_one_axis_in_float64_at_all_sizes_and_strides(backend, basis, window):
    norms = itertools.cycle(NORMS)
    for size in range(1, 66):
        x = torch.randn(1, 1, size, dtype=torch.float64)
        for stride, smoothness in itertools.product(strides_up_to(size), (0.5, 1, 4, 7.3)):
            norm = next(norms)
            expected = reference.diffstride(x, (stride,), smoothness, window, basis, norm)
            actual = F.diffstride(
                x, torch.tensor([stride], dtype=torch.float64), smoothness,
                window=window, basis=basis, norm=norm, backend=backend,
            )  # fmt: skip
            assert relative_error(actual, expected) < 1e-12, (size, stride, smoothness, norm)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_one_axis_in_lower_precision_at_all_sizes_and_strides(dtype, backend, basis):
    """Relative to the input: some outputs are nothing but what cancellation leaves."""
    for size in range(1, 66):
        x = torch.randn(3, 4, size).to(dtype)
        for stride, smoothness, window in itertools.product(
            strides_up_to(size), (0.5, 7.3), ("outer", "inner", "hard")
        ):
            stride = float(np.float32(stride))
            expected = reference.diffstride(x.double(), (stride,), smoothness, window, basis)
            actual = F.diffstride(
                x, torch.tensor([stride], dtype=torch.float32), smoothness, window=window, basis=basis, backend=backend
            )
            scale = (expected.shape[-1] / size) ** 0.5 * x.double().norm().item()
            assert np.linalg.norm(actual.double().numpy() - expected) < TOLERANCE[dtype] * scale, (size, stride)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_fixed_pool_in_float64_at_all_sizes_and_strides(backend, basis):
    for size in range(1, 66):
        x = torch.randn(1, 1, size, dtype=torch.float64)
        for stride, norm in zip(strides_up_to(size), itertools.cycle(NORMS), strict=False):
            expected = reference.spectral_pool(x, (stride,), basis, norm)
            actual = F.spectral_pool(x, (stride,), basis=basis, norm=norm, backend=backend)
            assert relative_error(actual, expected) < 1e-12, (size, stride, norm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_resize_to_any_size(backend, basis):
    for size, new in itertools.product((1, 2, 3, 4, 7, 8, 13, 16), (1, 2, 3, 5, 8, 12, 13, 16, 21, 32)):
        x = torch.randn(2, 1, size, dtype=torch.float64)
        for norm in NORMS:
            expected = reference.spectral_resize(x, (new,), basis, norm)
            actual = ds.spectral_resize(x, (new,), basis=basis, norm=norm, backend=backend)
            assert relative_error(actual, expected) < 1e-12, (size, new, norm)


SHAPES = [(7,), (12,), (5, 8), (9, 6), (1, 9), (4, 2), (3, 6, 5), (8, 1, 4)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_layers_in_one_two_and_three_dimensions(dtype, backend, basis):
    for shape, norm, smoothness, window in zip(
        SHAPES, itertools.cycle(NORMS), itertools.cycle((0.5, 1, 4, 7.3)), itertools.cycle(("outer", "inner", "hard")),
        strict=False,
    ):  # fmt: skip
        ndim = len(shape)
        stride = [1.25, 2.5, 1.5][:ndim]  # exact in float32
        x = torch.randn(2, 3, *shape).to(dtype)
        options = {"basis": basis, "norm": norm, "backend": backend}
        layer = LAYERS[ndim](stride, smoothness, window=window, **options).to(dtype)
        expected = reference.diffstride(x.double(), stride, smoothness, window, basis, norm)
        actual = layer(x).detach()
        assert actual.dtype == dtype
        assert relative_error(actual, expected) < TOLERANCE[dtype], (shape, norm, smoothness)
        if all(n // s >= 1 for n, s in zip(shape, stride, strict=True)):
            expected = reference.spectral_pool(x.double(), stride, basis, norm)
            actual = POOLS[ndim](stride, **options)(x)
            assert relative_error(actual, expected) < TOLERANCE[dtype], (shape, norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_reduced_precision_on_long_axes(dtype, backend, basis):
    x = torch.randn(1, 2, 601).to(dtype)
    expected = reference.diffstride(x.double(), (3.7109375,), 30, basis=basis)
    actual = F.diffstride(x, (3.7109375,), 30, basis=basis, backend=backend)
    assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("basis", ["dft", "dct"])
@pytest.mark.parametrize("window", ["outer", "inner"])
def test_mask(basis, window):
    for size, stride, smoothness in itertools.product((1, 2, 9, 32), (1.0, 2.0, 2.7, 9.0), (0, 0.5, 4, 7.3)):
        expected = reference.mask(size, stride, smoothness, window, basis)
        stride = torch.tensor(stride, dtype=torch.float64)
        actual = F.stride_mask(size, stride, smoothness, window=window, basis=basis)
        np.testing.assert_allclose(actual.numpy(), expected, atol=1e-13)
    hard = {"dft": [1, 1, 1, 1, 0], "dct": [1, 1, 1, 1, 1, 1, 0, 0]}[basis]  # of 8 samples 6 are left
    assert F.stride_mask(8, 1.5, 4, window="hard", basis=basis).tolist() == hard
    assert F.stride_mask(8, 2.0, 4).dtype == torch.float32
    assert F.stride_mask(8, torch.tensor(2.0, dtype=torch.bfloat16), 4).dtype == torch.float32


def test_auto_backend_is_exact_on_both_sides_of_its_threshold():
    for size in (DENSE_UP_TO[torch.float32], DENSE_UP_TO[torch.float32] + 1):
        x = torch.randn(1, 1, size, dtype=torch.float64)
        assert relative_error(F.diffstride(x, (5.3,), 9.0), reference.diffstride(x, (5.3,), 9.0)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_size_brings_branches_of_other_sizes_together(backend):
    """A branch may be asked for a size of its own: fewer, as many, or more samples than it has."""
    x = torch.randn(1, 1, 9, 8, dtype=torch.float64)
    weights = [reference.mask(n, 1.7, 1) for n in (9, 8)]
    for new in ((5, 5), (9, 8), (10, 9), (7, 12)):
        expected = reference.resample(x, new, weights)
        actual = F.diffstride(x, (1.7, 1.7), 1, output_size=new, backend=backend)
        assert relative_error(actual, expected) < 1e-12


def test_tables_kept_between_calls_serve_training_after_inference():
    x = torch.randn(1, 1, 37, dtype=torch.float64)
    layer = ds.DiffStride1d(2.3, 1, backend="matmul")
    with torch.inference_mode():
        first = layer(x)
    second = layer(x)
    second.sum().backward()
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])  # the derivative as a matrix, and as waves
@pytest.mark.parametrize("basis", ["dft", "dct"])
@pytest.mark.parametrize("window", ["outer", "inner"])
@pytest.mark.parametrize("size", [12, 13, 20, 24])
@pytest.mark.parametrize("taps", [None, geometry.Taps(3, 1, 1, 20)])
def test_operators_of_numbers_are_those_of_tensors(taps, size, window, basis, dtype):
    axis = geometry.Axis(20, size, basis, 0.7, 3.0, window, taps=taps)
    stride = torch.tensor(1.9, dtype=torch.float64, requires_grad=True)
    matrix = matmul.dense_matrix(axis, axis.weights(stride, stride))
    built = matmul.DenseOperator.from_stride(
        axis, 1.9, dtype, torch.device("cpu"), derivative_first=size == 13, small=True, keep=False
    )
    assert (built.stacked is not None) == (dtype == torch.float64 and matmul.is_short(axis))
    tolerance = {"rtol": 0, "atol": 1e-13 if dtype == torch.float64 else 1e-3}
    torch.testing.assert_close(built.matrix.double(), matrix.detach(), **tolerance)
    upstream, x = torch.randn(matrix.shape[0], dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    (expected,) = torch.autograd.grad(upstream @ matrix @ x, stride)
    found = built.on_ramp(x.to(dtype), -1).double() @ built.adjoint_on_ramp(upstream.to(dtype), -1).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.03)


def near_the_top(ndim):
    """Return a map of 6e4: a step along one axis, which overshoots, times a wave along the others that is cut."""
    step = torch.where(torch.arange(16) < 8, -6e4, 6e4).double()
    wave = 0.4 + 0.6 * (-1.0) ** torch.arange(16, dtype=torch.float64)
    shape = [[16 if j == i else 1 for j in range(ndim)] for i in range(ndim)]
    x = step.view(shape[0])
    for i in range(1, ndim):
        x = x * wave.view(shape[i])
    return x.expand(1, 2, *[16] * ndim).contiguous()


@pytest.mark.parametrize("frozen", [False, True], ids=["learned", "frozen"])
@pytest.mark.parametrize("turned", [False, True], ids=["step first", "step last"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["layer", "pool", "convolution"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_overshoot_between_two_axes_stays_in_the_range_of_float16(kind, ndim, layout, turned, frozen):
    layers = {
        "layer": [None, None, ds.DiffStride2d, ds.DiffStride3d],
        "pool": [None, None, ds.SpectralPool2d, ds.SpectralPool3d],
        "convolution": [None, None, ds.DiffStrideConv2d, ds.DiffStrideConv3d],
    }[kind]
    layer = layers[ndim](2, 512, 3, 2.0, padding=1) if kind == "convolution" else layers[ndim](2.0)
    if kind == "convolution":
        with torch.no_grad():
            layer.weight.mul_(0.1)
    x = near_the_top(ndim)
    if turned:
        x = x.transpose(2, -1).contiguous()
    expected = copy.deepcopy(layer).double()(x).detach()
    assert 1e3 < expected.abs().max() < 6.5e4
    if kind == "convolution":
        assert layer.schedule(x.shape[2:], expected.shape[2:]).fused_axes == ndim
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last if ndim == 2 else torch.channels_last_3d)
    layer.half()
    model = ds.freeze(layer, torch.zeros_like(x).half()) if frozen else layer
    y = model(x.half()).double()
    assert (y - expected).abs().max() < 4e-3 * expected.abs().max()


def test_floats_of_eight_bits_are_refused():
    dtype = torch.float8_e5m2
    x = torch.zeros(1, 2, 8, 8, dtype=dtype)
    for call in (
        lambda: ds.DiffStride2d()(x),
        lambda: ds.SpectralPool2d(2)(x),
        lambda: ds.DiffStrideConv2d(2, 2, 3)(x),
        lambda: ds.spectral_resize(x, (4, 4)),
        lambda: F.diffstride(torch.zeros(1, 2, 8, 8), torch.ones(2).to(dtype)),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"must be floating point \(float64, .*, got {dtype}$"):
            call()


def test_sizes_of_numpy_are_sizes():
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(F.spectral_resize(x, np.int64(9)), F.spectral_resize(x, 9))
