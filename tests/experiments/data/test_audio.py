"""Audio sets: what comes out is what soundfile reads from the files, cut, padded, resampled and normalised."""

import io
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.signal
import soundfile
import torch

from tests.helpers.datasets import epoch, layouts

datasets = pytest.importorskip("datasets")

from diffstride.experiments.data import AudioData, DataError, LogMel  # noqa: E402
from diffstride.experiments.data import hub as module  # noqa: E402
from diffstride.experiments.data.audio import SoundDecoder  # noqa: E402

FSDD = Path(__file__).parents[4] / "shared" / "data" / "fsdd"
CLASSES = ["bark", "chirp", "meow"]
RATE, SAMPLES = 8000, 400  # of the sounds here: 0.05 s
BANDS = LogMel(bands=16, window=0.016, hop=0.004)
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


def outcome(prepare, *arguments, **options):
    """What comes out, or what the error says where either will do."""
    try:
        return prepare(*arguments, **options)
    except DataError as error:
        return str(error)


def write(path, contents, labels, audio="audio", label="label", **more):
    """A parquet file as on the hub: `datasets` itself writes sounds with the help of a library that we do not need."""
    features = datasets.Features(
        {audio: datasets.Audio(), label: datasets.ClassLabel(names=CLASSES)}
        | {name: feature for name, (feature, _) in more.items()}
    )
    columns = {audio: [{"bytes": content, "path": f"{i}.wav"} for i, content in enumerate(contents)], label: labels}
    columns |= {name: values for name, (_, values) in more.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=features.arrow_schema), path)


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


def stacked(waves):
    return torch.from_numpy(np.stack(waves))


def test_samples_and_labels_are_those_of_the_files(folder):
    data = ready(folder.path)
    for split, waves in ((data.train_set, folder.train), (data.test_set, folder.test)):
        assert torch.equal(split[0], stacked(waves))
        assert split[1].tolist() == [i % 3 for i in range(len(waves))]
    assert (data.num_classes, data.classes, data.sample_rate) == (3, tuple(CLASSES), RATE)
    assert data.sample_shape == (1, SAMPLES)


def test_formats_and_subtypes(tmp_path):
    """Lossless ones come back as they were; OGG as soundfile reads it, which is near what was written."""
    wave = (tone(440, RATE, 0.05) * 32768).astype(np.int16)
    contents = [encoded(wave), encoded(wave, kind="FLAC"), encoded(wave, kind="AIFF"), encoded(wave, kind="OGG")]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", contents, [0, 1, 2, 0])
    sounds = ready(tmp_path).train_set[0].numpy()
    assert all(np.array_equal(found, wave) for found in sounds[:3])
    read, _ = soundfile.read(io.BytesIO(contents[3]), dtype="float64")
    assert np.abs(sounds[3] - read[:SAMPLES] * 32768).max() <= 0.51
    noise = sounds[3].astype(float) - wave
    assert noise.std() < 0.2 * wave.std()


LAYOUTS = layouts(write, CLASSES, ".wav")
_, layout_sounds, *_ = LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    waves = [sound(i) for i in range(9)]
    layout(tmp_path / "set", [encoded(wave) for wave in waves])
    data = ready(tmp_path / "set")
    for (sounds, labels), chosen in ((data.train_set, range(6)), (data.test_set, range(6, 9))):
        found = {(wave.numpy().tobytes(), label) for wave, label in zip(sounds, labels.tolist(), strict=True)}
        assert found == {(waves[i].tobytes(), i % 3) for i in chosen}
    assert data.classes == tuple(CLASSES)


def test_one_parquet_file_without_the_hubs_metadata(tmp_path):
    waves = [sound(i) for i in range(6)]
    table = pa.table({"sound": [{"bytes": encoded(w), "path": None} for w in waves], "digit": [3, 7, 9, 3, 7, 9]})
    pq.write_table(table, tmp_path / "some.parquet")
    data = ready(tmp_path / "some.parquet", test_split="train[:50%]")
    assert torch.equal(data.train_set[0], stacked(waves))
    assert (data.train_set[1].tolist(), data.classes) == ([0, 1, 2, 0, 1, 2], ("3", "7", "9"))
    assert torch.equal(data.test_set[0], data.train_set[0][:3])


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


