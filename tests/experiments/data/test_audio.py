"""Audio sets: samples are those that soundfile reads, cut, padded, resampled and normalised, on one scale."""

import io
import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch

from tests.helpers.datasets import CLASSES, epoch
from tests.helpers.datasets import write as write_table

pytest.importorskip("datasets")

from diffstride.experiments.data import AudioData, DataError, LogMel
from diffstride.experiments.data.audio import SoundDecoder

RATE, SAMPLES = 8000, 400  # of the sounds here: 0.05 s
BANDS = LogMel(bands=16, window=0.016, hop=0.004)
NOISE = (0.1 * np.random.default_rng(0).standard_normal(4 * RATE)).astype(np.float32).clip(-0.9, 0.9)
TONES = np.sin(np.arange(4 * RATE) * np.array([[0.05], [0.13]])).sum(0).astype(np.float32) / 4
EXACT = [
    ("WAV", "PCM_U8", 2**-7), ("WAV", "PCM_16", 2**-14), ("WAV", "PCM_24", 2**-14), ("WAV", "FLOAT", 2**-14),
    ("WAV", "DOUBLE", 2**-14), ("WAV", "ULAW", 0.02), ("FLAC", "PCM_16", 2**-14), ("FLAC", "PCM_24", 2**-14),
    ("AIFF", "PCM_16", 2**-14), ("AU", "PCM_32", 2**-14), ("CAF", "ALAC_16", 2**-14), ("NIST", "PCM_16", 2**-14),
]  # fmt: skip
LOSSY = [("WAV", "IMA_ADPCM"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
pytestmark = pytest.mark.usefixtures("cache")


def sound(seed, samples=SAMPLES, channels=None):
    """16-bit noise."""
    shape = samples if channels is None else (samples, channels)
    return np.random.default_rng(seed).integers(-20_000, 20_000, shape, dtype=np.int16)


def tone(pitch, rate, seconds, level=0.5):
    return (level * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples, rate=RATE, kind="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def decoded(content, rate=RATE, seconds=SAMPLES / RATE):
    return SoundDecoder(rate, seconds)(content)


def write(path, contents, labels):
    write_table(path, contents, labels, file="audio", kind="Audio")


@pytest.fixture
def folder(tmp_path):
    """24 + 9 sounds in the hub's layout; `train` and `test` are their samples."""
    sounds = {"train": [sound(i) for i in range(24)], "test": [sound(100 + i) for i in range(9)]}
    path = tmp_path / "set"
    for split, waves in sounds.items():
        write(path / f"{split}.parquet", [encoded(wave) for wave in waves], [i % 3 for i in range(len(waves))])
    return SimpleNamespace(path=path, **sounds)


def unloaded(path, **options):
    options = {"batch_size": 4, "seconds": SAMPLES / RATE, "features": None} | options
    return AudioData(str(path), **options)


def ready(path, **options):
    data = unloaded(path, **options)
    data.setup()
    return data


def test_a_folder_of_sounds(tmp_path):
    waves = [sound(i) for i in range(9)]
    for i, wave in enumerate(waves):
        file = tmp_path / ("train" if i < 6 else "valid") / CLASSES[i % 3] / f"{i}.{('wav', 'flac')[i % 2]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(wave, kind=("WAV", "FLAC")[i % 2]))
    (tmp_path / "train" / "bird" / ".DS_Store").write_bytes(b"not a sound")
    data = ready(tmp_path)
    assert data.classes == tuple(CLASSES)
    assert {wave.numpy().tobytes() for wave in data.train_set[0]} == {wave.tobytes() for wave in waves[:6]}
    assert {wave.numpy().tobytes() for wave in data.test_set[0]} == {wave.tobytes() for wave in waves[6:]}
    (tmp_path / "train" / "dog" / "text.wav").write_bytes(b"not a sound")
    with pytest.raises(DataError, match=r"^train split, row 6 \(.*text.wav\): not a readable audio file"):
        ready(tmp_path)
    (tmp_path / "train" / "dog" / "text.wav").rename(tmp_path / "train" / "dog" / "song.m4a")
    with pytest.raises(DataError, match=r"train/dog/song.m4a\): not a readable audio file"):
        ready(tmp_path)


@pytest.mark.parametrize(("kind", "subtype", "tolerance"), [*EXACT, *((*lossy, np.inf) for lossy in LOSSY)])
def test_sounds_of_all_widths_come_out_on_one_scale(kind, subtype, tolerance):
    found = SoundDecoder(None, 4.0)(encoded(TONES, RATE, kind, subtype)) / 32768
    assert np.abs(found - TONES).max() < tolerance
    assert found.std() == pytest.approx(TONES.std(), rel=0.1)


@pytest.mark.parametrize(("kind", "subtype"), [*((kind, subtype) for kind, subtype, _ in EXACT), *LOSSY])
@pytest.mark.parametrize("rate", [None, 4000, 44100, 7999])
@pytest.mark.parametrize("seconds", [0.1, 3.3])
def test_a_part_of_a_sound_is_that_of_the_whole(kind, subtype, rate, seconds):
    """Compressed formats need context where they are entered, and so does resampling."""
    content = encoded(NOISE, RATE, kind, subtype)
    whole, own = soundfile.read(io.BytesIO(content), dtype="float32")
    whole = whole if rate is None else soxr.resample(whole, own, rate)
    length = round(seconds * (rate or own))
    expected = whole[(len(whole) - length) // 2 :][:length].astype(np.float64) * 32768
    found = SoundDecoder(rate, seconds)(content)
    assert len(found) == length
    assert np.abs(found - expected).max() < 0.6  # of a 16-bit step: 0.5 is the rounding


@pytest.mark.parametrize(("kind", "subtype"), LOSSY)
@pytest.mark.parametrize("block", [1 << 18, 1000])
def test_a_part_of_a_compressed_tone_is_that_of_the_whole(kind, subtype, block, monkeypatch):
    """In a tone, unlike in noise, the first samples after a seek depend on frames long before it."""
    monkeypatch.setattr("diffstride.experiments.data.audio._BLOCK", block)
    content = encoded(TONES, RATE, kind, subtype)
    whole = soundfile.read(io.BytesIO(content), dtype="float32")[0].astype(np.float64) * 32768
    found = SoundDecoder(None, 1.0)(content)
    assert np.abs(found - whole[(len(whole) - 8000) // 2 :][:8000]).max() < 0.6


@pytest.mark.parametrize("pitch", [440.0, 1000.0, 2500.0])
@pytest.mark.parametrize("rate", [4000, 11025, 16000, 22050, 44100])
def test_other_sample_rates_are_resampled(rate, pitch):
    """A tone stays the tone that it is, sample for sample, but near the ends; none above half of the rate folds."""
    wave = decoded(encoded(tone(pitch, rate, 0.5), rate, subtype="FLOAT"), seconds=0.5) / 32768
    inner = slice(400, -400)
    expected = tone(pitch, RATE, 0.5) if pitch < rate / 2 else tone(4000 - pitch, RATE, 0.5, level=-0.5)
    np.testing.assert_allclose(wave[inner], expected[inner], atol=5e-4)
    if rate > RATE:
        above = decoded(encoded(tone(4400, rate, 0.5), rate, subtype="FLOAT"), seconds=0.5)
        assert np.abs(above[inner]).max() < 0.01 * 16384


def test_the_rate_of_the_first_sound_is_that_of_all_unless_another_is_asked_for(tmp_path):
    contents = [encoded(tone(500, rate, 0.05), rate, subtype="FLOAT") for rate in (16000, 8000, 22050)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", contents if split == "train" else contents[::-1], [0, 1, 2])
    data = ready(tmp_path)
    assert (data.sample_rate, data.sample_shape) == (16000, (1, 800))
    sounds = torch.cat([data.train_set[0], data.test_set[0].flip(0)]).numpy() / 32768
    for wave in sounds:
        np.testing.assert_allclose(wave[200:600], tone(500, 16000, 0.05)[200:600], atol=2e-3)
    own = ready(tmp_path, sample_rate=8000).train_set[0][1].numpy()
    assert np.array_equal(own, np.rint(tone(500, 8000, 0.05) * 32768))


def test_channels_are_averaged():
    wave = sound(5, channels=2)
    assert np.array_equal(decoded(encoded(wave)), np.rint(wave.astype(np.int64).mean(1)))


@pytest.mark.parametrize(
    ("samples", "first"), [(6, -2), (7, -1), (9, 0), (10, 0), (1, -4), (11, 0), (12, 1), (13, 1), (14, 2), (31, 10)]
)
def test_a_sound_is_cut_to_its_middle_or_lies_in_the_middle_of_silence(samples, first):
    wave = np.arange(1, samples + 1, dtype=np.int16) * 100
    found = SoundDecoder(RATE, 10 / RATE)(encoded(wave))
    assert found.tolist() == [wave[i] if 0 <= i < samples else 0 for i in range(first, first + 10)]


def test_louder_than_full_scale_is_clipped():
    wave = np.array([0.5, 1.0, 1.7, -1.0, -1.1, 0.0, 0.0], dtype=np.float32)
    found = SoundDecoder(RATE, 7 / RATE)(encoded(wave, subtype="FLOAT"))
    assert found.tolist() == [16384, 32767, 32767, -32768, -32768, 0, 0]
    square = np.sign(tone(300, 16000, 0.05)) * 0.999  # resampled, it overshoots
    assert np.abs(SoundDecoder(RATE, 0.05)(encoded(square, 16000)).astype(int)).max() >= 32767


@pytest.mark.parametrize("rate", [RATE, 2 * RATE])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("scale", [2**7, 2**15, 2**31, 3e38])
def test_float_samples_on_the_scale_of_integers_are_refused(scale, channels, rate):
    """Clipped, they would be square waves, whatever they are."""
    speech = 0.1 * np.random.default_rng(0).standard_normal((800, channels)).clip(-9, 9)
    content = encoded((scale * speech / 1.1).astype(np.float32), rate, subtype="FLOAT")
    with pytest.raises(DataError, match=r"root mean square is above full scale.*: scale its samples to -1 to 1"):
        decoded(content)


@pytest.mark.parametrize("features", [None, BANDS])
@pytest.mark.parametrize("silent", [range(1), range(6)])
def test_silence_does_no_harm(tmp_path, features, silent):
    contents = [encoded(np.zeros(SAMPLES, np.int16) if i in silent else sound(i)) for i in range(6)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", contents, [0, 1, 2] * 2)
    data = ready(tmp_path, features=features)
    for step in (None, 0):
        inputs, _ = data.prepare_batch(data.train_set, step=step)
        assert inputs.isfinite().all()
        assert inputs[0].std() < 1e-3
        assert inputs.abs().max() < 50


UNREADABLE = {
    "text": b"hello, this is a text",
    "nothing": b"",
    "header cut": encoded(sound(0))[:30],
    "flac cut": encoded(sound(0, 4000), kind="FLAC")[:1000],
    "ogg cut": encoded(sound(0, 4000), kind="OGG")[:2000],
    "wav cut": encoded(sound(0))[:-40],
    "aiff cut": encoded(sound(0), kind="AIFF")[:-40],
    "matlab": encoded(sound(0), kind="MAT5", subtype="PCM_16"),
    "no samples": encoded(sound(0)[:0]),
    "nan": encoded(np.array([0.1, math.nan, 0.2], np.float32), subtype="FLOAT"),
    "infinite": encoded(np.array([[math.inf, -math.inf]] * 9, np.float32), subtype="FLOAT"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_sound_that_cannot_be_read_is_named_and_leaves_no_cache(tmp_path, cache, kind):
    files = [encoded(sound(i)) for i in range(6)]
    write(tmp_path / "train.parquet", files, [0, 1, 2] * 2)
    files[4] = UNREADABLE[kind]
    write(tmp_path / "test.parquet", files, [0, 1, 2] * 2)
    with pytest.raises(DataError, match=r"\Atest split, row 4 .*: not a readable audio file \(.+\): repair .*\Z"):
        ready(tmp_path)
    assert len(list(cache.glob("*.npy"))) <= 1


def test_a_wave_file_that_was_written_to_a_pipe_is_read_to_its_end():
    """Its header says that it is as long as can be."""
    content = encoded(sound(0))
    piped = content[:4] + b"\xff" * 4 + content[8:40] + b"\xff" * 4 + content[44:]
    assert np.array_equal(decoded(piped), sound(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, "sample_rate must be >= 1, got 0"),
        ({"seconds": 1e-5}, "^seconds must be at least one sample .*, not 1e-05"),
        ({"crop_seconds": 0.06}, "crop_seconds must be .* at most seconds, not 0.06"),
        ({"crop_seconds": 0.02, "features": LogMel(bands=16)}, "crop_seconds must be .* window of features, 0.025 s"),
        ({"features": LogMel(bands=200)}, "features.bands 200 from lowest 0 to highest 4000 Hz do not fit"),
    ],
)
def test_wrong_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ready(folder.path, **options)


def test_the_cache_follows_the_decoding(folder, cache):
    first = ready(folder.path)
    for options in ({"features": BANDS}, {"crop_seconds": 0.02}, {"sample_rate": RATE}):
        assert torch.equal(ready(folder.path, **options).train_set[0], first.train_set[0])
    assert len(list(cache.glob("*.npy"))) == 2
    shorter = ready(folder.path, seconds=0.04)
    assert torch.equal(shorter.train_set[0], first.train_set[0][:, 40:360])
    assert shorter.fingerprint != first.fingerprint


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_streaming_gives_the_samples_of_the_cache(folder, cache, workers):
    options = {"train_samples": 20, "crop_seconds": 0.04, "seed": 3, "features": BANDS}
    streamed = ready(folder.path, cache_gb=0, num_workers=workers, **options)
    assert not isinstance(streamed.train_set, tuple)
    assert not list(cache.glob("*.npy"))
    cached = ready(folder.path, **options)
    for ours, theirs in zip(epoch(streamed, 2), epoch(cached, 2), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        torch.testing.assert_close(streamed.prepare_batch(ours, step=1), cached.prepare_batch(theirs, step=1))
    assert all(
        torch.equal(a, b) for (a, _), (b, _) in zip(streamed.val_dataloader(), cached.val_dataloader(), strict=True)
    )
    assert (streamed.mean, streamed.std, streamed.sample_shape) == (cached.mean, cached.std, cached.sample_shape)


@pytest.mark.parametrize("features", [None, BANDS])
def test_a_checkpoint_is_enough_to_prepare_a_file_as_the_set_would(folder, tmp_path, features):
    """The rate is that of the first sound: only a loaded set can know it."""
    options = {"features": features, "crop_seconds": 0.02}
    data = ready(folder.path, **options)
    torch.save(data.state_dict(), tmp_path / "state.pt")
    other = unloaded("/no/where", **options)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (other.classes, other.sample_shape, other.num_classes) == (tuple(CLASSES), data.sample_shape, 3)
    file = tmp_path / "own.wav"
    file.write_bytes(encoded(folder.test[3]))
    batch = other.read(file)[None], torch.zeros(1, dtype=torch.long)
    assert torch.equal(batch[0][0], data.test_set[0][3])
    prepared, _ = other.prepare_batch(batch)
    assert torch.equal(prepared, data.prepare_batch(batch)[0])
    assert prepared.shape == (2, *data.sample_shape)
    with pytest.raises(DataError, match=r"none.wav: not a readable audio file \(No such file or directory\)$"):
        data.read(tmp_path / "none.wav")


@pytest.mark.parametrize("rate", [None, 44100])
def test_a_part_of_a_long_sound_takes_little_memory(rate):
    content = encoded(np.zeros(3600 * RATE, np.int16), kind="FLAC")
    tracemalloc.start()
    SoundDecoder(rate, 1.0)(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
