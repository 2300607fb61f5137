"""Audio-classification sets: names of the hub, parquet files and folders of sounds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffstride import _check
from diffstride.data.base import DataError, above_zero
from diffstride.data.sound import LogMel, SoundData, a_log_mel
from diffstride.data.stored import Split, StoredData, first_line

_DECODING = 1  # raise when decoding changes, so that older caches are not used
_LOUDEST = 1e6  # of a float file, where 1 is full scale: beyond, sums overflow
_MEASURED = 1000  # sounds whose mean and deviation stand for all


class AudioData(SoundData, StoredData):
    """Sounds with one class each, from a name on the hub or from files: WAV, FLAC, OGG and what else libsndfile reads.

    Every sound becomes `seconds` long at one sample rate: channels are averaged, other rates resampled (soxr, "HQ"),
    longer sounds cut to their middle, shorter ones put between silence. Kept and streamed as images are (see
    `ImageData`), as 16-bit samples: louder than full scale is clipped. A network sees log-compressed mel spectrograms
    `[1, frames, bands]`, computed on the device batch by batch, or waveforms `[1, T]`; both are normalised by the mean
    and deviation of (a thousand sounds of) the train split.

    Args:
        path: a name on the hub, or a local path, from which nothing is downloaded: a folder with `train.parquet` and
            `test.parquet` (or the hub's `train-00000-of-00001.parquet`, also under `data/`), a folder of sounds
            (`train/<class>/*.wav`), or one parquet file, whose only split is `train`.
        audio_column: the column of sounds; found by its type when not given.
        label_column: the column of classes; found by its type when not given.
        train_split: the split to train on.
        test_split: the split to evaluate on; where the set has no `test`, its `validation` split serves.
        batch_size: sounds per batch and rank.
        sample_rate: Hz; that of the first sound when not given.
        seconds: length of a sound.
        crop_seconds: training takes a random part of this length; evaluation all parts of this length that fit side by
            side, whose logits are averaged. The whole sound when not given.
        features: settings of the mel spectrogram; null for waveforms.
        train_samples: train on a random subset of this many sounds, with classes as equal in number as they can be.
            It depends on the seed alone, and a smaller subset is a part of a larger one. All of them when not given.
        test_samples: likewise for the test split.
        cache_gb: decode once and keep, if both splits take no more than this many gigabytes decoded; else stream.
        num_workers: processes that decode streamed sounds; cached sets need none.
        seed: of the subset, the order and the random parts.
        subset: the hub's name for one of several configurations of a set; rarely needed.
    """

    def __init__(
        self,
        path: str,
        audio_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
        batch_size: int = 128,
        sample_rate: int | None = None,
        seconds: float = 1.0,
        crop_seconds: float | None = None,
        features: LogMel | None = LogMel(),  # noqa: B008 - it is immutable, and --help shows it
        train_samples: int | None = None,
        test_samples: int | None = None,
        cache_gb: float = 4.0,
        num_workers: int = 0,
        seed: int = 0,
        subset: str | None = None,
    ) -> None:
        super().__init__(
            path, audio_column, label_column, train_split, test_split, batch_size, train_samples, test_samples,
            cache_gb, num_workers, seed, subset,
        )  # fmt: skip
        _check.an_instance("audio_column", audio_column, (str, type(None)), "a text or None")
        if sample_rate is not None:
            above_zero("sample_rate", _check.whole("sample_rate", sample_rate))
        above_zero("seconds", seconds)
        if crop_seconds is not None:
            above_zero("crop_seconds", crop_seconds)
        a_log_mel(features)
        self.sample_rate, self.seconds, self.crop_seconds, self.features = sample_rate, seconds, crop_seconds, features

    @property
    def decoder(self) -> SoundDecoder:  # type: ignore[override]
        """At the sample rate, once it is known."""
        return SoundDecoder(self.sample_rate, self.seconds)

    def settle(self, train: Split, test: Split) -> None:
        """The first sound's rate is that of all, if no other is asked for."""
        if self.sample_rate is None:
            self.sample_rate = train.first(_sample_rate)
            train.decoder = test.decoder = self.decoder
        self.settle_lengths()

    def statistics(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Of what a network sees."""
        return self.inputs.statistics(sample[_spread(len(sample))])

    def streamed_statistics(self, train: Split) -> tuple[Tensor, Tensor]:
        """Of some sounds all over the split."""
        places = _spread(len(train)).tolist()
        return self.statistics(torch.from_numpy(np.stack([wave for i in places for wave in train.decode([i])])))


@dataclass(frozen=True)
class SoundDecoder:
    """From a sound file to 16-bit samples `[T]`.

    Args:
        sample_rate: Hz; None: the file's.
        seconds: length to cut or to pad to.
    """

    sample_rate: int | None
    seconds: float
    noun: ClassVar[str] = "sound"
    option: ClassVar[str] = "audio_column"
    feature: ClassVar[str] = "Audio"

    @property
    def key(self) -> str:
        """Of the way of decoding."""
        return f"{_DECODING} {self.sample_rate} {self.seconds}"

    def __call__(self, content: bytes) -> npt.NDArray[np.int16]:
        """The samples."""
        import soundfile  # both need libraries of the system, which images do not

        try:
            return self._samples(*soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True))
        except soundfile.SoundFileError as error:
            raise DataError(_cause(error)) from error
        except MemoryError as error:  # a damaged header that promises more than there is
            raise DataError("it claims to be too long for the memory") from error

    def _samples(self, channels: npt.NDArray[np.float32], rate: int) -> npt.NDArray[np.int16]:
        import soxr

        if not len(channels):
            raise DataError("it has no samples")
        if not np.isfinite(channels).all():
            raise DataError("it has samples that are not finite")
        wave = channels.clip(-_LOUDEST, _LOUDEST).mean(1)
        if self.sample_rate not in (None, rate):
            wave = soxr.resample(wave, rate, self.sample_rate)
        wave = _to_length(wave, round(self.seconds * (self.sample_rate or rate)))
        return np.rint(wave * 32768).clip(-32768, 32767).astype(np.int16)

    def misfit(self, shape: Sequence[int], first: Sequence[int]) -> str:
        """Never: all are of one length."""
        raise AssertionError(f"{shape} and {first}")


def _spread(length: int) -> Tensor:
    """Places all over a set, a thousand at most."""
    return torch.linspace(0, length - 1, min(length, _MEASURED)).long()


def _sample_rate(content: bytes) -> int:
    import soundfile

    try:
        return int(soundfile.info(io.BytesIO(content)).samplerate)
    except soundfile.SoundFileError as error:
        raise DataError(_cause(error)) from error


def _cause(error: Exception) -> str:
    return first_line(error).rsplit(": ", 1)[-1]


def _to_length(wave: npt.NDArray[np.float32], length: int) -> npt.NDArray[np.float32]:
    """The middle of a longer wave; a shorter one in the middle of silence."""
    more = length - len(wave)
    if more < 0:
        return wave[-more // 2 :][:length]
    return np.pad(wave, (more // 2, more - more // 2))