def test_resampled_sounds_are_near_those_of_scipy():
    """Of a band-limited sound: two filters differ near half of the rate."""
    rng, time = np.random.default_rng(0), np.arange(11025) / 22050
    wave = sum(0.1 * np.sin(2 * np.pi * (f * time + rng.random())) for f in rng.uniform(50, 3000, 6))
    ours = decoded(encoded(wave, 22050, subtype="FLOAT"), seconds=0.5) / 32768
    theirs = scipy.signal.resample_poly(wave, 160, 441)
    assert len(ours) == len(theirs) == 4000
    np.testing.assert_allclose(ours[200:-200], theirs[200:-200], atol=3e-3)


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


@pytest.mark.parametrize("channels", [2, 3])
def test_channels_are_averaged(channels):
    wave = sound(5, channels=channels)
    mean = wave.astype(np.int64).sum(1) / channels
    assert np.abs(decoded(encoded(wave)) - mean).max() <= 0.501
    if channels == 2:
        assert np.array_equal(decoded(encoded(wave)), np.rint(mean))


@pytest.mark.parametrize(("samples", "before", "after"), [(6, 2, 2), (7, 1, 2), (9, 0, 1), (10, 0, 0), (1, 4, 5)])
def test_a_shorter_sound_lies_in_the_middle_of_silence(samples, before, after):
    wave = np.arange(1, samples + 1, dtype=np.int16) * 100
    found = SoundDecoder(RATE, 10 / RATE)(encoded(wave))
    assert found.tolist() == [0] * before + wave.tolist() + [0] * after


@pytest.mark.parametrize(("samples", "first"), [(11, 0), (12, 1), (13, 1), (14, 2), (31, 10)])
def test_a_longer_sound_is_cut_to_its_middle(samples, first):
    wave = np.arange(samples, dtype=np.int16) * 100
    assert SoundDecoder(RATE, 10 / RATE)(encoded(wave)).tolist() == wave[first : first + 10].tolist()


def test_finer_and_coarser_samples_become_16_bits():
    fine = np.random.default_rng(0).integers(-(2**31), 2**31 - 256, SAMPLES, dtype=np.int64)
    expected = np.rint((fine >> 8) / 2**8).clip(-32768, 32767)
    assert np.array_equal(decoded(encoded((fine >> 8 << 8).astype(np.int32), subtype="PCM_24")), expected)
    for subtype in ("FLOAT", "DOUBLE"):
        wave = np.random.default_rng(1).uniform(-0.99, 0.99, SAMPLES).astype(np.float32)
        assert np.array_equal(decoded(encoded(wave, subtype=subtype)), np.rint(wave.astype(np.float64) * 32768))
    coarse = decoded(encoded(sound(2), subtype="PCM_U8"))
    assert not (coarse % 256).any()
    assert np.abs(coarse - sound(2).astype(float)).max() <= 256


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


def promised(content, frames):
    """A FLAC file whose header promises other than it holds."""
    return (
        content[:21]
        + bytes([content[21] & 0xF0 | frames >> 32])
        + struct.pack(">I", frames & 0xFFFFFFFF)
        + content[26:]
    )


UNREADABLE = {
    "text": b"hello, this is a text",
    "nothing": b"",
    "header cut": encoded(sound(0))[:30],
    "not a wave": b"RIFF" + bytes(200),
    "flac cut": encoded(sound(0, 4000), kind="FLAC")[:1000],
    "ogg cut": encoded(sound(0, 4000), kind="OGG")[:2000],
    "no samples": encoded(sound(0)[:0]),
    "nan": encoded(np.array([0.1, math.nan, 0.2], np.float32), subtype="FLOAT"),
    "infinite": encoded(np.array([[math.inf, -math.inf]] * 9, np.float32), subtype="FLOAT"),
}


@pytest.fixture
def bad(tmp_path):
    """A set of 6 + 6 sounds with one file of the caller's at a row of one split."""

    def build(content, row=4, split="train"):
        for name in ("train", "test"):
            files = [encoded(sound(i)) for i in range(6)]
            if name == split:
                files[row] = content
            write(tmp_path / "bad" / f"{name}.parquet", files, [0, 1, 2] * 2)
        return tmp_path / "bad"

    return build


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_sound_that_cannot_be_read_is_named_and_leaves_no_cache(bad, cache, kind):
    with pytest.raises(
        DataError, match=r"^train split, row 4 \(4.wav\): not a readable sound \(.+\): repair .* row$"
    ) as e:
        ready(bad(UNREADABLE[kind]))
    assert "\n" not in str(e.value)
    assert [file for file in cache.rglob("*") if file.suffix not in ("", ".arrow")] == []


