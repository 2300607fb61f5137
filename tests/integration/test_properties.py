"""Properties: means kept, transposition, band-limited signals, composition, scipy's rule."""

import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffstride as ds
from diffstride import functional as F

both = pytest.mark.parametrize(
    "options", [{"basis": s, "backend": b} for s in ("dft", "dct") for b in ("fft", "matmul")]
)


def band_limited(size, basis, top, seed=0, n=None):
    """Return a sum of waves of frequencies up to `top`, sampled at `n` points of the same interval."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, top + 1))
    n = n or size
    t = np.arange(n) / n if basis == "dft" else (np.arange(n) + 0.5) / n
    waves = range(top + 1)
    if basis == "dft":
        y = sum(a[f] * np.cos(2 * np.pi * f * t) + b[f] * np.sin(2 * np.pi * f * t) for f in waves)
    else:  # f = k / 2: only cosines of whole and half cycles
        y = (
            sum(a[f] * np.cos(2 * np.pi * f * t) + b[f] * np.cos(np.pi * (2 * f - 1) * t) for f in waves if f > 0)
            + a[0]
        )
    return torch.tensor(y)[None, None]


@both
@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 40), stride=st.floats(1, 20), smoothness=st.floats(0.2, 8), value=st.floats(-5, 5))
def test_a_constant_keeps_its_value(options, size, stride, smoothness, value):
    x = torch.full((1, 2, size), value, dtype=torch.float64)
    for window in ("outer", "inner", "hard"):
        y = F.diffstride(x, (stride,), smoothness, window=window, **options)
        torch.testing.assert_close(y, torch.full_like(y, value), rtol=0, atol=1e-12)


@both
def test_pooling_the_transpose_is_the_transpose_of_pooling(options):
    for shape in ((8, 8), (9, 12), (7, 5), (33, 16)):
        x = torch.randn(2, 3, *shape, dtype=torch.float64)
        for layer, turned in (
            (ds.DiffStride2d((1.7, 2.6), 1, **options), ds.DiffStride2d((2.6, 1.7), 1, **options)),
            (ds.SpectralPool2d((2, 3), **options), ds.SpectralPool2d((3, 2), **options)),
        ):
            torch.testing.assert_close(turned(x.mT), layer(x).mT)


@both
def test_a_band_limited_signal_is_resampled_exactly(options):
    """Frequencies in the flat part of the window come out as if the signal had been sampled at N' points."""
    for size, stride, smoothness in ((32, 2.0, 4.0), (33, 2.3, 1.0), (40, 3.1, 7.3)):
        top = int(size / (2 * stride))
        layer = ds.DiffStride1d(stride, smoothness, **options).double()
        (new,) = layer.output_size(size)
        x = band_limited(size, options["basis"], top)
        torch.testing.assert_close(layer(x), band_limited(size, options["basis"], top, n=new), rtol=0, atol=1e-6)


@both
def test_size_multiple_keeps_the_signal(options):
    """A multiple samples the same trigonometric polynomial finer: resized down again it is unchanged."""
    x = torch.randn(1, 2, 41, dtype=torch.float64)
    plain, finer = (ds.DiffStride1d(2.2, 3.0, size_multiple=k, **options).double() for k in (1, 8))
    assert plain.output_size(41) == (24,)
    assert ds.DiffStride1d(2.3, 3.0, size_multiple=8).output_size(41) == (24,)
    plain_y, finer_y = plain(x[..., :39]), finer(x[..., :39])
    assert (plain_y.shape[-1], finer_y.shape[-1]) == (23, 24)
    torch.testing.assert_close(ds.spectral_resize(finer_y, 23, **options), plain_y, rtol=0, atol=1e-6)


@both
def test_resizing_up_again_returns_what_the_window_kept(options):
    size, stride, smoothness = 31, 2.4, 3.0
    x = torch.randn(1, 2, size, dtype=torch.float64)
    y = F.diffstride(x, (stride,), smoothness, **options)
    assert y.shape[-1] == 18
    # The full-size signal with the window applied and nothing cropped.
    kept = F.diffstride(x, (stride,), smoothness, output_size=size, **options)
    down_up = ds.spectral_resize(y, size, **options)
    if options["basis"] == "dft":  # below N'/2 nothing is lost; at N'/2 = 9 cosine and sine are no longer apart
        np.testing.assert_allclose(np.fft.rfft(down_up)[..., :9], np.fft.rfft(kept)[..., :9], atol=1e-11)
    else:
        np.testing.assert_allclose(scipy.fft.dct(down_up.numpy())[..., :18], scipy.fft.dct(kept.numpy())[..., :18])


@pytest.mark.parametrize("size", [5, 8, 13])
@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_resizing_up_and_down_is_the_identity(size, basis):
    x = torch.randn(2, 1, size, dtype=torch.float64)
    if basis == "dft" and size % 2 == 0:  # the promise is for frequencies below N/2
        x = torch.fft.irfft(torch.fft.rfft(x)[..., :-1], n=size)
    for new in (size, size + 1, 2 * size, 2 * size + 3):
        torch.testing.assert_close(ds.spectral_resize(ds.spectral_resize(x, new, basis=basis), size, basis=basis), x)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9])
def test_resizing_up_is_scipy_resample(size):
    x = torch.randn(3, 2, size, dtype=torch.float64)
    for new in (size, size + 1, size + 2, 3 * size, 17):
        expected = scipy.signal.resample(x.numpy(), new, axis=-1)
        np.testing.assert_allclose(ds.spectral_resize(x, new).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("size", [6, 9, 16])
def test_dct_pool_is_scipys_cropped_orthonormal_dct(size):
    x = torch.randn(2, 3, size, size + 3, dtype=torch.float64)
    y = ds.SpectralPool2d((1.5, 2), basis="dct", norm="ortho")(x)
    h, w = y.shape[-2:]
    cropped = scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")[..., :h, :w]
    np.testing.assert_allclose(y.numpy(), scipy.fft.idctn(cropped, axes=(-2, -1), norm="ortho"), atol=1e-12)


def test_shifting_by_a_whole_output_step_shifts_the_output():
    x = torch.randn(1, 2, 48, dtype=torch.float64)
    layer = ds.DiffStride1d(4.0, 2.0).double()  # 48 -> 16: one output step is three samples
    assert layer.output_size(48) == (16,)
    torch.testing.assert_close(layer(x.roll(3, -1)), layer(x).roll(1, -1))


def test_a_flip_is_a_flip_for_the_dct():
    x = torch.randn(1, 2, 21, dtype=torch.float64)
    layer = ds.DiffStride1d(2.3, 2.0, basis="dct").double()
    torch.testing.assert_close(layer(x.flip(-1)), layer(x).flip(-1))


def test_ortho_keeps_the_energy_of_what_it_keeps():
    """Eq. 1 is unitary: with nothing but the flat band in the signal, energy in is energy out."""
    x = band_limited(32, "dft", 7)
    y = ds.DiffStride1d(2.0, 4.0, norm="ortho").double()(x)
    assert y.square().sum().item() == pytest.approx(x.square().sum().item(), rel=1e-6)
