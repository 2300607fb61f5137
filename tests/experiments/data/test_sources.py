"""Sources of sets: local paths and the hub, names and parts of splits, and the columns of files and classes."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.datasets import encoded, image_set, picture, pixels_of, ready, write

datasets = pytest.importorskip("datasets")

from diffstride.experiments.data import DataError  # noqa: E402

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(tmp_path):
    return image_set(tmp_path / "set")


def test_one_parquet_file_without_the_hubs_metadata(tmp_path):
    contents = [encoded(picture(i)) for i in range(6)]
    table = pa.table({"image": [{"bytes": c, "path": None} for c in contents], "class": [3, 7, 9, 3, 7, 9]})
    pq.write_table(table, tmp_path / "some.parquet")
    data = ready(tmp_path / "some.parquet", test_split="train[:50%]")
    assert torch.equal(data.train_set[0], torch.stack([pixels_of(content) for content in contents]))
    assert data.train_set[1].tolist() == [0, 1, 2, 0, 1, 2]
    assert data.num_classes == 3
    assert torch.equal(data.test_set[0], data.train_set[0][:3])


def test_files_of_a_split_that_name_other_classes_are_refused(tmp_path):
    """`datasets` reads all files by the class names of the first, so that labels of the others would be wrong."""
    for i, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        write(tmp_path / f"train-{i}.parquet", [encoded(picture(i))], [0], names=names)
    with pytest.raises(DataError, match=r"files of split 'train' in .* must have the same columns and classes"):
        ready(tmp_path, test_split="train[:50%]")


CHOICES = [
    ({"label": ["cat", "dog"], "id": [0, 1]}, "label", ("cat", "dog")),
    ({"Class": ["cat", "dog"], "__index_level_0__": [0, 1]}, "Class", ("cat", "dog")),
    ({"label": [True, False], "id": [0, 1]}, "label", ("False", "True")),
    ({"label": [7, 10], "name": ["x", "y"]}, "label", ("7", "10")),
    ({"digit": [7, 9]}, "digit", ("7", "9")),
    ({"digit": [7, 9], "id": [0, 1]}, None, "set label_column to one of digit, id"),
    ({"animal": ["cat", "dog"], "id": [0, 1]}, None, "set label_column to one of id, animal"),
    ({"animal": ["cat", "dog"]}, None, "set label_column to one of animal"),
    ({"label": [0.5, 1.5], "id": [0, 1]}, None, "'label' cannot be the label_column: set label_column to one of id"),
    ({"label": [[0], [1]], "id": [0, 1]}, None, "'label' cannot be the label_column: set label_column to one of id"),
    ({"label": [0, None], "id": [0, 1]}, None, "row 1: label None is none of the 1 classes"),
]


@pytest.mark.parametrize(("columns", "chosen", "expected"), CHOICES)
def test_labels_are_in_the_column_of_the_usual_name_or_in_the_only_one_that_fits(tmp_path, columns, chosen, expected):
    for split in ("train", "test"):
        table = {"file": [{"bytes": encoded(picture(value)), "path": None} for value in (1, 2)], **columns}
        pq.write_table(pa.table(table), tmp_path / f"{split}.parquet")
    if chosen is None:
        with pytest.raises(DataError, match=expected):
            ready(tmp_path, batch_size=1)
    else:
        data = ready(tmp_path, batch_size=1)
        assert data.classes == expected
        assert [data.classes[i] for i in data.train_set[1]] == [str(value) for value in columns[chosen]]


@pytest.mark.parametrize("part", ["train[:150%]", "train[50:]", "train[a:b]", "train[1:1]", "train[]", "train[:50%"])
def test_a_part_that_does_not_exist_is_refused(folder, part):
    with pytest.raises(DataError, match=r"\A.* is no part of the 30 rows|has no split .*\Z"):
        ready(folder.path, test_split=part)


def test_splits_of_the_hub(folder, monkeypatch):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_parquet(str(folder.path / "train.parquet")))
    monkeypatch.setattr(datasets, "load_dataset", lambda **options: splits)
    halves = {"train_split": "train[:50%]", "test_split": "train[50%:]"}
    for cache_gb in (4, 0):
        data = ready("someone/something", cache_gb=cache_gb, **halves)
        assert (len(data.train_dataloader()), len(data.test_dataloader())) == (3, 4)
        assert data.fingerprint == ready("someone/something", cache_gb=cache_gb, **halves).fingerprint
    assert torch.equal(ready("someone/something", **halves).test_set[0][0], pixels_of(folder.train[15]))
    with pytest.raises(DataError, match=r"no split 'test', only train: add it, or set .* parts of one"):
        ready("someone/something")


def test_the_hub_out_of_reach(monkeypatch):
    def unreachable(**options):
        assert options == {"path": "someone/something", "name": None}
        raise ConnectionError("Couldn't reach the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"from the hub \(Couldn't reach the Hub and a long story\): .* or give a local path"
    ):
        ready("someone/something")


def test_a_local_folder_is_not_taken_for_the_hubs_set_of_its_name(folder, monkeypatch):
    ready(folder.path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"could not load 'set' from the hub \("):
        ready(folder.path.name)


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/no-where-at-all", "nowhere.parquet"])
def test_a_missing_path(path):
    with pytest.raises(DataError, match="does not exist: check the path"):
        ready(path)


def test_paths_that_hold_no_set(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    for name in ("text.txt", "broken.parquet"):
        with pytest.raises(DataError, match=f"could not read .*{name} .*: it must be a readable .parquet file"):
            ready(tmp_path / name)