def test_the_cause_is_given():
    for kind, cause in (
        ("text", "its format is none of WAV"),
        ("no samples", "it has no samples"),
        ("nan", "not finite"),
    ):
        with pytest.raises(DataError, match=cause):
            decoded(UNREADABLE[kind])


@pytest.mark.parametrize("rate", [None, RATE])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_first_sound_of_a_split_is_named_too(bad, rate, split):
    with pytest.raises(
        DataError, match=rf"^{split} split, row 0 \(0.wav\): not a readable sound \(its format is none of"
    ):
        ready(bad(UNREADABLE["text"], 0, split), sample_rate=rate)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_sound_that_cannot_be_read_in_a_stream(bad, workers, monkeypatch):
    monkeypatch.setattr(
        "diffstride.experiments.data.audio._MEASURED", 2
    )  # sounds that are read at the start: rows 0 and 3
    data = ready(bad(UNREADABLE["text"]), cache_gb=0, num_workers=workers, batch_size=6)
    with pytest.raises(DataError, match=r"\Atrain split, row 4 \(4.wav\): not a readable sound [^\n]*\Z"):
        epoch(data)


def test_a_header_that_promises_more_than_memory_holds_is_no_end_of_the_program():
    content = promised(encoded(sound(0, 4000), kind="FLAC"), 2**36 - 1)
    found = outcome(decoded, content)
    assert "\n" not in found if isinstance(found, str) else np.array_equal(found, sound(0, 4000)[1800:2200])


