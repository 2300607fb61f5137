"""Sizes, bounds and the clamp that lets gradients point back inside."""

import pytest
import torch

import diffstride as ds
from diffstride import geometry
from tests.helpers import reference


@pytest.mark.parametrize(
    ("size", "stride", "smoothness", "expected"),
    [(32, 2, 4, 24), (32, 2.6, 4, 20), (64, 4, 4, 24), (8, 2, 4, 8), (32, 1, 4, 32), (1, 3, 4, 1), (33, 2, 1, 18)],
)
def test_output_sizes_of_the_design(size, stride, smoothness, expected):
    assert ds.DiffStride1d(stride, smoothness).output_size(size) == (expected,)
    assert ds.DiffStride1d(stride, smoothness)(torch.randn(1, 1, size)).shape[-1] == expected


def test_a_float32_stride_means_its_decimal_value():
    """In float32 1.1 and 1.6 lie above their decimal value, and N/S under a whole number."""
    assert ds.SpectralPool1d(1.1).output_size(11) == (10,)
    assert ds.DiffStride1d(1.1, 1).output_size(11) == (11,)
    assert ds.DiffStride1d(1.6, 1).output_size(16) == (12,)
    assert ds.DiffStride1d(1.6, 1, window="inner").output_size(16) == (10,)


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_size_multiple_rounds_up_or_to_the_largest_multiple_in_the_input(multiple):
    for size in range(1, 40):
        (plain,) = ds.DiffStride1d(2.3, 1).output_size(size)
        (rounded,) = ds.DiffStride1d(2.3, 1, size_multiple=multiple).output_size(size)
        up = next(n for n in range(plain, plain + multiple) if n % multiple == 0)
        if up <= size:
            assert rounded == up
        else:
            assert rounded == max((n for n in range(multiple, size + 1) if n % multiple == 0), default=size)


@pytest.mark.parametrize("window", ["outer", "inner"])
@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_range_of_a_stride(window, basis):
    for size in range(1, 66):
        for smoothness in (0.5, 1.0, 4.0, 7.3):
            lower, upper = geometry.stride_range(size, smoothness, (1.0, None), window, basis)
            for raw in (0.2, 1.0, 1.3, 7.0, 1e6):
                expected = reference.clamped(size, raw, smoothness, window, basis)
                assert min(max(raw, lower), upper) == pytest.approx(expected, rel=1e-14)
            # Two samples remain at the upper bound, wherever there are two.
            assert geometry.output_size(size, upper, smoothness, window) >= min(size, 2)


def test_bounds_of_the_user_hold():
    layer = ds.DiffStride1d(3, bounds=(2.0, 4.0))
    with torch.no_grad():
        layer.stride.fill_(9)
    assert layer.strides == (4.0,)
    assert layer.output_size(64) == ds.DiffStride1d(4).output_size(64)
    with torch.no_grad():
        layer.stride.fill_(1)
    assert layer.output_size(64) == ds.DiffStride1d(2).output_size(64)


@pytest.mark.parametrize(
    ("raw", "upstream", "passes"),
    # A descent step moves against the gradient.
    [(1.0, 1.0, False), (1.0, -1.0, True), (2.0, 1.0, True), (2.0, -1.0, True), (5.0, 1.0, True), (5.0, -1.0, False)],
)
def test_clamp_stops_only_what_points_outwards(raw, upstream, passes):
    stride = torch.tensor(raw, requires_grad=True)
    geometry.clamp_stride(stride, 1.5, 4.0).backward(torch.tensor(upstream))
    assert stride.grad.item() == (upstream if passes else 0.0)


def test_upper_bound_wins_where_the_bounds_cross():
    assert geometry.clamp_stride(torch.tensor(1.0), 1.506, 1.5).item() == 1.5
    assert geometry.clamp_stride(torch.tensor(9.0), 1.506, 1.5).item() == 1.5


def test_mask_counts_the_gradient_at_both_ends_of_the_ramp():
    """N=32, S=2, R=4: frequencies 8 and 12 lie exactly on the ramp's ends; dm/dS = -N / (2 S^2 R) on 8..12."""
    for dtype in (torch.float32, torch.float64):
        stride = torch.tensor(2.0, dtype=dtype, requires_grad=True)
        rows = [
            torch.autograd.grad(m, stride, retain_graph=True)[0].item()
            for m in geometry.mask(32, stride, 4.0, "outer", torch.arange(17.0).to(stride)).unbind()
        ]
        assert rows == [0.0] * 8 + [-1.0] * 5 + [0.0] * 4


@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_the_inner_window_is_the_identity_at_stride_1_with_a_live_gradient(basis):
    """The gradient of a stride there is that of all frequencies on the ramp: it sees what a smaller map would lose."""
    for size in (3, 4, 7, 8, 16, 33):
        layer = ds.DiffStride1d(1.0, 4.0, window="inner", basis=basis)
        x = torch.randn(3, 2, size)
        y = layer(x)
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
        (-y.square().sum()).backward()  # descent makes the stride smaller: the clamp stops it
        assert layer.stride.grad == 0
        layer(x).square().sum().backward()
        lost = x.double().numpy()
        expected = 0.0
        for row in lost.reshape(-1, size):
            slopes = reference.mask_slope(size, 1.0, 4.0, "inner", basis)
            change = reference.resample_axis(row, size, slopes, basis)
            expected += 2 * float((row * change).sum())
        assert expected < 0
        assert layer.stride.grad.item() == pytest.approx(expected, rel=1e-4)


def test_the_inner_ramp_is_full_from_a_stride_of_one_and_a_half():
    """There it is the ramp `clip((N/(2S) - f)/w, 0, 1)`; below, it deepens with the stride and never rises."""
    f = torch.arange(33).double()
    for smoothness in (0.7, 2.0, 4.0, 40.0):
        for stride in (1.5, 2.0, 3.7, 16.0):
            edge = 32 / stride
            full = ((edge - f) / min(smoothness, edge / 2)).clamp(0, 1)
            torch.testing.assert_close(geometry.mask(64, stride, smoothness, "inner", f), full)
        masks = torch.stack([geometry.mask(64, 1 + i / 100, smoothness, "inner", f) for i in range(60)])
        assert bool((masks[0] == 1).all())
        assert bool((masks.diff(dim=0) <= 1e-12).all())
        assert bool((masks.diff(dim=1) <= 1e-12).all())
