"""Local folders: the split and the class of each file, whatever folders and files are called."""

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.datasets import encoded, ready

pytest.importorskip("datasets")

from diffstride.experiments.data import DataError

pytestmark = pytest.mark.usefixtures("cache")


def image(value):
    return encoded(PIL.Image.fromarray(np.full((4, 4, 3), value, np.uint8)))


def fill(root, folders):
    """Write two files into each folder; no two files have one content."""
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for j in (0, 1):
            (root / folder / f"{j}.png").write_bytes(image(2 * i + j + 1))
    return root


def write(path, values, labels):
    """Write a parquet file without metadata of `datasets`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"file": [{"bytes": image(v), "path": None} for v in values], "label": labels}), path)


def contents(path, **options):
    """Return the values of the images of both splits."""
    data = ready(path, batch_size=1, **options)
    return [sorted(int(sample.max()) for sample in split[0]) for split in (data.train_set, data.test_set)]


@pytest.mark.parametrize(
    "classes",
    [("bus", "train"), ("test", "vase"), ("test_cat", "train_dog"), ("eval-board", "x"), ("dev", "validation")],
)
def test_a_class_may_have_the_name_of_a_split(tmp_path, classes):
    fill(tmp_path, [f"{split}/{name}" for split in ("train", "test") for name in classes])
    assert contents(tmp_path) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert ready(tmp_path).classes == classes


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "val")])
def test_splits_have_their_usual_names_in_any_case(tmp_path, train, test):
    fill(tmp_path, [f"{split}/{name}" for split in (train, test) for name in "ab"])
    assert contents(tmp_path) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert contents(tmp_path, train_split=train, test_split=test) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_links_to_splits_classes_and_files_are_followed(tmp_path):
    real = fill(tmp_path / "real", ["a/x", "b/x", "c", "d"])
    root = tmp_path / "set"
    (root / "test" / "y").mkdir(parents=True)
    (root / "train").symlink_to(real / "a")
    (root / "test" / "x").symlink_to(real / "c")
    (root / "test" / "y" / "0.png").symlink_to(real / "d" / "0.png")
    assert contents(root) == [[1, 2], [5, 6, 7]]


@pytest.mark.parametrize("name", ["photos [2]", "photos ?", "photos *", "{1,2}", "hf:", "%20", "-x", "train"])
@pytest.mark.parametrize("layout", ["classes", "parquet", "file"])
def test_a_name_in_the_path_is_no_pattern(tmp_path, layout, name):
    """Beside it lies what the name would match as a pattern."""
    for folder, first in (tmp_path / name, 10), (tmp_path / "photos 2", 20), (tmp_path / "1", 30):
        if layout == "classes":
            fill(folder, ["train/a", "test/a"])
            (folder / "train" / "a" / "0.png").write_bytes(image(first))
        else:
            write(folder / "train.parquet", [first, 2], [0, 1])
            write(folder / "test.parquet", [3, 4], [0, 1])
    path = tmp_path / name / ("train.parquet" if layout == "file" else "")
    assert contents(path, **({"test_split": "train[1:]"} if layout == "file" else {}))[0] == [2, 10]


def test_hidden_files_and_other_files_are_left_out(tmp_path):
    fill(tmp_path, ["train/a", "test/a", ".cache/a", "train/.thumbnails"])
    for name in ("README.txt", "train/labels.csv", "train/a/notes.md", "train/a/Thumbs.db", "test/a/.DS_Store"):
        (tmp_path / name).write_bytes(b"not a file of the set")
    (tmp_path / "cover.png").write_bytes(image(99))
    for name in ("index.parquet", "test/a/features.parquet"):
        write(tmp_path / name, [97, 98], [0, 1])
    assert contents(tmp_path) == [[1, 2], [3, 4]]


def test_other_folders_of_classes_add_no_classes(tmp_path):
    fill(tmp_path, ["train/a", "test/a", "docs/figures", "fold [1]/b"])
    assert ready(tmp_path, batch_size=1).classes == ("a",)
    assert contents(tmp_path, train_split="fold [1]", test_split="fold [1][:50%]") == [[7, 8], [7]]


def test_validation_replaces_a_test_folder_without_classes(tmp_path):
    fill(tmp_path, ["train/a", "val/a", "test"])
    assert contents(tmp_path) == [[1, 2], [3, 4]]


LAYOUTS = {
    "no splits": (["cat", "dog"], r"cat/0\.png outside of SPLIT/CLASS: it must be a folder with .* train/<class>"),
    "no classes": (["train", "test"], r"test/0\.png outside of SPLIT/CLASS"),
    "one level too many": (["set/train/cat", "set/test/cat"], r"set/test/cat/0\.png outside of SPLIT/CLASS"),
    "nested classes": (["train/a", "train/b/c", "test/a"], r"train/b/c/0\.png outside of SPLIT/CLASS"),
    "beside classes": (["train/a", "train", "test/a"], r"train/0\.png outside of SPLIT/CLASS"),
    "flat test": (["train/a", "test"], r"no split 'test', only train: add it"),
    "no train": (["test/a"], r"has no split 'train', only test: add it"),
    "other splits": (["fold1/a", "fold2/a"], r"no split 'train', only fold1, fold2: add it, or set train_split"),
    "twice": (["Train/a", "train/a", "test/a"], r"two names for a split: rename or remove train/a/0\.png"),
    "two words": (["train/a", "val/a", "valid/a"], r"two names for a split: rename or remove valid/a/0\.png"),
    "nothing": ([], r"has no image files: it must be a folder with train\.parquet and test\.parquet, or with"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_is_not_understood_is_described(tmp_path, layout):
    folders, message = LAYOUTS[layout]
    fill(tmp_path, folders)
    with pytest.raises(DataError, match=rf"\A{tmp_path} .*{message}"):
        ready(tmp_path)


@pytest.mark.parametrize("name", ["photo.heic", "drawing.svg"])
def test_a_file_of_another_format_is_not_passed_over(tmp_path, name):
    fill(tmp_path, ["train/a", "test/a"])
    (tmp_path / "train" / "a" / name).write_bytes(b"content")
    with pytest.raises(DataError, match=rf"train/a/{name}\): not a readable image file .*: repair or remove it"):
        ready(tmp_path)


TABLES = {
    "data": ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    "configuration": ["plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"],
    "folders": ["train/0.parquet", "test/0.parquet"],
    "prefix": ["digits_train.parquet", "digits-test.parquet"],
    "case": ["Train.parquet", "VAL.parquet"],
    "pictures beside": ["train.parquet", "test.parquet", "assets/a.png", "assets/examples/b.png"],
}


@pytest.mark.parametrize("names", TABLES.values(), ids=TABLES)
def test_parquet_files_of_splits(tmp_path, names):
    for i, name in enumerate(names):
        if name.endswith("png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(image(99))
        else:
            write(tmp_path / name, [2 * i + 1, 2 * i + 2], [0, 1])
    assert contents(tmp_path) == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/train.parquet", "a/test.parquet", "b/train.parquet"], "has several sets: give the path of one of .*/a, "),
        (["a/some.parquet", "b/some.parquet"], "has several sets"),
        (["train_test.parquet"], r"two names for a split: rename or remove train_test\.parquet"),
        (["train.parquet", "val.parquet", "dev.parquet"], "two names for a split: rename or remove val"),
        (["some.parquet"], r"has no split 'test', only train: add it, or set .* parts of one with shuffled rows"),
    ],
)
def test_parquet_files_that_could_be_any_split_are_not_guessed(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, [1, 2], [0, 1])
    with pytest.raises(DataError, match=message):
        ready(tmp_path)