def test_a_wave_file_that_was_written_to_a_pipe_is_read_to_its_end():
    """Its header says that it is as long as can be."""
    content = encoded(sound(0))
    piped = content[:4] + b"\xff" * 4 + content[8:40] + b"\xff" * 4 + content[44:]
    assert np.array_equal(decoded(piped), sound(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audio_column": "sound"}, "no column 'sound': set audio_column to one of audio, label"),
        ({"label_column": "digit"}, "no column 'digit': set label_column to one of audio, label"),
        ({"audio_column": "label"}, "column 'label' holds no sounds: set audio_column to audio"),
        ({"label_column": "audio"}, "column 'audio' holds no classes: set label_column to label"),
        ({"train_split": "trian"}, "no split 'trian': set train_split and test_split to two of train, test"),
        ({"train_samples": 25}, "train split has 24 sounds, not 25: lower"),
        ({"train_samples": 0}, "train_samples must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"num_workers": -1}, "num_workers must be >= 0"),
        ({"sample_rate": -8000}, "sample_rate must be >= 1, got -8000"),
        ({"sample_rate": 0}, "sample_rate must be >= 1, got 0"),
        ({"seconds": 0.0}, "^seconds must be > 0 and finite, got 0"),
        ({"seconds": math.nan}, "^seconds must be > 0 and finite, got nan"),
        ({"seconds": math.inf}, "^seconds must be .*got inf"),
        ({"seconds": 1e-5}, "^seconds must be "),
        ({"crop_seconds": 0.06}, "crop_seconds must be from one sample to seconds, 0.05, not 0.06"),
        ({"crop_seconds": -0.01}, "crop_seconds must be > 0 and finite, got -0.01"),
        ({"crop_seconds": 1e-5}, "crop_seconds must be from one sample to seconds"),
        ({"seconds": 0.02, "features": LogMel(bands=16)}, "seconds must be at least the window of 0.025 s, not 0.02"),
        ({"crop_seconds": 0.02, "features": LogMel(bands=16)}, "crop_seconds must be at least the window of 0.025 s"),
        ({"features": LogMel(bands=200)}, "features.bands 200 is too many"),
        ({"features": LogMel(highest=5000.0)}, "features.lowest and highest must be .* 4000 Hz, not 0 and 5000"),
    ],
)
def test_wrong_options(folder, options, message):
    with pytest.raises(ValueError, match=message) as error:
        ready(folder.path, **options)
    assert "\n" not in str(error.value)


def test_a_batch_larger_than_the_set(folder):
    with pytest.raises(DataError, match="larger than the 24 training samples of a rank: lower batch_size"):
        ready(folder.path, batch_size=25).train_dataloader()


@pytest.mark.parametrize("groups", [0, 1])
def test_an_empty_split(tmp_path, groups):
    """A parquet file without rows, as `datasets` and as pyarrow write it."""
    write(tmp_path / "train.parquet", [], [])
    write(tmp_path / "test.parquet", [encoded(sound(0))], [0])
    if not groups:
        pq.ParquetWriter(tmp_path / "train.parquet", pq.read_schema(tmp_path / "train.parquet")).close()
    with pytest.raises(DataError, match=r"^the train split of \S+ is empty: set train_split or test_split"):
        ready(tmp_path)


def test_folders_that_hold_no_sounds(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    for name in ("sound.wav", "flat/sound.wav"):
        (tmp_path / name).write_bytes(encoded(sound(0)))
    for name in ("empty", "flat"):
        with pytest.raises(DataError, match=r"with train/<class>/<sound> and test/<class>/<sound>$") as error:
            ready(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"is not a parquet file: give a \.parquet file"):
        ready(tmp_path / "sound.wav")


def test_a_folder_of_sounds_with_what_else_lies_in_folders(tmp_path):
    waves = [sound(i) for i in range(9)]
    layout_sounds(tmp_path / "set", [encoded(wave) for wave in waves])
    for name in (".DS_Store", "train/.DS_Store", "train/bark/.DS_Store", "README.txt", "train/README.txt"):
        (tmp_path / "set" / name).write_bytes(b"not a sound")
    (tmp_path / "set" / "test").rename(tmp_path / "set" / "valid")
    data = ready(tmp_path / "set")
    assert {wave.numpy().tobytes() for wave in data.train_set[0]} == {wave.tobytes() for wave in waves[:6]}
    assert {wave.numpy().tobytes() for wave in data.test_set[0]} == {wave.tobytes() for wave in waves[6:]}
    (tmp_path / "set" / "train" / "meow" / "text.wav").write_bytes(b"not a sound")
    with pytest.raises(DataError, match=r"^train split, row 6 \(.*text.wav\): not a readable sound"):
        ready(tmp_path / "set")


@pytest.mark.parametrize("name", ["test", "train/validation"])
def test_the_folders_own_name_says_nothing_about_splits(tmp_path, name):
    layout_sounds(tmp_path / name, [encoded(sound(i)) for i in range(9)])
    data = ready(tmp_path / name)
    assert (len(data.train_set[1]), len(data.test_set[1])) == (6, 3)


def test_a_part_of_a_folders_split_is_given_or_refused_by_its_name(tmp_path):
    layout_sounds(tmp_path / "set", [encoded(sound(i)) for i in range(9)])
    data = outcome(ready, tmp_path / "set", test_split="train[:50%]")
    if isinstance(data, str):
        assert "'train[:50%]'" in data
    else:
        assert torch.equal(data.test_set[0], data.train_set[0][:3])


def test_the_fingerprint_of_a_streamed_folder_follows_its_files(tmp_path):
    layout_sounds(tmp_path / "set", [encoded(sound(i)) for i in range(9)])
    original = ready(tmp_path / "set", cache_gb=0).fingerprint
    assert ready(tmp_path / "set", cache_gb=0).fingerprint == original
    (tmp_path / "set" / "train" / "bark" / "0.wav").write_bytes(encoded(sound(77)))
    assert ready(tmp_path / "set", cache_gb=0).fingerprint != original


def test_columns_and_classes(tmp_path):
    """Strings are classes where the column is named; one that training has not is named with its row."""
    animals = {"train": ["dog", "cat", "dog"], "test": ["cat", "dog", "fox"]}
    for split in ("train", "test"):
        words = datasets.Value("string"), animals[split]
        speakers = datasets.ClassLabel(names=["a", "b"]), [0, 1, 1]
        files = [encoded(sound(i)) for i in range(3)]
        write(tmp_path / f"{split}.parquet", files, [0, 1, 2], label="kind", word=words, who=speakers)
    with pytest.raises(DataError, match="columns kind, who could all be the label_column: set label_column to one"):
        ready(tmp_path)
    with pytest.raises(DataError, match="test split, row 2: word fox is none of the 2 classes"):
        ready(tmp_path, label_column="word")
    data = ready(tmp_path, label_column="word", test_split="train")
    assert (data.classes, data.train_set[1].tolist()) == (("cat", "dog"), [1, 0, 1])
    data = ready(tmp_path, label_column="who")
    assert (data.classes, data.test_set[1].tolist()) == (("a", "b"), [0, 1, 1])


def test_a_second_start_does_not_decode(folder, cache, monkeypatch):
    first = ready(folder.path)
    written = {file: file.stat().st_mtime_ns for file in cache.glob("*.npy")}
    assert len(written) == 2

    def decode(*args):
        raise AssertionError("decoded again")

    monkeypatch.setattr(module.Split, "decode", decode)
    second = ready(folder.path)
    assert torch.equal(first.train_set[0], second.train_set[0])
    assert second.fingerprint == first.fingerprint
    assert {file: file.stat().st_mtime_ns for file in cache.glob("*.npy")} == written
    for untouched in ({"batch_size": 2, "seed": 7}, {"features": BANDS}, {"crop_seconds": 0.02}, {"sample_rate": RATE}):
        assert torch.equal(ready(folder.path, **untouched).train_set[0], first.train_set[0])
    for decoding in ({"seconds": 0.04}, {"sample_rate": 4000}, {"sample_rate": 8001}):  # the last is of the same length
        with pytest.raises(AssertionError, match="decoded again"):
            ready(folder.path, **decoding)
    monkeypatch.undo()
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(cache))
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


def test_inputs_are_normalised_by_the_statistics_of_the_train_split(folder):
    data = ready(folder.path)
    raw = np.stack(folder.train).astype(np.float64) / 32768
    inputs, labels = data.prepare_batch(data.test_set)
    expected = (np.stack(folder.test)[:, None] / 32768 - raw.mean()) / raw.std()
    np.testing.assert_allclose(inputs.numpy(), expected, atol=1e-3)
    assert inputs.dtype == torch.float32
    assert inputs.shape == (9, 1, SAMPLES)
    assert labels is data.test_set[1]


@pytest.mark.parametrize("crop_seconds", [None, 0.02])
def test_spectrograms_are_normalised_over_all_that_is_seen_of_the_train_split(folder, crop_seconds):
    data = ready(folder.path, features=BANDS, crop_seconds=crop_seconds)
    inputs, _ = data.prepare_batch(data.train_set)
    assert inputs.mean().item() == pytest.approx(0, abs=1e-4)
    assert inputs.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert inputs.shape[1:] == data.sample_shape == ((1, 12, 16) if crop_seconds is None else (1, 5, 16))
    assert [axis.name for axis in data.axes] == ["time", "frequency"]
    assert data.axes[0].spacing == pytest.approx(0.004)


def test_evaluation_has_all_parts_of_a_sound_and_training_one_of_chance(folder):
    data = ready(folder.path, crop_seconds=0.015)  # 120 samples: three parts, 20 left at either end
    waves = torch.from_numpy(np.stack(folder.test) / 32768).float()
    normal = lambda parts: (parts - data.mean) / data.std
    inputs, labels = data.prepare_batch(data.test_set)
    assert torch.equal(labels, data.test_set[1])
    assert data.sample_shape == (1, 120)
    expected = [wave[start : start + 120] for wave in waves for start in (20, 140, 260)]
    torch.testing.assert_close(inputs[:, 0], normal(torch.stack(expected)))

    trained, targets = data.prepare_batch(data.test_set, step=4)
    assert torch.equal(targets, labels)
    starts = []
    for part, wave in zip(trained[:, 0], normal(waves), strict=True):
        distances = (wave.unfold(0, 120, 1) - part).abs().amax(1)
        starts.append(int(distances.argmin()))
        assert distances.min() < 1e-5
    assert len(set(starts)) > 5
    again, _ = data.prepare_batch(data.test_set, step=4)
    other, _ = data.prepare_batch(data.test_set, step=5)
    assert torch.equal(again, trained)
    assert not torch.equal(other, trained)


def test_subsets_are_balanced_nested_and_follow_the_seed(tmp_path):
    labels = [0] * 20 + [1] * 5 + [2] * 15
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [encoded(sound(i)) for i in range(40)], labels)

    def files(**options):
        data = ready(tmp_path, **options)
        return data, {wave.numpy().tobytes() for wave in data.train_set[0]}

    data, small = files(train_samples=13, test_samples=6)
    assert sorted(torch.bincount(data.train_set[1]).tolist()) == [4, 4, 5]
    assert torch.bincount(data.test_set[1]).tolist() == [2, 2, 2]
    for wave, label in zip(*data.train_set, strict=True):
        assert labels[next(i for i in range(40) if np.array_equal(sound(i), wave.numpy()))] == label
    larger, large = files(train_samples=25)
    assert torch.bincount(larger.train_set[1]).tolist() == [10, 5, 10]
    assert small < large
    assert small != files(train_samples=13, seed=1)[1]


