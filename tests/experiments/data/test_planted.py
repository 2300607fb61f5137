"""Planted bands: the class is where the docs say, and nowhere else."""

import numpy as np
import pytest
import torch

from diffstride.experiments.data import PlantedBands
from diffstride.functional import stride_mask


def drawn(**options):
    data = PlantedBands(train_samples=options.pop("train_samples", 300), test_samples=40, **options)
    data.setup()
    return data


def decoded_bits(images, axis, band):
    """The class by hand: the sign that relates the phase of the harmonic to twice that of the fundamental."""
    profile = np.asarray(images[:, 0]).mean(axis=2 - axis)  # averages over the other axis
    spectrum = np.fft.fft(profile, axis=-1)
    return (spectrum[:, band] * np.conj(spectrum[:, band // 2]) ** 2).real > 0


def test_the_class_is_read_off_the_two_frequencies_of_each_axis():
    data = drawn()
    images, labels = data.train_set
    for axis, bit in enumerate((labels // 2, labels % 2)):
        assert (decoded_bits(images, axis, data.band[axis]) == (bit == 1).numpy()).mean() > 0.97


def test_without_the_frequency_of_the_band_the_class_is_gone():
    """Two draws that differ in the classes alone become equal when the band's frequencies are removed."""
    a, b = drawn(noise=0.0, train_samples=8), drawn(noise=0.0, train_samples=8)
    a.load()
    generator = torch.Generator().manual_seed(0)
    images, labels = a._draw(8, generator)
    flipped = images.clone()
    for axis, bit in enumerate((labels // 2, labels % 2)):
        spectrum = torch.fft.fft2(flipped)
        at = [0, 0]
        for sign in (1, -1):
            at[axis] = sign * a.band[axis]
            spectrum[..., at[0], at[1]] *= -1  # the other class
            at[axis] = 0
        flipped = torch.fft.ifft2(spectrum).real
        decoded = decoded_bits(flipped, axis, a.band[axis])
        assert (decoded == (bit == 0).numpy()).all()
    for picture in (images, flipped):
        spectrum = torch.fft.fft2(picture)
        spectrum[..., a.band[0], 0] = spectrum[..., -a.band[0], 0] = 0
        spectrum[..., 0, a.band[1]] = spectrum[..., 0, -a.band[1]] = 0
        picture.copy_(torch.fft.ifft2(spectrum).real)
    torch.testing.assert_close(images, flipped, atol=1e-4, rtol=1e-4)
    assert torch.equal(b.train_set[0], a.train_set[0])


def test_energy_lies_at_the_band_and_from_the_nuisance_up():
    data = drawn(noise=0.0, size=(32, 48), band=(4, 10), nuisance=(8, 16))
    images, _ = data.train_set
    power = np.abs(np.fft.fft2(images[:, 0].numpy())).mean(0)[:17, :25]
    power[power < 1e-4 * power.max()] = 0
    rows, columns = np.nonzero(power)
    for row, column in zip(rows, columns, strict=True):
        planted = (row, column) in {(2, 0), (4, 0), (0, 5), (0, 10)}
        nuisance = (row >= 8 and column <= 2) or (column >= 16 and row <= 2)
        assert planted or nuisance, (row, column)
    assert all(power[at] > 1 for at in [(2, 0), (4, 0), (0, 5), (0, 10), (8, 1), (16, 0), (1, 24)])


def test_images_are_a_function_of_the_seed():
    same, other = drawn(seed=3), drawn(seed=4)
    again = drawn(seed=3)
    assert torch.equal(same.train_set[0], again.train_set[0])
    assert same.fingerprint == again.fingerprint
    assert same.fingerprint != other.fingerprint
    assert not torch.equal(same.train_set[0][:40], same.test_set[0])
    assert (same.num_classes, same.sample_shape) == (4, (1, 32, 32))
    assert set(same.train_set[1].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("options", [{"band": (3, 8)}, {"band": (4, 12)}, {"nuisance": (8, 20)}])
def test_bands_that_could_not_be_told_from_the_nuisance_are_refused(options):
    with pytest.raises(ValueError, match="band must be even and 0 < band < nuisance <= size / 2"):
        PlantedBands(**options)


def test_limits_of_a_stride_are_where_the_window_loses_the_band():
    data = PlantedBands(size=(32, 48), band=(4, 10), nuisance=(8, 16))
    for axis, (whole, seen) in data.stride_limits(3.0).items():
        size, band = {"height": (32, 4), "width": (48, 10)}[axis]
        for stride, least, most in (
            (whole, 1, 1),
            (1.01 * whole, 0.9, 0.99),
            (0.99 * seen, 1e-6, 0.05),
            (seen, 0, 1e-6),
        ):
            assert least <= stride_mask(size, stride, 3.0)[band].item() <= most
    assert data.stride_limits(4.0)["height"] == (4.0, float("inf"))
