"""Audio-classification sets: names of the hub, parquet files and folders of sounds."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffstride import _validation
from diffstride.experiments.data.base import DataError
from diffstride.experiments.data.hub import Split, StoredData
from diffstride.experiments.data.sound import LogMel, SoundData
from diffstride.experiments.data.sources import first_line

_DECODING = 3  # raise when decoding changes, so that older caches are not used
_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "NIST")
# First bytes of these formats. For others libsndfile guesses, with the help of another file in the working directory.
_BEGINNINGS = (
    b"RIFF",
    b"RIFX",
    b"RF64",
    b"riff",
    b"fLaC",
    b"OggS",
    b"ID3",
    b"FORM",
    b".snd",
    b"dns.",
    b"caff",
    b"NIST",
)
_UNKNOWN = f"its format is none of {', '.join(_FORMATS)}"
# Samples that do not depend on earlier ones. After a seek in other formats (MP3, Vorbis), the first samples differ.
_INDEPENDENT = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW", "ALAC_")
_TOO_SHORT = "it ends before the length that its header declares"
# libsndfile shortens the declared length of a file that was cut off, and notes that in its log.
_SHORTENED = re.compile(r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_SPHERE_LENGTH = re.compile(rb"^sample_count -i (\d+)", re.MULTILINE)
_UNKNOWN_LENGTH = 0x7F000000  # bytes; programs that write to a pipe declare this length or more
_HIGHEST_RATE = 10_000_000  # Hz
_NO_LENGTH = 2**62  # frames; libsndfile gives more for files that were written to a pipe
_BLOCK = 1 << 20  # values decoded at once
_CONTEXT = 256  # periods of the lower rate that a resampled sample depends on, on either side; soxr needs about 100
_MEASURED = 1000  # sounds whose mean and deviation stand for all


class AudioData(SoundData, StoredData):
    """Sounds with one class each, from a name on the hub or from files: WAV, FLAC, OGG, MP3, AIFF, AU, CAF, NIST.

    Every sound becomes `seconds` long at one sample rate: channels are averaged, other rates resampled (soxr, "HQ"),
    longer sounds cut to their middle, shorter ones put between silence. Kept and streamed as images are (see
    `ImageData`), as 16-bit samples: louder than full scale is clipped, and a sound whose root mean square is above full
    scale is refused. A network sees log-compressed mel spectrograms
    `[1, frames, bands]`, computed on the device batch by batch, or waveforms `[1, T]`; both are normalised by the mean
    and deviation of (a thousand sounds of) the train split.

    Args:
        path: a name on the hub, or a local path, from which nothing is downloaded: a folder with `train.parquet` and
            `test.parquet` (or the hub's `train-00000-of-00001.parquet`, also under `data/`), a folder of sounds
            (`train/<class>/*.wav`), or one parquet file, whose only split is `train`.
        audio_column: the column of sounds; found by its type when not given.
        label_column: the column of classes; when not given, that called `label` or `class`, else found by its type.
        train_split: the split to train on, or a part of one, such as `train[:90%]`.
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
        if sample_rate is not None:
            _validation.whole("sample_rate", sample_rate, 1)
        _validation.above_zero("seconds", seconds)
        if crop_seconds is not None:
            _validation.above_zero("crop_seconds", crop_seconds)
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
    """A decoder from a sound file to 16-bit samples `[T]`. It reads the part of the file that is kept.

    Args:
        sample_rate: Hz; None: the file's.
        seconds: length to cut or to pad to.
    """

    sample_rate: int | None
    seconds: float
    noun: ClassVar[str] = "sound"
    option: ClassVar[str] = "audio_column"
    feature: ClassVar[str] = "Audio"
    suffixes: ClassVar[tuple[str, ...]] = (
        ".wav", ".wave", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au",
        ".snd", ".caf", ".sph", ".nist",
    )  # fmt: skip
    largest: ClassVar[int | None] = None

    @property
    def key(self) -> str:
        """Text that differs where decoding differs."""
        return f"{_DECODING} {self.sample_rate} {self.seconds}"

    def __call__(self, content: bytes | BinaryIO) -> npt.NDArray[np.int16]:
        """Return the samples."""
        import soxr

        with _opened(content) as file:
            own, rate = file.samplerate, self.sample_rate or file.samplerate
            length = round(self.seconds * rate)
            total = math.floor(file.frames * rate / own + 0.5)  # as many as soxr would make of the whole file
            first = max(0, (total - length) // 2)
            if rate == own:
                wave = _mono(file, first, min(first + length, file.frames))
            else:
                # The part begins where a sample of the old rate and one of the new rate fall together.
                context, together = math.ceil(_CONTEXT * max(1.0, own / rate)), own // math.gcd(own, rate)
                start = max(0, first * own // rate - context) // together * together
                wave = _mono(file, start, min(-(-(first + length) * own // rate) + context, file.frames))
                wave = soxr.resample(wave, own, rate)[first - start * rate // own :]
        wave = wave[:length]
        before = (length - len(wave)) // 2  # a shorter sound lies in the middle of silence
        wave = np.pad(wave, (before, length - len(wave) - before))
        return np.rint(wave * 32768).clip(-32768, 32767).astype(np.int16)

    def misfit(self, shape: Sequence[int], first: Sequence[int]) -> str:
        """Raise an error: all sounds are of one length."""
        raise AssertionError(f"{shape} and {first}")


@contextmanager
def _opened(content: bytes | BinaryIO) -> Iterator[Any]:
    """Open a sound whose format, length and rate can be used; what goes wrong with it is a `DataError`."""
    import soundfile  # needs a library of the system, which images do not

    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    beginning = stream.read(1024)
    stream.seek(0)
    try:
        if not beginning.startswith(_BEGINNINGS) and not (
            beginning[:1] == b"\xff" and beginning[1:2] >= b"\xe0"
        ):  # MP3
            raise DataError(_UNKNOWN)
        with soundfile.SoundFile(stream) as file:
            if file.format not in _FORMATS:
                raise DataError(_UNKNOWN)
            if not 0 < file.frames < _NO_LENGTH:
                raise DataError(
                    "it has no samples" if file.frames < 1 else "its header declares no length: save it anew"
                )
            if not 1 <= file.samplerate <= _HIGHEST_RATE:
                raise DataError(f"its sample rate is {file.samplerate} Hz, not between 1 and {_HIGHEST_RATE}")
            if _is_cut_off(file, beginning):
                raise DataError(_TOO_SHORT)
            yield file
    except soundfile.SoundFileError as error:
        raise DataError(first_line(error).rsplit(": ", 1)[-1]) from error


def _is_cut_off(file: Any, beginning: bytes) -> bool:
    """Return whether the header declares more samples than there are. A length that stands for none does not count."""
    if file.format == "NIST":
        return any(int(frames) > file.frames for frames in _SPHERE_LENGTH.findall(beginning))
    return any(int(there) < int(declared) < _UNKNOWN_LENGTH for declared, there in _SHORTENED.findall(file.extra_info))


def _mono(file: Any, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Return the mean of the channels of the frames from `start` to `stop`."""
    block = max(1, _BLOCK // file.channels)
    if file.seekable() and file.subtype.startswith(_INDEPENDENT):
        try:
            file.seek(start)
        except RuntimeError as error:
            raise DataError(_TOO_SHORT) from error
    else:
        file.seekable = lambda: False  # otherwise soundfile ends every read with a seek
        for skipped in range(0, start, block):
            _frames(file, min(block, start - skipped))
    wave = np.empty(stop - start, np.float32)
    for place in range(0, len(wave), block):
        part = wave[place : place + block]
        channels = _frames(file, len(part))
        if not np.isfinite(channels).all():
            raise DataError("it has samples that are not finite")
        part[:] = channels.mean(1, dtype=np.float64)
    if np.square(wave, dtype=np.float64).sum() > len(wave):
        raise DataError("its root mean square is above full scale, which is 1: scale its samples to -1 to 1")
    return wave


def _frames(file: Any, count: int) -> npt.NDArray[np.float32]:
    """Return the next frames `[count, channels]`."""
    found: npt.NDArray[np.float32] = file.read(count, dtype="float32", always_2d=True)
    if len(found) < count:
        raise DataError(_TOO_SHORT)
    return found


def _spread(length: int) -> Tensor:
    """Places all over a set, a thousand at most."""
    return torch.linspace(0, length - 1, min(length, _MEASURED)).long()


def _sample_rate(content: BinaryIO) -> int:
    with _opened(content) as file:
        return int(file.samplerate)