def test_order_is_a_function_of_seed_and_epoch(folder):
    def order(seed, number, noise):
        torch.manual_seed(noise)
        return torch.cat([sounds for sounds, _ in epoch(ready(folder.path, seed=seed), number)])

    assert torch.equal(order(0, 0, 1), order(0, 0, 2))
    assert not torch.equal(order(0, 0, 1), order(0, 1, 1))
    assert not torch.equal(order(0, 0, 1), order(1, 0, 1))
    seen = sorted(wave.numpy().tobytes() for wave in order(0, 3, 1))
    assert seen == sorted(wave.tobytes() for wave in folder.train)


@pytest.mark.parametrize("features", [None, BANDS])
def test_a_checkpoint_is_enough_to_prepare_a_file_as_the_set_would(folder, tmp_path, features):
    """The rate is that of the first sound: only a loaded set can know it."""
    options = {"features": features, "crop_seconds": 0.02}
    data = ready(folder.path, **options)
    torch.save(data.state_dict(), tmp_path / "state.pt")
    other = unloaded("/no/where", **options)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (other.classes, other.sample_shape, other.num_classes) == (tuple(CLASSES), data.sample_shape, 3)
    file = tmp_path / "own.flac"
    file.write_bytes(encoded(tone(700, 16000, 0.04), 16000, "FLAC"))
    raw = other.read(file)
    np.testing.assert_allclose(raw[100:300] / 32768, tone(700, RATE, 0.05)[60:260], atol=5e-3)  # 40 zeros before
    zero = torch.zeros(1, dtype=torch.long)
    assert torch.equal(raw, data.read(file))
    prepared, _ = other.prepare_batch((raw[None], zero))
    assert torch.equal(prepared, data.prepare_batch((data.read(file)[None], zero))[0])
    assert prepared.shape == (2, *data.sample_shape)
    file.write_bytes(encoded(folder.test[3]))
    assert torch.equal(other.read(file), data.test_set[0][3])


