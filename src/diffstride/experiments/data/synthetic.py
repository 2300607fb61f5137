"""Synthetic sounds: tones of known pitch, timbres and chirps in noise. The frequencies that matter are known."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diffstride import _validation
from diffstride.experiments.data.base import Batch, DataError
from diffstride.experiments.data.hashing import seed_of
from diffstride.experiments.data.sound import LogMel, SoundData

# Amplitudes of the harmonics 1, 2, 3, ..
TIMBRES = {
    "pure": (1.0,),
    "hollow": (1.0, 0.0, 0.6, 0.0, 0.4),
    "bright": (1.0, 0.8, 0.6, 0.5, 0.4),
    "octave": (1.0, 1.0),
}


class SyntheticSounds(SoundData):
    """Sounds in white noise whose class depends on known frequencies.

    A tone of pitch `f` and timbre `a` is `sum_k a_k sin(2 pi k f t + phase_k)`, without harmonics above half of the
    sample rate. Phases are random, the level is drawn from 0.1 to 1. A tone fades in and out over an eighth of the time
    each (`sin^2`), because an abrupt end has all frequencies. The tasks:

    - `"pitch"`: one of `pitches`, or none (noise alone, the class `rest`); the timbre is drawn. To distinguish the
      highest pitch from a rest, a network needs its fundamental (a `pure` tone has nothing else) or its harmonics. A
      stride up to `sample_rate / (2 max(pitches))` keeps the fundamental inside a window; see `stride_limits`.
    - `"timbre"`: one of `pure`, `hollow` (odd harmonics), `bright` (five harmonics) and `octave` (two); the pitch is
      drawn. It needs frequencies up to three times the pitch.
    - `"chirp"`: a tone that rises from the lowest pitch to the highest within a quarter of the time, or noise alone.

    Args:
        task: kind of the classes.
        pitches: Hz, rising.
        sample_rate: Hz.
        seconds: length of a sound.
        noise: standard deviation of the noise.
        features: as in `AudioData`; null for waveforms.
        train_samples: number of training sounds.
        test_samples: number of test sounds.
        batch_size: sounds per batch.
        seed: seed of the sounds and of the order.
    """

    def __init__(
        self,
        task: Literal["pitch", "timbre", "chirp"] = "pitch",
        pitches: Sequence[float] = (220.0, 277.2, 349.2, 440.0),
        sample_rate: int = 8000,
        seconds: float = 0.25,
        noise: float = 0.1,
        features: LogMel | None = LogMel(),  # noqa: B008 - it is immutable, and --help shows it
        train_samples: int = 2048,
        test_samples: int = 512,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        if not pitches or sorted(set(pitches)) != list(pitches) or not 0 < pitches[0] <= pitches[-1] < sample_rate / 2:
            bounds = f"from above 0 to below half of the sample rate, {sample_rate / 2:g} Hz"
            raise DataError(f"pitches must be rising, {bounds}, not {tuple(pitches)}")
        _validation.integer("train_samples", train_samples, 1)
        _validation.integer("test_samples", test_samples, 1)
        self.task, self.pitches, self.noise = task, tuple(pitches), noise
        self.sample_rate, self.seconds, self.crop_seconds, self.features = sample_rate, seconds, None, features
        self.train_samples, self.test_samples = train_samples, test_samples

    def stride_limits(self, smoothness: float) -> tuple[float, float]:
        """Return the strides that put the highest pitch at a window's edge and at its end, for waveforms and `"pitch"`.

        On `N` samples it has `b = max(pitches) * seconds` cycles. The strides are `N / (2 b)` and, for a ramp of
        `smoothness` bins, `N / (2 (b - smoothness))`.
        """
        n, b = round(self.seconds * self.inputs.sample_rate), self.pitches[-1] * self.seconds
        return n / (2 * b), n / (2 * (b - smoothness)) if b > smoothness else math.inf

    def load(self) -> None:
        self.check_lengths()
        self.classes = {
            "pitch": ("rest", *(f"{pitch:g} Hz" for pitch in self.pitches)),
            "timbre": tuple(TIMBRES),
            "chirp": ("noise", "chirp"),
        }[self.task]
        self.num_classes = len(self.classes)
        self.train_set = self._draw("train", self.train_samples)
        self.test_set = self._draw("test", self.test_samples)
        self.mean, self.std = self.inputs.statistics(self.train_set[0][:1000])

    def _draw(self, split: str, count: int) -> Batch:
        # Tasks that are learned together have sounds of their own.
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.task, split))

        def choice(options: int) -> Tensor:
            return torch.randint(options, (count,), generator=generator)

        labels, pitch, timbre = choice(self.num_classes), choice(len(self.pitches)), choice(len(TIMBRES))
        level = 0.1 + 0.9 * torch.rand(count, generator=generator)
        if self.task == "timbre":
            timbre = labels
        elif self.task == "pitch":
            level, pitch = level * (labels > 0), (labels - 1).clamp_min(0)
        if self.task == "chirp":
            tones = self._chirps(count, generator) * (labels > 0)[:, None]
        else:
            tones = self._tones(torch.tensor(self.pitches)[pitch], timbre, generator)
        noise = self.noise * torch.randn(tones.shape, generator=generator)
        return level[:, None] * tones + noise, labels

    def _tones(self, pitch: Tensor, timbre: Tensor, generator: torch.Generator) -> Tensor:
        harmonics = max(map(len, TIMBRES.values()))
        amplitudes = torch.tensor([[*timbre, *[0.0] * (harmonics - len(timbre))] for timbre in TIMBRES.values()])
        time = torch.arange(self.inputs.samples) / self.inputs.sample_rate
        tones = torch.zeros(len(pitch), len(time))
        for k in range(1, harmonics + 1):
            amplitude = amplitudes[timbre, k - 1] * (k * pitch < self.inputs.sample_rate / 2)
            phase = 2 * math.pi * torch.rand(len(pitch), 1, generator=generator)
            tones += amplitude[:, None] * torch.sin(2 * math.pi * k * pitch[:, None] * time + phase)
        return tones * _fades(time / self.seconds)

    def _chirps(self, count: int, generator: torch.Generator) -> Tensor:
        """Return chirps `sin(2 pi (f_0 s + (f_1 - f_0) s^2 / (2 d)))`, `0 <= s <= d`, that begin at random times."""
        low, high, duration = self.pitches[0], self.pitches[-1], self.seconds / 4
        begin = (self.seconds - duration) * torch.rand(count, 1, generator=generator)
        since = torch.arange(self.inputs.samples) / self.inputs.sample_rate - begin
        phase = 2 * math.pi * (low * since + (high - low) * since.square() / (2 * duration))
        return torch.sin(phase) * _fades(since / duration)


def _fades(place: Tensor) -> Tensor:
    """Return the level at a place of a sound from 0 to 1: an eighth to rise, an eighth to fall, 0 outside."""
    edge = (8 * torch.minimum(place, 1 - place)).clamp(0, 1)
    return torch.sin(math.pi / 2 * edge).square()
