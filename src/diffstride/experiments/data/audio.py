"""Audio-classification sets: names of the hub, parquet files and folders of sounds."""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffstride import _validation
from diffstride._text import one_line
from diffstride.experiments.data.base import DataError
from diffstride.experiments.data.hub import HubData, Split
from diffstride.experiments.data.sound import LogMel, SoundData

_DECODING = 3  # raise when decoding changes, so that older caches are not used
_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "NIST")
# Samples that do not depend on earlier ones. After a seek in other formats (MP3, Vorbis), the first samples differ.
_INDEPENDENT = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW", "ALAC_")
# libsndfile shortens the declared length of a file that was cut off, and notes that in its log.
_SHORTENED = re.compile(r"^ *(?:data|SSND|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_LENGTH = 0x7F000000  # bytes; programs that write to a pipe declare this length or more
_BLOCK = 1 << 18  # samples decoded at once
_CONTEXT = 256  # periods of the lower rate that a resampled sample depends on, on either side; soxr needs about 100
_MEASURED = 1000  # sounds whose mean and deviation stand for all


class AudioData(SoundData, HubData):
    """Sounds with one class each, from a name on the hub or from files: WAV, FLAC, OGG, MP3, AIFF, AU, CAF, NIST.

    Every sound becomes `seconds` long at one sample rate: channels are averaged, other rates resampled (soxr, "HQ"),
    longer sounds cut to their middle, shorter ones padded with silence on both sides. A set is cached and streamed like
    images (see `ImageData`), as 16-bit samples. Samples above full scale are clipped; a sound whose root mean square is
    above it is refused.

    A network sees log-compressed mel spectrograms `[1, frames, bands]`, computed on the device batch by batch, or
    waveforms `[1, T]`. Both are normalised by the mean and deviation of (a thousand sounds of) the train split.

    Args:
        path: a name on the hub, a folder with `train.parquet` and `test.parquet`, a folder with `train/<class>/*.wav`
            and `test/<class>/*.wav`, or a parquet file. More in `HubData`.
        audio_column: the column of sounds. The default is the only one of its type.
        sample_rate: Hz. The default is the rate of the first sound.
        seconds: length of a sound.
        crop_seconds: training takes a random part of this length; evaluation all parts of this length that fit side by
            side, whose logits are averaged. The default is the whole sound.
        features: settings of the mel spectrogram, or null for waveforms.
        options: further arguments of `HubData`.
    """

    def __init__(
        self,
        path: str,
        audio_column: str | None = None,
        sample_rate: int | None = None,
        seconds: float = 1.0,
        crop_seconds: float | None = None,
        features: LogMel | None = LogMel(),  # noqa: B008 - it is immutable, and --help shows it
        **options: Any,
    ) -> None:
        super().__init__(path, audio_column, **options)
        if sample_rate is not None:
            _validation.integer("sample_rate", sample_rate, 1)
        self.sample_rate, self.seconds, self.crop_seconds, self.features = sample_rate, seconds, crop_seconds, features

    @property
    def decoder(self) -> "SoundDecoder":  # type: ignore[override]
        """The decoder at the sample rate, once it is known."""
        return SoundDecoder(self.sample_rate, self.seconds)

    def check_splits(self, train: Split, test: Split) -> None:
        if self.sample_rate is None:  # use the first sound's for all
            self.sample_rate = next(rate for _, rate in train.read([0], _sample_rate))
            train.decoder = test.decoder = self.decoder
        self.check_lengths()

    def statistics(self, train: Split, decoded: Tensor | None) -> tuple[Tensor, Tensor]:
        length = len(train if decoded is None else decoded)
        places = torch.linspace(0, length - 1, min(length, _MEASURED)).long()
        one_by_one = (train.__getitems__([i])[0] for i in places.tolist())
        return self.inputs.statistics(torch.cat(list(one_by_one)) if decoded is None else decoded[places])


@dataclass(frozen=True)
class SoundDecoder:
    """A decoder from a sound file to 16-bit samples `[T]`. It reads the part of the file that is kept."""

    sample_rate: int | None  # Hz; None: the file's
    seconds: float  # to cut or to pad to
    media: ClassVar[str] = "audio"
    suffixes: ClassVar[tuple[str, ...]] = (
        ".wav", ".wave", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au",
        ".snd", ".caf", ".sph", ".nist",
    )  # fmt: skip

    @property
    def key(self) -> str:
        return f"{_DECODING} {self.sample_rate} {self.seconds}"

    def __call__(self, content: bytes | BinaryIO) -> npt.NDArray[np.int16]:
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
        before = (length - len(wave)) // 2  # a shorter sound is placed in the middle of silence
        wave = np.pad(wave, (before, length - len(wave) - before))
        return np.rint(wave * 32768).clip(-32768, 32767).astype(np.int16)


@contextmanager
def _opened(content: bytes | BinaryIO) -> Iterator[Any]:
    """Open a sound that can be decoded completely. Any other raises a `DataError`."""
    import soundfile  # needs a library of the system, which images do not

    try:
        with soundfile.SoundFile(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
            if file.format not in _FORMATS or file.frames < 1:
                raise DataError(f"it has no samples, or its format is none of {', '.join(_FORMATS)}")
            yield file
    except soundfile.SoundFileError as error:
        raise DataError(one_line(error).rsplit(": ", 1)[-1]) from error


def _mono(file: Any, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Return the mean of the channels of the frames from `start` to `stop`."""
    if file.subtype.startswith(_INDEPENDENT):
        file.seek(start)
    else:
        file.seekable = lambda: False  # otherwise soundfile ends every read with a seek
        for skipped in range(0, start, _BLOCK):
            file.read(min(_BLOCK, start - skipped))
    channels = file.read(stop - start, dtype="float32", always_2d=True)
    lengths = _SHORTENED.findall(file.extra_info)
    if len(channels) < stop - start or any(int(n) < int(declared) < _UNKNOWN_LENGTH for declared, n in lengths):
        raise DataError("it ends before the length that its header declares")
    with np.errstate(invalid="ignore"):  # of infinite samples
        wave: npt.NDArray[np.float64] = channels.mean(1, dtype=np.float64)
    if not np.square(wave).sum() <= len(wave):
        raise DataError("its root mean square is above full scale, or not finite: scale its samples to -1 to 1")
    return wave.astype(np.float32)


def _sample_rate(content: BinaryIO) -> int:
    with _opened(content) as file:
        return int(file.samplerate)
