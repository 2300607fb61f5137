"""Time series: values and classes are those of the files, in each format of the archives."""

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from diffstride.experiments.data import DataError, SeriesData
from tests.helpers.datasets import epoch

HEADER = "#A comment: with a colon\n@problemName Toy\n@classLabel true a b\n@data\n"


def ts(series, label):
    return ":".join(",".join(map(str, channel)) for channel in series) + f":{label}"


def tsv(series, label):
    return "\t".join([label, *map(str, series[0])])


def old_text(series, label):
    return "   ".join(f"{value:.7e}" for value in [float(label), *series[0]])


def archive(path, suffix, row, channels=1, labels=("10", "2", "2", "10"), length=6, tests=3):
    """Write a set of the archive, and return the values of both splits."""
    path.mkdir()
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, (len(labels) + tests, channels, length)).astype(np.float32)
    for split, chosen in ("TRAIN", range(len(labels))), ("TEST", range(len(labels), len(values))):
        lines = [row(values[i].tolist(), labels[i % len(labels)]) for i in chosen]
        text = (HEADER if suffix == ".ts" else "") + "\n".join(lines) + "\n"
        (path / f"{path.name}_{split}{suffix}").write_text(text)
    return values[: len(labels)], values[len(labels) :]


@pytest.mark.parametrize(
    ("suffix", "row", "channels"), [(".ts", ts, 1), (".ts", ts, 3), (".tsv", tsv, 1), (".txt", old_text, 1)]
)
def test_formats(tmp_path, suffix, row, channels):
    expected = archive(tmp_path / "Toy", suffix, row, channels)
    data = SeriesData(str(tmp_path / "Toy"), batch_size=4)
    data.setup()
    assert data.classes == ("2", "10")
    assert data.sample_shape == (channels, 6)
    for (inputs, labels), own in (data.train_set, expected[0]), (data.test_set, expected[1]):
        torch.testing.assert_close(inputs, torch.from_numpy(own), rtol=1e-6, atol=1e-6)
        assert labels.tolist() == [[1, 0, 0, 1][i] for i in range(len(own))]
    batch, _ = data.prepare_batch(epoch(data)[0], step=0)
    torch.testing.assert_close(batch.mean((0, 2)), torch.zeros(channels), rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.std((0, 2), correction=0), torch.ones(channels), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,3,4,5:2", r"line 9: its size is \(1, 5\), but the first is \(1, 6\): use the version"),
        ("1,2,3,4,5,?:2", "line 9: could not convert string to float: '\\?'"),
        ("1,2,3,4,5,nan:2", "line 9: a value is missing or infinite"),
        ("1,2,3,4,5,6:7", "class 7 of the test split is none of the 2 classes"),
    ],
)
def test_wrong_files(tmp_path, line, message):
    archive(tmp_path / "Toy", ".ts", ts, tests=4)
    with open(tmp_path / "Toy" / "Toy_TEST.ts", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        SeriesData(str(tmp_path / "Toy")).setup()


def test_classes_in_words(tmp_path):
    archive(tmp_path / "Toy", ".tsv", tsv, labels=("healthy", "ill", "ill", "healthy"))
    data = SeriesData(str(tmp_path / "Toy"))
    data.setup()
    assert data.classes == ("ill", "healthy")
    assert data.train_set[1].tolist() == [1, 0, 0, 1]


def test_a_folder_that_is_no_set(tmp_path):
    with pytest.raises(DataError, match=r"has no Toy_TRAIN\.ts, \.tsv or \.txt: set data.path"):
        SeriesData(str(tmp_path / "Toy")).setup()
