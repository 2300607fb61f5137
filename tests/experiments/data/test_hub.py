"""Sets of files: samples and labels are those of the files, subsets are nested, and the fingerprint follows content."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.datasets import CLASSES, encoded, epoch, image_set, picture, pixels_of, ready, write

datasets = pytest.importorskip("datasets")

from diffstride.experiments.data import Augment, DataError  # noqa: E402
from diffstride.experiments.data import hub as module  # noqa: E402
from diffstride.experiments.data.base import as_dataset  # noqa: E402

CIFAR10 = Path(__file__).parents[4] / "shared" / "data" / "cifar10"
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(tmp_path):
    return image_set(tmp_path / "set")


def hub(path, files):
    write(path / "data" / "train-00000-of-00002.parquet", files[:3], [0, 1, 2])
    write(path / "data" / "train-00001-of-00002.parquet", files[3:6], [0, 1, 2])
    write(path / "data" / "test-00000-of-00001.parquet", files[6:], [0, 1, 2])


def folders(path, files):
    for i, content in enumerate(files):
        name = path / ("train" if i < 6 else "test") / CLASSES[i % 3] / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(content)


def validation(path, files):
    write(path / "train.parquet", files[:6], [0, 1, 2] * 2)
    write(path / "validation.parquet", files[6:], [0, 1, 2])


def unlabelled_test(path, files):
    validation(path, files)
    write(path / "test.parquet", files[:2], [-1, -1])


@pytest.mark.parametrize("layout", [hub, folders, validation, unlabelled_test])
def test_layouts(tmp_path, layout):
    files = [encoded(picture(i)) for i in range(9)]
    layout(tmp_path / "set", files)
    data = ready(tmp_path / "set")
    for (pixels, labels), expected in ((data.train_set, files[:6]), (data.test_set, files[6:])):
        found = {(image.numpy().tobytes(), label) for image, label in zip(pixels, labels.tolist(), strict=True)}
        first = files.index(expected[0])
        assert found == {(pixels_of(f).numpy().tobytes(), (first + i) % 3) for i, f in enumerate(expected)}


def test_a_second_start_does_not_decode(folder, cache, monkeypatch):
    first = ready(folder.path)
    monkeypatch.setattr(module.cache, "watched", lambda *args: pytest.fail("decoded again"))
    second = ready(folder.path)
    assert torch.equal(first.train_set[0], second.train_set[0])
    assert second.fingerprint == first.fingerprint


def test_fingerprint_follows_content_and_preparation_only(folder, tmp_path):
    original = ready(folder.path).fingerprint
    assert ready(folder.path, image_size=4).fingerprint != original
    assert ready(folder.path, train_samples=12).fingerprint != original
    assert ready(folder.path, batch_size=3, seed=7, augment=Augment(flip=True)).fingerprint == original

    labels = [i % 3 for i in range(30)]
    moved = tmp_path / "elsewhere"
    write(moved / "train.parquet", folder.train, labels)
    write(moved / "test.parquet", folder.test, labels[:9])
    assert ready(moved).fingerprint == original
    write(moved / "train.parquet", folder.train, [1, *labels[1:]])
    relabelled = ready(moved)
    assert relabelled.fingerprint != original
    assert relabelled.train_set[1][0] == 1
    write(moved / "train.parquet", [*folder.train[:29], encoded(picture(999))], labels)
    changed = ready(moved)
    assert changed.fingerprint != original
    assert torch.equal(changed.train_set[0][29], pixels_of(encoded(picture(999))))


@pytest.mark.long
def test_fingerprint_is_the_same_in_another_process(folder, cache):
    code = f"""
