"""Features of waveforms: against librosa, a naive formula in float64, and sounds that are known."""

import math

import librosa
import numpy as np
import pytest
import torch

from diffstride.experiments.data import LogMel
from diffstride.experiments.data.sound import Inputs, SoundData

# sample rate, samples, samples of the window, of the hop and of the transform, further settings
CASES = [
    (8000, 1600, 200, 80, 256, {}),
    (8000, 1234, 200, 81, 256, {"bands": 30, "lowest": 60.0}),
    (11025, 2210, 276, 110, 512, {"floor": 1e-2}),
    (16000, 3199, 400, 160, 512, {"bands": 80}),
    (16000, 2020, 401, 101, 512, {"bands": 20, "lowest": 125.0, "highest": 7000.0}),
    (16000, 2100, 512, 512, 512, {"bands": 40}),
    (22050, 3000, 551, 220, 1024, {"bands": 40, "highest": 8000.0}),
    (44100, 4409, 1102, 441, 2048, {"bands": 128}),
]


def settings(rate, window, hop, more):
    return LogMel(window=window / rate, hop=hop / rate, **more)


def waves(samples, rate, count=2):
    """Noise that swells, and a tone, so that frames and bands differ."""
    time = np.arange(samples) / rate
    noise = np.random.default_rng(samples).normal(size=(count, samples)) * np.linspace(0.02, 0.3, samples)
    return (noise + 0.3 * np.sin(2 * np.pi * 0.11 * rate * time)).astype(np.float32)


def filters(rate, n_fft, more):
    return librosa.filters.mel(
        sr=rate, n_fft=n_fft, n_mels=more.get("bands", 64), fmin=more.get("lowest", 0.0),
        fmax=more.get("highest", rate / 2), dtype=np.float64,
    )  # fmt: skip


