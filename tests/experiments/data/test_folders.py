"""Local sets: which file is in which split and class, whatever folders and files are called."""

import io
import os
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

datasets = pytest.importorskip("datasets")

from diffstride.experiments.data import AudioData, DataError, ImageData  # noqa: E402

pytestmark = pytest.mark.usefixtures("cache")


def image(value):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def sound(value):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(80, 100 * value, np.int16), 8000, format="WAV")
    return buffer.getvalue()


KINDS = {
    "image": SimpleNamespace(noun="image", suffix=".png", content=image, data=ImageData, options={}),
    "sound": SimpleNamespace(
        noun="sound", suffix=".wav", content=sound, data=AudioData, options={"seconds": 0.01, "features": None}
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def fill(root, kind, folders):
    """Write two files into each folder; no two files have one content."""
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for j in (0, 1):
            (root / folder / f"{j}{kind.suffix}").write_bytes(kind.content(2 * i + j + 1))
    return root


def write(path, kind, values, labels, **more):
    """Write a parquet file without metadata of `datasets`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [{"bytes": kind.content(value), "path": None} for value in values]
    pq.write_table(pa.table({"file": files, "label": labels, **more}), path)


def ready(path, kind, **options):
    data = kind.data(str(path), **{"batch_size": 1, **kind.options, **options})
    data.setup()
    return data


def values(samples):
    """The contents of the files that samples come from."""
    return sorted({int(sample.max()) for sample in samples[0]})


def contents(data, kind):
    scale = 100 if kind.noun == "sound" else 1
    return [[value // scale for value in values(split)] for split in (data.train_set, data.test_set)]


@pytest.mark.parametrize(
    "classes",
    [("bus", "train"), ("test", "vase"), ("train_dog", "test_cat"), ("eval-board", "x"), ("Validation", "dev")],
)
def test_a_class_may_have_the_name_of_a_split(tmp_path, kind, classes):
    fill(tmp_path, kind, [f"{split}/{name}" for split in ("train", "test") for name in classes])
    data = ready(tmp_path, kind)
    assert contents(data, kind) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert data.classes == tuple(sorted(classes))


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("training", "testing"), ("TRAIN", "val"), ("train", "Dev"), ("train", "eval")],
)
def test_splits_have_their_usual_names_in_any_case(tmp_path, kind, train, test):
    fill(tmp_path, kind, [f"{split}/{name}" for split in (train, test) for name in "ab"])
    assert contents(ready(tmp_path, kind), kind) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    asked = ready(tmp_path, kind, train_split=train, test_split=test)
    assert contents(asked, kind) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_links_to_splits_classes_and_files_are_followed(tmp_path, kind):
    real = fill(tmp_path / "real", kind, ["a/x", "b/x", "c", "d"])
    root = tmp_path / "set"
    (root / "test").mkdir(parents=True)
    (root / "train").symlink_to(real / "a")
    (root / "test" / "x").symlink_to(real / "c")
    (root / "test" / "y").mkdir()
    (root / "test" / "y" / f"0{kind.suffix}").symlink_to(real / "d" / f"0{kind.suffix}")
    assert contents(ready(root, kind), kind) == [[1, 2], [5, 6, 7]]


@pytest.mark.parametrize("name", ["photos [2]", "photos ?", "photos *", "{1,2}", "a::b", "hf:", "%20", "-x", "train"])
@pytest.mark.parametrize("layout", ["classes", "parquet", "file"])
def test_a_name_in_the_path_is_no_pattern(tmp_path, layout, name):
    """Beside it lies what the name would match as a pattern."""
    kind = KINDS["image"]
    for folder, first in (tmp_path / name, 10), (tmp_path / "photos 2", 20), (tmp_path / "1", 30), (tmp_path / "a", 40):
        if layout == "classes":
            fill(folder, kind, ["train/a", "test/a"])
            (folder / "train" / "a" / "0.png").write_bytes(image(first))
        else:
            write(folder / "train.parquet", kind, [first, 2], [0, 1])
            write(folder / "test.parquet", kind, [3, 4], [0, 1])
    path = tmp_path / name / ("train.parquet" if layout == "file" else "")
    options = {"test_split": "train[1:]"} if layout == "file" else {}
    assert contents(ready(path, kind, **options), kind)[0] == [2, 10]


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_need_not_be_text(tmp_path, kind):
    fill(tmp_path, kind, ["train/a", "test/a"])
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / "train" / "a" / f"0{kind.suffix}").rename(tmp_path / "train" / "a" / f"{odd}\n{kind.suffix}")
    for split in ("train", "test"):
        (tmp_path / split / "a").rename(tmp_path / split / odd)
    for cache_gb in (4, 0):
        data = ready(tmp_path, kind, cache_gb=cache_gb)
        assert (data.classes, len(data.train_dataloader()), len(data.test_dataloader())) == ((odd,), 2, 2)


def test_hidden_files_and_other_files_are_left_out(tmp_path, kind):
    fill(tmp_path, kind, ["train/a", "test/a", ".cache/a", "train/.thumbnails"])
    for name in ("README.txt", "train/labels.csv", "train/a/notes.md", "train/a/Thumbs.db", "test/a/.DS_Store"):
        (tmp_path / name).write_bytes(b"not a file of the set")
    (tmp_path / f"cover{kind.suffix}").write_bytes(kind.content(99))
    for name in ("index.parquet", "test/a/features.parquet"):
        write(tmp_path / name, kind, [97, 98], [0, 1])
    assert contents(ready(tmp_path, kind), kind) == [[1, 2], [3, 4]]


def test_other_folders_of_classes_add_no_classes(tmp_path, kind):
    fill(tmp_path, kind, ["train/a", "test/a", "docs/figures", "fold [1]/b"])
    assert ready(tmp_path, kind).classes == ("a",)
    data = ready(tmp_path, kind, train_split="fold [1]", test_split="fold [1][:50%]")
    assert contents(data, kind) == [[7, 8], [7]]


def test_a_test_folder_without_classes_gives_way_to_validation(tmp_path, kind):
    fill(tmp_path, kind, ["train/a", "val/a", "test"])
    assert contents(ready(tmp_path, kind), kind) == [[1, 2], [3, 4]]


@pytest.mark.parametrize("link", ["split", "class", "file", "hard link", "table", "table of names"])
def test_a_file_in_both_splits_is_refused(tmp_path, kind, link):
    name = f"0{kind.suffix}"
    if link.startswith("table"):
        write(tmp_path / "train.parquet", kind, [1, 2], [0, 0])
        (tmp_path / "test.parquet").symlink_to("train.parquet")
        if link == "table of names":
            (tmp_path / name).write_bytes(kind.content(1))
            file = pa.array([{"bytes": None, "path": str(tmp_path / name)}], datasets.Image().pa_type)
            for split in ("train", "test"):
                (tmp_path / f"{split}.parquet").unlink()
                pq.write_table(pa.table({"file": file, "label": [0]}), tmp_path / f"{split}.parquet")
        name = "" if link == "table" else name
    else:
        fill(
            tmp_path, kind, ["train/a", "train/b"] + (["test/a", "test/c"] if "link" in link or link == "file" else [])
        )
        if link == "split":
            (tmp_path / "test").symlink_to("train")
        elif link == "class":
            (tmp_path / "test").mkdir()
            (tmp_path / "test" / "b").symlink_to(tmp_path / "train" / "a")
        elif link == "file":
            (tmp_path / "test" / "a" / f"9{kind.suffix}").symlink_to(tmp_path / "train" / "b" / name)
        else:
            os.link(tmp_path / "train" / "a" / name, tmp_path / "test" / "a" / f"9{kind.suffix}")
    with pytest.raises(DataError, match=r"of the train split and .* of the test split are one file: remove") as error:
        ready(tmp_path, kind)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    parts = {"train_split": "train[:50%]", "test_split": "train[50%:]"}
    if link != "table of names":
        assert len(ready(tmp_path, kind, **parts).test_set[1])  # of one split that the user divides


def test_a_link_to_a_folder_above_is_not_followed(tmp_path, kind):
    fill(tmp_path, kind, ["train/a", "test/a"])
    (tmp_path / "again").symlink_to(tmp_path)
    assert contents(ready(tmp_path, kind), kind) == [[1, 2], [3, 4]]


@pytest.mark.parametrize("name", ["train.csv", "metadata.jsonl"])
def test_tables_of_other_formats_are_named(tmp_path, kind, name):
    (tmp_path / name).write_text("file_name,label")
    with pytest.raises(
        DataError, match=rf"has no {kind.noun}s that are read \({name} is no parquet file\): it must be"
    ):
        ready(tmp_path, kind)


LAYOUTS = {
    "no splits": (
        ["cat", "dog"],
        r"outside of SPLIT/CLASS, at cat/0\.\w+: it must be a folder with train/<class>/<(\w+)>",
    ),
    "no classes": (["train", "test"], r"outside of SPLIT/CLASS, at test/0\.\w+"),
    "no folders": (["."], r"outside of SPLIT/CLASS, at 0\.\w+"),
    "one level too many": (["set/train/cat", "set/test/cat"], r"outside of SPLIT/CLASS, at set/test/cat/0\.\w+"),
    "nested classes": (["train/a", "train/b/c", "test/a"], r"outside of SPLIT/CLASS, at train/b/c/0\.\w+"),
    "deeply nested classes": (["train/a", "train/b/c/d/e/f/g", "test/a"], r"outside .*, at train/b/c/d/e/f/g/0\.\w+"),
    "all too deep": (["a/b/c/d/e/f"], r"outside of SPLIT/CLASS, at a/b/c/d/e/f/0\.\w+"),
    "beside classes": (["train/a", "train", "test/a"], r"outside of SPLIT/CLASS, at train/0\.\w+"),
    "flat test": (["train/a", "test"], r"outside of SPLIT/CLASS, at test/0\.\w+"),
    "no test": (["train/a", "train/b"], r"has no split 'test', only train: add a folder test/<class>/<\w+>"),
    "no train": (["test/a"], r"has no split 'train', only test: add a folder train/<class>/<\w+>"),
    "other splits": (
        ["fold1/a", "fold2/a"],
        r"no split 'train': set train_split and test_split to two of fold1, fold2",
    ),
    "twice": (["Train/a", "train/a", "test/a"], r"two folders for the train split: remove or rename train"),
    "two words": (["train/a", "val/a", "valid/a"], r"two folders for the validation split: remove or rename valid"),
    "nothing": ([], r"has no (\w+)s: it must be a folder with train\.parquet and test\.parquet, or with"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_is_not_understood_is_described(tmp_path, kind, layout):
    folders, message = LAYOUTS[layout]
    fill(tmp_path, kind, folders)
    with pytest.raises(DataError, match=message) as error:
        ready(tmp_path, kind)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "test_split to train" not in str(error.value)


@pytest.mark.parametrize(("noun", "name"), [("image", "photo.heic"), ("image", "drawing.svg"), ("sound", "song.m4a")])
def test_a_file_of_another_format_is_not_passed_over(tmp_path, noun, name):
    fill(tmp_path, KINDS[noun], ["train/a", "test/a"])
    (tmp_path / "train" / "a" / name).write_bytes(b"content")
    with pytest.raises(DataError, match=rf"is no {noun} format that is read: convert or remove train/a/{name}"):
        ready(tmp_path, KINDS[noun])


TABLES = {
    "data": ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    "configuration": ["plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"],
    "folders": ["train/0.parquet", "test/0.parquet"],
    "prefix": ["digits_train.parquet", "digits-test.parquet"],
    "case": ["Train.parquet", "VAL.parquet"],
    "pictures beside": ["train.parquet", "test.parquet", "assets/a.png", "assets/examples/b.png", "c.wav"],
}


@pytest.mark.parametrize("names", TABLES.values(), ids=TABLES)
def test_parquet_files_of_splits(tmp_path, kind, names):
    for i, name in enumerate(names):
        write(tmp_path / name, kind, [2 * i + 1, 2 * i + 2], [0, 1])
    assert contents(ready(tmp_path, kind), kind) == [[1, 2], [3, 4]]


WRONG_TABLES = {
    "several sets": (
        ["a/train.parquet", "a/test.parquet", "b/train.parquet"],
        "has several sets: give the path of one of",
    ),
    "root and data": (["train.parquet", "data/train.parquet"], "has several sets: give the path of one of"),
    "two splits": (["train_test.parquet"], r"train_test\.parquet has two splits, test, train: rename it"),
    "two words": (["train.parquet", "val.parquet", "dev.parquet"], "two names for the validation split"),
    "one": (["some.parquet"], r"has no split 'test', only train: add test\.parquet, or set .* parts of one, such as"),
}


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_parquet_files_that_could_be_any_split_are_not_guessed(tmp_path, case):
    names, message = WRONG_TABLES[case]
    for name in names:
        write(tmp_path / name, KINDS["image"], [1, 2], [0, 1])
    with pytest.raises(DataError, match=message):
        ready(tmp_path, KINDS["image"])


def test_shards_may_differ_in_order_and_width_of_columns_but_not_in_classes(tmp_path):
    kind = KINDS["image"]
    write(tmp_path / "train-00000-of-00002.parquet", kind, [1, 2], pa.array([0, 1], pa.int64()), more=["x", "y"])
    files = [{"bytes": image(value), "path": None} for value in (3, 4)]
    shard = pa.table({"more": pa.nulls(2), "label": pa.array([1, 0], pa.int8()), "file": files})
    pq.write_table(shard, tmp_path / "train-00001-of-00002.parquet")
    write(tmp_path / "test.parquet", kind, [5, 6], [0, 1])
    data = ready(tmp_path, kind, label_column="label")
    assert contents(data, kind) == [[1, 2, 3, 4], [5, 6]]
    assert data.train_set[1].tolist() == [0, 1, 1, 0]

    for split, names in ("train", ["cat", "dog"]), ("test", ["dog", "cat"]):
        features = datasets.Features({"file": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        columns = {"file": [{"bytes": image(9), "path": None}], "label": [0]}
        for place in (tmp_path / "splits" / f"{split}.parquet", tmp_path / "shards" / f"train-{split}-0.parquet"):
            place.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_dict(columns, features=features).to_parquet(place)
    with pytest.raises(DataError, match="the test split declares other classes than train in column 'label'"):
        ready(tmp_path / "splits", kind)
    for i, name in enumerate(("train-train-0", "train-test-0")):
        (tmp_path / "shards" / f"{name}.parquet").rename(tmp_path / "shards" / f"train-{i}.parquet")
    with pytest.raises(DataError, match=r"train-1.parquet \(its classes are not those of train-0.parquet\)"):
        ready(tmp_path / "shards", kind, test_split="train")


def test_categories_of_pandas_are_classes(tmp_path):
    labels = pa.array(["dog", "cat"]).dictionary_encode()
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", KINDS["image"], [1, 2], labels)
    data = ready(tmp_path, KINDS["image"])
    assert (data.classes, data.train_set[1].tolist()) == (("cat", "dog"), [1, 0])


CHOICES = [
    ({"label": ["cat", "dog"], "id": [0, 1]}, "label", ("cat", "dog")),
    ({"class": ["cat", "dog"], "__index_level_0__": [0, 1]}, "class", ("cat", "dog")),
    ({"Label": ["cat", "dog"], "width": [8, 8]}, "Label", ("cat", "dog")),
    ({"label": [True, False], "id": [0, 1]}, "label", ("False", "True")),
    ({"label": [7, 9], "name": ["x", "y"]}, "label", ("7", "9")),
    ({"digit": [7, 9]}, "digit", ("7", "9")),
    ({"digit": [7, 9], "id": [0, 1]}, None, "columns digit, id could all be the label_column: set label_column to one"),
    ({"animal": ["cat", "dog"], "id": [0, 1]}, None, "columns id, animal could all be the label_column"),
    (
        {"animal": ["cat", "dog"]},
        None,
        "no column looks like the label_column: set label_column to animal$",
    ),
    (
        {"animal": ["cat", "dog"], "caption": ["x", "y"], "score": [0.5, 1.5]},
        None,
        "no column looks like the label_column: set label_column to one of animal, caption$",
    ),
    ({"score": [0.5, 1.5]}, None, "no column looks like the label_column: set label_column to one of file, score$"),
    ({"label": [0.5, 1.5], "id": [0, 1]}, None, "labels of the train split are float64, not classes"),
    ({"label": [[0], [1]], "id": [0, 1]}, None, "column 'label' holds no classes"),
    ({"label": [0, 1], "class": [0, 1]}, None, "columns label, class could all be the label_column"),
]


@pytest.mark.parametrize(("columns", "chosen", "expected"), CHOICES)
def test_labels_are_in_the_column_of_the_usual_name_or_in_the_only_one_that_fits(tmp_path, columns, chosen, expected):
    for split in ("train", "test"):
        table = {"file": [{"bytes": image(value), "path": None} for value in (1, 2)], **columns}
        pq.write_table(pa.table(table), tmp_path / f"{split}.parquet")
    if chosen is None:
        with pytest.raises(DataError, match=expected):
            ready(tmp_path, KINDS["image"])
    else:
        data = ready(tmp_path, KINDS["image"])
        assert data.classes == expected
        assert [data.classes[i] for i in data.train_set[1]] == [str(value) for value in columns[chosen]]


@pytest.mark.parametrize("split", ["validation", "val", "validation[:50%]"])
def test_the_split_that_is_trained_on_never_stands_in_for_the_test(tmp_path, kind, split):
    for name in ("train", "validation"):
        write(tmp_path / f"{name}.parquet", kind, [1, 2], [0, 1])
    with pytest.raises(
        DataError, match="has no split 'test': set train_split and test_split to two of train, validation"
    ):
        ready(tmp_path, kind, train_split=split)


def test_validation_stands_in_for_a_test_without_labels_only(tmp_path, kind):
    for i, name in enumerate(("train", "validation")):
        write(tmp_path / f"{name}.parquet", kind, [2 * i + 1, 2 * i + 2], [0, 1])
    for labels in ([-1, -1], pa.nulls(2, pa.int64())):
        write(tmp_path / "test.parquet", kind, [5, 6], labels)
        assert contents(ready(tmp_path, kind), kind) == [[1, 2], [3, 4]]
    pq.write_table(pa.table({"file": [{"bytes": kind.content(5), "path": None}]}), tmp_path / "test.parquet")
    assert contents(ready(tmp_path, kind), kind) == [[1, 2], [3, 4]]
    write(tmp_path / "test.parquet", kind, [5, 6], pa.array([0, None]))
    with pytest.raises(DataError, match="column 'label' of the test split has missing values"):
        ready(tmp_path, kind)


@pytest.mark.parametrize("part", ["train[:150%]", "train[5:]", "train[a:b]", "train[1:1]", "train[]", "train[:50%"])
def test_a_part_that_there_is_not_is_refused(tmp_path, kind, part):
    fill(tmp_path, kind, ["train/a", "test/a"])
    with pytest.raises(DataError, match=r"no part of a split of 2 rows|has no split|is empty") as error:
        ready(tmp_path, kind, test_split=part)
    assert "\n" not in str(error.value)


def test_a_set_of_the_hub_has_the_splits_that_its_builder_has(tmp_path, kind, monkeypatch):
    write(tmp_path / "train.parquet", kind, [1, 2, 3, 4], [0, 1, 0, 1])
    pq.ParquetWriter(tmp_path / "extra.parquet", pq.read_schema(tmp_path / "train.parquet")).close()
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "extra")}
    builder = datasets.load_dataset_builder("parquet", data_files=files)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda **options: builder)
    halves = {"train_split": "train[:50%]", "test_split": "train[50%:]"}
    for cache_gb in (4, 0):
        data = ready("someone/something", kind, cache_gb=cache_gb, **halves)
        assert len(data.train_dataloader()) == len(data.test_dataloader()) == 2
        assert data.fingerprint == ready("someone/something", kind, cache_gb=cache_gb, **halves).fingerprint
    assert contents(ready("someone/something", kind, **halves), kind) == [[1, 2], [3, 4]]
    with pytest.raises(DataError, match="no split 'test': set train_split and test_split to two of train, extra"):
        ready("someone/something", kind)
    with pytest.raises(DataError, match="the extra split of someone/something is empty"):
        ready("someone/something", kind, test_split="extra")
