"""Inputs of networks from waveforms of one length: parts of them, or their log-compressed mel spectrograms."""

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from diffstride import _validation
from diffstride.experiments.data.base import Axis, Batch, ClassificationData, DataError, as_float
from diffstride.experiments.data.hashing import digest


@dataclass(frozen=True)
class LogMel:
    """Settings of the log-compressed mel spectrogram `log(floor + M |STFT|^2)`; calling it computes it.

    Frame `i` is a Hann window of `window` seconds around the middle of the `i`-th hop, with zeros beyond the ends. A
    sound of `T` samples has `T // hop` frames. `M` are librosa's mel filters (Slaney's scale and norm).

    Args:
        bands: number of mel bands.
        window: seconds.
        hop: seconds from frame to frame, rounded to a whole number of samples.
        lowest: frequency in Hz at which the lowest band begins.
        highest: frequency in Hz at which the highest band ends; half of the sample rate when not given.
        floor: constant added to the power before the logarithm, in units of the STFT of a signal from -1 to 1.
    """

    bands: int = 64
    window: float = 0.025
    hop: float = 0.01
    lowest: float = 0.0
    highest: float | None = None
    floor: float = 1e-5

    def __post_init__(self) -> None:
        _validation.integer("features.bands", self.bands, 1)
        _validation.above_zero("features.floor", self.floor)

    def __call__(self, waves: Tensor, sample_rate: int) -> Tensor:
        """Return spectrograms `[B, 1, frames, bands]` of float waves `[B, T]`, on their device."""
        window, hop, n_fft = self.samples(sample_rate)
        before = (n_fft - hop) // 2
        padded = F.pad(waves, (before, n_fft - hop - before))
        hann = torch.hann_window(window, device=waves.device)
        spectra = torch.stft(padded, n_fft, hop, window, hann, center=False, return_complex=True)
        filters = mel_filters(self, sample_rate, n_fft).to(waves.device, non_blocking=True)
        mel = filters @ (spectra.real.square() + spectra.imag.square())
        return (self.floor + mel).log().mT[:, None]

    def samples(self, sample_rate: int) -> tuple[int, int, int]:
        """Return the samples of the window, of the hop and of the Fourier transform, the next power of two."""
        window, hop = round(self.window * sample_rate), round(self.hop * sample_rate)
        if not 1 <= hop <= window:
            raise DataError(f"features.hop must be at least one sample and at most the window, {window}, not {hop}")
        return window, hop, 1 << (window - 1).bit_length()


@lru_cache(maxsize=16)
def mel_filters(settings: LogMel, sample_rate: int, n_fft: int) -> Tensor:
    """Return the filters `[bands, n_fft // 2 + 1]`, none of which may be empty."""
    import librosa  # takes seconds

    bands, lowest, half = settings.bands, settings.lowest, sample_rate / 2
    highest = half if settings.highest is None else settings.highest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty bands, an error below
        filters = librosa.filters.mel(sr=sample_rate, n_fft=n_fft, n_mels=bands, fmin=lowest, fmax=highest)
    if not 0 <= lowest < highest <= half or not filters.max(axis=1).all():
        raise DataError(
            f"features.bands {bands} from lowest {lowest:g} to highest {highest:g} Hz do not fit: each must be within "
            f"0 to {half:g} Hz, and wider than the {sample_rate / n_fft:g} Hz between two frequencies"
        )
    return torch.from_numpy(filters)


@dataclass(frozen=True)
class Inputs:
    """A network's inputs from waveforms of one length."""

    sample_rate: int  # Hz
    samples: int  # of a waveform
    crop: int  # samples that the network sees
    features: LogMel | None  # None for waveforms

    def random(self, waves: Tensor) -> Tensor:
        """Return a random part of each of `[B, samples]`, for training. Random numbers are the CPU's."""
        if self.crop < self.samples:
            starts = torch.randint(self.samples - self.crop + 1, (len(waves), 1))
            places = starts.to(waves.device, non_blocking=True) + torch.arange(self.crop, device=waves.device)
            waves = waves.gather(1, places)
        return self._features(waves)

    def views(self, waves: Tensor) -> Tensor:
        """Return all parts that fit without overlap, `[B * parts, ...]`, for evaluation."""
        parts = self.samples // self.crop
        start = (self.samples - parts * self.crop) // 2
        return self._features(waves[:, start : start + parts * self.crop].reshape(-1, self.crop))

    def statistics(self, waves: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of the inputs' one channel, from waves (16-bit or float)."""
        count, total, squares = 0, 0.0, 0.0
        for block in torch.split(waves, 32):  # spectrograms of all at once would take gigabytes
            inputs = self.views(as_float(block)).double()
            count += inputs.numel()
            total += float(inputs.sum())
            squares += float(inputs.square().sum())
        mean = total / count
        deviation = math.sqrt(max(0.0, squares / count - mean**2))
        return torch.tensor([mean]), torch.tensor([max(deviation, 1e-6)])

    def _features(self, waves: Tensor) -> Tensor:
        return waves[:, None] if self.features is None else self.features(waves, self.sample_rate)


class SoundData(ClassificationData):
    """Base of sets of sounds: a raw sample is a waveform `[T]`, from which `inputs` makes the network's inputs."""

    KEPT = (*ClassificationData.KEPT, "sample_rate")

    sample_rate: int | None  # Hz
    seconds: float  # of a raw sample
    crop_seconds: float | None  # that a network sees, or None for all
    features: LogMel | None  # None for waveforms

    def setup(self, stage: str | None = None) -> None:
        if not hasattr(self, "train_set"):
            super().setup(stage)
            self.fingerprint = digest(self.fingerprint, self.inputs)

    def check_lengths(self) -> None:
        """Check lengths and features at the sample rate, and set `sample_shape` and `axes`."""
        rate, crop, window, hop = self.inputs.sample_rate, self.inputs.crop, 1, 1
        if self.features is not None:
            window, hop, n_fft = self.features.samples(rate)
            mel_filters(self.features, rate, n_fft)  # raises
        if not window <= crop <= self.inputs.samples:
            name = "seconds" if self.crop_seconds is None else "crop_seconds"
            least = f"one sample and the window of features, {window / rate:g} s"
            raise DataError(f"{name} must be at least {least}, and at most seconds, not {getattr(self, name):g}")
        self.sample_shape, self.axes = (1, crop // hop), (Axis("time", hop / rate, "Hz"),)
        if self.features is not None:
            self.sample_shape += (self.features.bands,)
            self.axes += (Axis("frequency", 1.0, "cycles per mel band"),)

    @property
    def inputs(self) -> Inputs:
        """The network's inputs, once the sample rate is known."""
        assert self.sample_rate is not None
        samples = round(self.seconds * self.sample_rate)
        # Rounded down, so that as many fit side by side as the seconds say.
        crop = samples if self.crop_seconds is None else math.floor(self.crop_seconds * self.sample_rate + 1e-6)
        return Inputs(self.sample_rate, samples, crop, self.features)

    def augment(self, inputs: Tensor, labels: Tensor) -> Batch:
        return self.inputs.random(inputs), labels

    def prepare_evaluation(self, inputs: Tensor) -> Tensor:
        return self.inputs.views(inputs)