def naive(wave, rate, window, hop, n_fft, more):
    """`log(floor + M |STFT|^2)` frame by frame, `[frames, bands]`: samples beyond the ends are zero."""
    wave = wave.astype(np.float64)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = []
    for i in range(len(wave) // hop):
        first = i * hop - (n_fft - hop) // 2 + (n_fft - window) // 2
        part = np.array([wave[first + k] if 0 <= first + k < len(wave) else 0.0 for k in range(window)])
        power = np.abs(np.fft.fft(part * hann, n_fft)[: n_fft // 2 + 1]) ** 2
        frames.append(np.log(more.get("floor", 1e-5) + filters(rate, n_fft, more) @ power))
    return np.stack(frames)


@pytest.mark.parametrize(("rate", "samples", "window", "hop", "n_fft", "more"), CASES)
def test_spectrograms_are_those_of_the_naive_formula(rate, samples, window, hop, n_fft, more):
    given = waves(samples, rate)
    found = settings(rate, window, hop, more)(torch.from_numpy(given), rate)
    expected = np.stack([naive(wave, rate, window, hop, n_fft, more) for wave in given])[:, None]
    assert found.shape == (2, 1, samples // hop, more.get("bands", 64))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("band", [4, 17, 36])
@pytest.mark.parametrize(("rate", "first", "last"), [(16000, 20, 29), (22050, 3, 9)])
def test_a_tone_is_in_the_frames_and_the_band_where_it_sounds(rate, first, last, band):
    bands, hop, window = 40, round(0.01 * rate), round(0.025 * rate)
    pitch = librosa.mel_frequencies(n_mels=bands + 2, fmin=0, fmax=rate / 2)[band + 1]  # its middle
    time = torch.arange(40 * hop)
    tone = torch.sin(2 * math.pi * pitch * time / rate) * ((time >= first * hop) & (time < (last + 1) * hop))
    spectrogram = LogMel(bands=bands, floor=1e-6)(tone[None], rate)[0, 0]
    assert spectrogram.shape == (40, bands)
    assert (spectrogram[first + 1 : last].argmax(1) == band).all()
    loud = spectrogram[:, band].exp()
    assert (loud[first + 1 : last] > 0.9 * loud.max()).all()
    silent = [i for i in range(40) if (i + 0.5) * hop + window / 2 + 1 < first * hop]
    silent += [i for i in range(40) if (i + 0.5) * hop - window / 2 - 1 > (last + 1) * hop]
    assert len(silent) > 25
    torch.testing.assert_close(spectrogram[silent], torch.full((len(silent), bands), math.log(1e-6)))
    assert loud[[first - 2, last + 2]].max() < 0.01 * loud.max()


@pytest.mark.parametrize(
    "options",
    [{"floor": 0.0}, {"hop": 0.03}, {"hop": 5e-5}, {"bands": 200}, {"highest": 4001.0}, {"lowest": -1.0},
     {"lowest": 900.0, "highest": 900.0}],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(options):
    with pytest.raises(ValueError, match=rf"^features\..*{next(iter(options))}"):
        LogMel(**options)(torch.zeros(1, 800), 8000)


def test_training_sees_contiguous_parts_that_begin_anywhere():
    inputs = Inputs(sample_rate=8000, samples=12, crop=8, features=None)
    counted = torch.arange(2000)[:, None] * 100.0 + torch.arange(12)
    parts = inputs.random(counted)[:, 0]
    starts = parts[:, 0] - 100 * torch.arange(2000)
    assert torch.equal(parts, parts[:, :1] + torch.arange(8))  # contiguous, and of its own sound
    counts = torch.bincount(starts.long(), minlength=5).tolist()
    assert len(counts) == 5
    assert all(320 < count < 480 for count in counts), counts  # 400 of each, within 4.5 deviations


def test_random_parts_are_a_function_of_the_seed_of_the_cpu():
    inputs = Inputs(sample_rate=8000, samples=1000, crop=400, features=LogMel(bands=20))
    given = torch.from_numpy(waves(1000, 8000, count=6))

    torch.manual_seed(3)
    starts = [int(s) for s in torch.randint(601, (6, 1))]
    parts = torch.stack([wave[s : s + 400] for wave, s in zip(given, starts, strict=True)])
    torch.manual_seed(3)
    torch.testing.assert_close(inputs.random(given), LogMel(bands=20)(parts, 8000))


@pytest.mark.parametrize(
    ("samples", "crop", "parts"),
    [
        (12, 4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (11, 3, [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        (10, 6, [[2, 3, 4, 5, 6, 7]]),
        (7, 4, [[1, 2, 3, 4]]),
        (5, 5, [[0, 1, 2, 3, 4]]),
    ],
)
def test_evaluation_sees_parts_side_by_side_in_the_middle(samples, crop, parts):
    sounds = torch.stack([torch.arange(samples), 100 + torch.arange(samples)]).float()
    found = Inputs(8000, samples, crop, None).views(sounds)
    assert found.tolist() == [[part] for part in parts] + [[[100.0 + i for i in part]] for part in parts]


class Silence(SoundData):
    """Sounds without a set."""

    def __init__(self, sample_rate, seconds, crop_seconds, features=None):
        super().__init__()
        self.sample_rate, self.seconds, self.crop_seconds, self.features = sample_rate, seconds, crop_seconds, features


@pytest.mark.parametrize("features", [None, LogMel(bands=20, hop=0.01)])
def test_axes_and_shape_are_those_of_what_comes_out(features):
    data = Silence(22050, 0.3, 0.14, features)
    data.check_lengths()
    assert data.sample_shape == data.inputs.views(torch.zeros(1, data.inputs.samples)).shape[1:]
    spacing = 1 if features is None else 220  # 220.5 samples are 220
    axes = ("time", pytest.approx(spacing / 22050), "Hz"), ("frequency", 1.0, "cycles per mel band")
    assert data.axes == axes[: 1 if features is None else 2]


@pytest.mark.parametrize("features", [None, LogMel(bands=20)])
def test_statistics_are_those_of_all_parts(features):
    sounds = torch.from_numpy(waves(1700, 8000, count=5))
    mean, std = Inputs(8000, 1700, 800, features).statistics(sounds)
    parts = sounds[:, 50:1650].reshape(10, 800).numpy()
    if features is not None:
        parts = np.stack([naive(part, 8000, 200, 80, 256, {"bands": 20}) for part in parts])
    np.testing.assert_allclose([mean.item(), std.item()], [parts.mean(), parts.std()], rtol=1e-4, atol=1e-6)
    assert Inputs(8000, 1700, 800, features).statistics(torch.zeros(2, 1700))[1] > 0


@pytest.mark.parametrize(
    ("seconds", "crop", "rate", "parts"), [(3, 1.5, 11_025, 2), (1, 1 / 3, 8000, 3), (1, 0.4, 8000, 2)]
)
def test_as_many_parts_fit_as_the_seconds_say(seconds, crop, rate, parts):
    data = Silence(rate, seconds, crop)
    assert len(data.inputs.views(torch.zeros(1, data.inputs.samples))) == parts
