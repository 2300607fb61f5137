"""Synthetic sounds: what each class sounds like, read off the spectrum, and where the strides lose it."""

import math

import numpy as np
import pytest
import scipy.signal
import torch

from diffstride.experiments.data import SyntheticSounds
from diffstride.experiments.data.synthetic import TIMBRES
from diffstride.functional import stride_mask

HARMONICS = {"pure": {1}, "hollow": {1, 3, 5}, "bright": {1, 2, 3, 4, 5}, "octave": {1, 2}}
PITCHES = (96.0, 192.0, 384.0)  # whole bins
BIN = 16 / 3  # Hz, of the three quarters of 0.25 s between the fades


def drawn(task="pitch", **options):
    options = {"pitches": PITCHES, "noise": 0.0, "features": None, "train_samples": 200, "test_samples": 20} | options
    data = SyntheticSounds(task, **options)
    data.setup()
    return data


def amplitudes(sounds):
    """At the frequencies `0, BIN, 2 BIN, ..`, by sound."""
    steady = between_fades(sounds)
    return np.abs(np.fft.rfft(steady)) * 2 / steady.shape[1]


def between_fades(sounds):
    n = sounds.shape[1]
    return sounds[:, n // 8 : n - n // 8].double().numpy()


def test_a_timbre_has_its_harmonics_at_their_strengths_and_nothing_else():
    data = drawn("timbre")
    sounds, labels = data.train_set
    fundamentals, levels = [], []
    for spectrum, label in zip(amplitudes(sounds), labels.tolist(), strict=True):
        timbre = data.classes[label]
        fundamental = int(np.flatnonzero(spectrum > 0.02)[0])
        expected = np.zeros_like(spectrum)
        for k, strength in enumerate(TIMBRES[timbre], 1):
            assert (strength > 0) == (k in HARMONICS[timbre])
            expected[k * fundamental] = strength * spectrum[fundamental]
        np.testing.assert_allclose(spectrum, expected, atol=2e-3)
        fundamentals.append(BIN * fundamental)
        levels.append(spectrum[fundamental])
    assert {round(f, 6) for f in fundamentals} == set(PITCHES)
    assert all(0.099 < level < 1.001 for level in levels)
    assert min(levels) < 0.2
    assert max(levels) > 0.9


def test_a_pitch_has_its_tone_in_a_timbre_of_chance_and_a_rest_has_none():
    data = drawn("pitch")
    assert data.classes == ("rest", "96 Hz", "192 Hz", "384 Hz")
    sounds, labels = data.train_set
    heard = set()
    for spectrum, label in zip(amplitudes(sounds), labels.tolist(), strict=True):
        present = np.flatnonzero(spectrum > 0.02)
        if label == 0:
            assert spectrum.max() == 0
            continue
        assert BIN * present[0] == pytest.approx(PITCHES[label - 1])
        heard.add(frozenset((present // present[0]).tolist()))
        assert not (present % present[0]).any()
    assert heard == set(map(frozenset, HARMONICS.values()))


def test_a_rest_is_white_noise_of_the_deviation_asked_for():
    sounds, labels = drawn("pitch", noise=0.3, train_samples=600).train_set
    rests = sounds[labels == 0]
    assert rests.std().item() == pytest.approx(0.3, rel=0.02)
    power = (amplitudes(rests) ** 2).mean(0)[1:-1]
    assert ((power > 0.6 * power.mean()) & (power < 1.5 * power.mean())).all()


def test_phases_are_drawn():
    sounds, labels = drawn("pitch", train_samples=400).train_set
    places = [round(PITCHES[label - 1] / BIN) for label in labels.tolist()]
    fundamentals = np.fft.rfft(between_fades(sounds))[range(400), places]
    phases = fundamentals[labels.numpy() > 0]
    assert abs((phases / np.abs(phases)).mean()) < 0.15


def test_harmonics_from_half_of_the_rate_on_are_left_out():
    """At 8000 Hz the third harmonic of 1504 Hz would fold down to 3488 Hz; the second of 2000 Hz is at the limit."""
    sounds, labels = drawn("timbre", pitches=(1504.0, 2000.0)).train_set
    spectra = amplitudes(sounds)
    found = {round(BIN * bin_) for spectrum in spectra for bin_ in np.flatnonzero(spectrum > 2e-3)}
    assert found == {1504, 3008, 2000}
    bright = spectra[labels.numpy() == list(TIMBRES).index("bright")]
    low = bright[bright[:, 282] > 0.02]
    np.testing.assert_allclose(low[:, 564] / low[:, 282], 0.8, rtol=0.02)


def test_a_chirp_rises_from_the_lowest_to_the_highest_pitch_in_a_quarter_of_the_time():
    data = drawn("chirp", pitches=(200.0, 300.0, 1000.0), seconds=0.5, train_samples=60)
    sounds, labels = data.train_set
    assert data.classes == ("noise", "chirp")
    assert not sounds[labels == 0].any()
    begins = []
    for sound in sounds[labels == 1].double().numpy():
        (places,) = np.nonzero(sound)
        begin, end = places[0], places[-1] + 1
        assert 997 <= end - begin <= 1001  # 0.125 s; a sample may be zero by chance
        analytic = scipy.signal.hilbert(sound[begin:end])
        inner = slice(150, 850)
        frequency = np.diff(np.unwrap(np.angle(analytic))) * 8000 / (2 * np.pi)
        slope, low = np.polyfit(np.arange(len(frequency))[inner] / 8000, frequency[inner], 1)
        assert low == pytest.approx(200, abs=10)
        assert low + slope * 0.125 == pytest.approx(1000, abs=15)
        assert (np.diff(frequency[inner][::50]) > 0).all()
        level = np.abs(analytic[inner]).mean()
        assert 0.09 < level < 1.05
        begins.append(begin / 4000)
    assert 0 <= min(begins) < 0.15
    assert 0.6 < max(begins) <= 0.75


@pytest.mark.parametrize("task", ["pitch", "timbre"])
def test_tones_fade_in_and_out_so_that_no_click_is_heard(task):
    sounds, _ = drawn(task, pitches=(300.0,), train_samples=100).train_set
    level = sounds.abs().amax(0)
    assert level[[0, -1]].max() < 1e-3
    assert level[250:1750].max() > 10 * level[:40].max()
    spectra = np.abs(np.fft.rfft(sounds.double().numpy()))
    assert (spectra[:, 600:].max(1) < 1e-3 * spectra.max(1).clip(1e-9)).all()  # 2,400 Hz and up: harmonics end at 1,500


@pytest.mark.parametrize("task", ["pitch", "timbre", "chirp"])
def test_classes_are_equally_likely_and_sounds_a_function_of_the_seed(task):
    same, again, other = drawn(task, seed=3), drawn(task, seed=3), drawn(task, seed=4)
    assert torch.equal(same.train_set[0], again.train_set[0])
    assert torch.equal(same.train_set[1], again.train_set[1])
    assert torch.equal(same.test_set[0], again.test_set[0])
    assert same.fingerprint == again.fingerprint
    assert same.fingerprint != other.fingerprint
    assert not torch.equal(same.train_set[1], other.train_set[1])
    assert not torch.equal(same.train_set[0][:20], same.test_set[0])
    assert not torch.equal(same.train_set[1][:20], same.test_set[1])
    counts = torch.bincount(same.train_set[1], minlength=same.num_classes) * same.num_classes / 200
    assert len(counts) == same.num_classes == len(same.classes)
    assert ((counts > 0.6) & (counts < 1.4)).all()
    torch.manual_seed(9)
    assert torch.equal(drawn(task, seed=3).train_set[0], same.train_set[0])


@pytest.mark.parametrize("smoothness", [1.0, 4.0, 60.0])
@pytest.mark.parametrize(("pitches", "seconds"), [((100.0, 440.0), 0.25), ((300.0, 1000.0), 0.1)])
def test_limits_of_a_stride_are_where_the_window_loses_the_highest_pitch(smoothness, pitches, seconds):
    data = SyntheticSounds(pitches=pitches, seconds=seconds, features=None)
    samples, cycles = round(8000 * seconds), round(pitches[-1] * seconds)
    whole, seen = data.stride_limits(smoothness)
    assert (whole, seen) == pytest.approx((8000 / 2 / pitches[-1], samples / (2 * (cycles - smoothness))))
    for stride, least, most in (
        (0.9 * whole, 1, 1),
        (whole, 1 - 1e-4, 1),
        (whole + 0.2 * (seen - whole), 0.5, 0.999),
        (seen - 0.2 * (seen - whole), 0.001, 0.5),
        (seen * (1 + 1e-5), 0, 0),
        (1.1 * seen, 0, 0),
    ):
        mask = stride_mask(samples, stride, smoothness, window="outer")[cycles].item()
        assert least <= mask <= most, (stride, mask)
    assert data.stride_limits(cycles) == (whole, math.inf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pitches": ()}, r"pitches must be rising, .*not \(\)"),
        ({"pitches": (300.0, 200.0)}, r"pitches must be rising, .*not \(300.0, 200.0\)"),
        ({"pitches": (0.0, 300.0)}, r"pitches must be rising, from above 0"),
        ({"pitches": (300.0, 4000.0)}, r"pitches must be .* below half of the sample rate, 4000 Hz"),
        ({"seconds": 0.02}, r"seconds must be at least .* the window of features, 0.025 s.*not 0.02"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticSounds(**options).setup()