import sys
from diffstride.experiments.data import ImageData
assert not {{"datasets", "kornia"}} & set(sys.modules), "slow imports that generated sets do not need"
data = ImageData({str(folder.path)!r})
data.setup()
print(data.fingerprint)
"""
    environment = os.environ | {"DIFFSTRIDE_CACHE": str(cache / "other"), "PYTHONHASHSEED": "5"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert out.stdout.strip() == ready(folder.path).fingerprint


def test_subsets_are_balanced_nested_and_follow_the_seed(tmp_path):
    labels = [0] * 20 + [1] * 5 + [2] * 15
    contents = [encoded(picture(i)) for i in range(40)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", contents, labels)
    small = ready(tmp_path, train_samples=13, test_samples=6)
    assert torch.bincount(small.train_set[1]).tolist() in ([5, 4, 4], [4, 5, 4], [4, 4, 5])
    assert torch.bincount(small.test_set[1]).tolist() == [2, 2, 2]
    large = ready(tmp_path, train_samples=25)
    assert torch.bincount(large.train_set[1]).tolist() == [10, 5, 10]

    def files(data):
        return {image.numpy().tobytes() for image in data.train_set[0]}

    assert files(small) < files(large)
    assert files(small) == files(ready(tmp_path, train_samples=13))
    assert files(small) != files(ready(tmp_path, train_samples=13, seed=1))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_streaming_gives_the_samples_of_the_cache(folder, cache, workers):
    options = {"train_samples": 20, "image_size": 6, "seed": 3}
    cached = ready(folder.path, **options)
    streamed = ready(folder.path, cache_gb=1e-6, num_workers=workers, **options)
    assert not isinstance(streamed.train_set, tuple)
    for ours, theirs in zip(epoch(streamed, 2), epoch(cached, 2), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert streamed.sample_shape == cached.sample_shape
    assert streamed.fingerprint == ready(folder.path, cache_gb=1e-6, **options).fingerprint


def test_a_stream_of_another_subset_has_another_fingerprint(tmp_path):
    write(tmp_path / "set" / "train.parquet", [encoded(picture(i)) for i in range(3)], [0, 1, 0])
    write(tmp_path / "set" / "test.parquet", [encoded(picture(9))], [0])
    subsets = [ready(tmp_path / "set", batch_size=1, cache_gb=0, train_samples=1, seed=seed) for seed in range(8)]
    seen = {(data.fingerprint, float(data.train_set[0][0].float().mean())) for data in subsets}
    assert len(seen) == len({fingerprint for fingerprint, _ in seen}) == len({value for _, value in seen}) == 3


def test_the_fingerprint_of_a_stream_follows_its_files_and_the_part_of_the_split(folder):
    halves = {"cache_gb": 0, "train_split": "train[:15]", "test_split": "train[15:]"}
    original = ready(folder.path, **halves).fingerprint
    assert ready(folder.path, **halves).fingerprint == original
    swapped = {"cache_gb": 0, "train_split": "train[15:]", "test_split": "train[:15]"}
    assert ready(folder.path, **swapped).fingerprint != original
    write(folder.path / "train.parquet", [*folder.train[:29], encoded(picture(999))], [i % 3 for i in range(30)])
    assert ready(folder.path, **halves).fingerprint != original


@pytest.fixture
def bad(tmp_path):
    """A set of 6 + 6 images with one file of the caller's at row 4 of train."""

    def build(content):
        files = [encoded(picture(i)) for i in range(6)]
        write(tmp_path / "bad" / "test.parquet", files, [0, 1, 2] * 2)
        files[4] = content
        write(tmp_path / "bad" / "train.parquet", files, [0, 1, 2] * 2)
        return tmp_path / "bad"

    return build


@pytest.mark.parametrize("content", [b"not an image", encoded(picture(0, (40, 40)))[:300], b""])
def test_a_corrupt_image_is_named_and_leaves_no_cache(bad, cache, content):
    with pytest.raises(
        DataError, match=r"^train split, row 4 \(4.file\): not a readable image file .*: repair or remove it$"
    ):
        ready(bad(content))
    assert not list(cache.glob("*.npy"))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_corrupt_image_in_a_stream(bad, workers):
    data = ready(bad(b"not an image"), cache_gb=0, num_workers=workers, batch_size=6)
    with pytest.raises(DataError, match=r"\Atrain split, row 4 \(4.file\): not a readable image file [^\n]*\Z"):
        epoch(data)


def test_images_of_several_sizes(bad):
    path = bad(encoded(picture(0, (8, 9))))
    for split, message in ("train[:5]", "train.* row 4 .*its size is 8x9 but"), ("train[4:]", "test.* row 0 .*8x8 but"):
        with pytest.raises(DataError, match=f"^{message} the first is .*: set image_size"):
            ready(path, train_split=split, cache_gb=4 * (split == "train[:5]"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "fine"}, "'fine' cannot be the label_column: set label_column to one of label"),
        ({"image_column": "label"}, "'label' cannot be the image_column: set image_column to one of img"),
        ({"label_column": "img"}, "'img' cannot be the label_column"),
        ({"train_split": "trian"}, "no split 'trian', only test, train: add it, or set train_split"),
        ({"train_samples": 31}, "train split has 30 samples, not 31"),
        ({"image_size": 0}, "image_size must be >= 1"),
        ({"augment": Augment(resized_crop=9)}, "set image_size to at least 9"),
    ],
)
def test_wrong_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ready(folder.path, **options)


def test_a_label_that_training_never_saw(tmp_path):
    for split, labels in ("train", ["x", "y"]), ("test", ["x", "z"]):
        word = datasets.Value("string"), labels
        write(tmp_path / f"{split}.parquet", [encoded(picture(i)) for i in range(2)], [0, 1], word=word)
    with pytest.raises(DataError, match="test split, row 1: word z is none of the 2 classes"):
        ready(tmp_path, label_column="word")