def test_files_that_cannot_be_read_are_named(folder, tmp_path):
    data = ready(folder.path)
    (tmp_path / "bad.wav").write_bytes(b"text")
    with pytest.raises(DataError, match=r"bad.wav: not a readable sound \(its format is none of .*\)$"):
        data.read(tmp_path / "bad.wav")
    with pytest.raises(DataError, match=r"none.wav: cannot be read \(No such file or directory\)$"):
        data.read(tmp_path / "none.wav")


def test_a_loaded_set_keeps_what_it_has(folder):
    data = ready(folder.path)
    mean = data.mean.clone()
    data.load_state_dict(data.state_dict() | {"mean": mean + 1, "classes": ("other",), "sample_rate": 1})
    assert torch.equal(data.mean, mean)
    assert (data.classes, data.sample_rate) == (tuple(CLASSES), RATE)


@pytest.mark.long
@pytest.mark.skipif(not FSDD.exists(), reason="the Free Spoken Digit Dataset is not at hand")
def test_spoken_digits():
    data = ready(FSDD, label_column="digit", seconds=1.0, features=LogMel(), train_samples=100, test_samples=50)
    assert torch.bincount(data.train_set[1]).tolist() == [10] * 10
    assert torch.bincount(data.test_set[1]).tolist() == [5] * 10
    assert (data.sample_rate, data.sample_shape) == (8000, (1, 100, 64))
    expected = {}
    for row in pq.read_table(FSDD / "test.parquet", columns=["audio", "digit"]).to_pylist():
        wave, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")
        assert (rate, wave.ndim) == (8000, 1)
        full = np.zeros(8000, np.int16)
        if len(wave) <= 8000:
            full[(8000 - len(wave)) // 2 :][: len(wave)] = wave
        else:
            full[:] = wave[(len(wave) - 8000) // 2 :][:8000]
        expected[full.tobytes()] = row["digit"]
    for wave, label in zip(*data.test_set, strict=True):
        assert expected[wave.numpy().tobytes()] == int(data.classes[label])
    inputs, _ = data.prepare_batch(data.train_set)
    assert inputs.mean().item() == pytest.approx(0, abs=1e-3)