def test_splits_that_declare_other_classes_are_refused(tmp_path):
    for split, names in ("train", ["cat", "dog"]), ("test", ["dog", "cat"]):
        write(tmp_path / f"{split}.parquet", [encoded(picture(0))], [0], names=names)
    with pytest.raises(DataError, match="the test split must have 'img' and 'label', and the classes of the other"):
        ready(tmp_path)


@pytest.mark.parametrize("split", ["validation", "val", "validation[:50%]"])
def test_the_split_that_is_trained_on_never_stands_in_for_the_test(tmp_path, split):
    validation(tmp_path, [encoded(picture(i)) for i in range(9)])
    with pytest.raises(DataError, match="has no split 'test'"):
        ready(tmp_path, train_split=split)


@pytest.fixture(params=[{"string": "ada"}, {"class": "ada"}, {"int64": 1}], ids=lambda given: next(iter(given)))
def speakers(request, tmp_path):
    """Six files of three speakers in one split; the speaker and the row of each, and how one speaker is named."""
    ((kind, value),) = request.param.items()
    numbers = [0, 1, 2, 1, 0, 1]
    names = ["bob", "ada", "cy"]
    feature = datasets.ClassLabel(names=names) if kind == "class" else datasets.Value(kind)
    cells = [names[i] for i in numbers] if kind == "string" else numbers
    files = [encoded(picture(i)) for i in range(6)]
    write(tmp_path / "train.parquet", files, [0, 1, 2, 2, 1, 0], speaker=(feature, cells))
    return tmp_path, files, value


@pytest.mark.parametrize("cache_gb", [4.0, 0.0])
def test_a_held_out_speaker_is_evaluated_and_not_trained_on(speakers, cache_gb):
    path, files, value = speakers
    options = {"train_split": "train", "test_split": "train", "batch_size": 1, "cache_gb": cache_gb}
    data = ready(path, held_out={"speaker": value}, **options)
    for split, rows, labels in (data.train_set, [0, 2, 4], [0, 2, 1]), (data.test_set, [1, 3, 5], [1, 2, 0]):
        pixels, found = as_dataset(split).__getitems__(range(3))
        torch.testing.assert_close(pixels, torch.stack([pixels_of(files[i]) for i in rows]), rtol=0, atol=0)
        assert found.tolist() == labels
    assert data.groups == (["0", "2", "0"] if value == 1 else ["bob", "cy", "bob"])
    assert ready(path, held_out={"speaker": 0 if value == 1 else "bob"}, **options).fingerprint != data.fingerprint


def test_a_row_without_a_speaker_is_not_of_the_last_one(tmp_path):
    speaker = datasets.ClassLabel(names=["ada", "bob"]), [0, 0, 1, -1]
    write(tmp_path / "train.parquet", [encoded(picture(i)) for i in range(4)], [0, 1, 2, 0], speaker=speaker)
    data = ready(tmp_path, train_split="train", test_split="train", held_out={"speaker": "bob"})
    assert data.test_set[1].tolist() == [2]
    assert data.groups == ["ada", "ada", "-1"]


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ({"speaker": "eve"}, "held_out .speaker: eve. leaves no rows of the test split: its values are ada, bob"),
        ({"place": "hall"}, r"held_out must name a column of the train split \(img, label, speaker\), got 'place'"),
        ({"speaker": "ada", "place": 1}, "held_out must have one column"),
    ],
)
def test_wrong_held_out(tmp_path, held_out, message):
    for split in "train", "test":
        speaker = datasets.Value("string"), ["ada", "bob"]
        write(tmp_path / f"{split}.parquet", [encoded(picture(i)) for i in range(2)], [0, 1], speaker=speaker)
    with pytest.raises(ValueError, match=message):
        ready(tmp_path, held_out=held_out)


@pytest.mark.long
@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not at hand")
def test_cifar10():
    data = ready(CIFAR10, train_samples=500, test_samples=200, batch_size=50)
    rows = datasets.load_dataset("parquet", data_files=str(CIFAR10 / "test.parquet"), split="train")
    expected = {np.asarray(row["img"]).tobytes(): row["label"] for row in rows}
    assert torch.bincount(data.train_set[1]).tolist() == [50] * 10
    assert torch.bincount(data.test_set[1]).tolist() == [20] * 10
    for pixels, label in zip(data.test_set[0], data.test_set[1].tolist(), strict=True):
        assert expected[pixels.permute(1, 2, 0).numpy().tobytes()] == label
