"""Sets of files with one class each: labels, subsets, decoding, a cache of decoded samples, streaming."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffstride.experiments.data import cache
from diffstride.experiments.data.base import Batch, BatchDataset, ClassificationData, DataError
from diffstride.experiments.data.folders import canonical
from diffstride.experiments.data.hashing import digest
from diffstride.experiments.data.sources import ROWS, Array, Decoder, Source, base_and_part, columns, open_source

if TYPE_CHECKING:
    import datasets


class HubData(ClassificationData):
    """Base of sets of files with one class each, from a name on the hub or from local files.

    A subclass has a `decoder`, and implements `check_splits` and `statistics`.

    Args:
        path: a name on the hub (`cifar10`), or a local path, from which nothing is downloaded: a folder with
            `train.parquet` and `test.parquet` (or the hub's `train-00000-of-00001.parquet`, also under `data/`), a
            folder of files (`train/<class>/*.png`), or one parquet file, whose only split is `train`.
        column: the column of files. The default is the only one of its type.
        label_column: the column of classes. The default is the one called `label` or `class`, or the only one of its
            type.
        train_split: the split to train on, or a part of one, such as `train[:90%]`.
        test_split: the split to evaluate on. Where the set has no `test` or leaves it unlabelled (ImageNet), its
            `validation` split is used.
        batch_size: samples per batch and rank.
        train_samples: train on a random subset of this many samples, with classes as equal in number as they can be. It
            depends on the seed alone, and a smaller subset is a part of a larger one. The default is all of them.
        test_samples: the same for the test split.
        cache_gb: decode once and keep, if both splits take no more than this many gigabytes decoded; else stream.
        num_workers: processes that decode streamed files. Cached sets need none.
        seed: seed of the subset, the order and the augmentation.
        subset: the hub's name for one of several configurations of a set; rarely needed.
    """

    decoder: Decoder

    def __init__(
        self,
        path: str,
        column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
        batch_size: int = 128,
        train_samples: int | None = None,
        test_samples: int | None = None,
        cache_gb: float = 4.0,
        num_workers: int = 0,
        seed: int = 0,
        subset: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.path, self.subset, self.cache_gb = os.fspath(path), subset, cache_gb
        self.column, self.label_column = column, label_column
        self.train_split, self.test_split = train_split, test_split
        self.train_samples, self.test_samples = train_samples, test_samples

    def check_splits(self, train: Split, test: Split) -> None:
        """Check the splits, and set `sample_shape`, before anything but the first file is decoded."""
        raise NotImplementedError

    def statistics(self, train: Split, decoded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of each channel, from samples that are decoded or from a stream."""
        raise NotImplementedError

    def read(self, file: Path) -> Tensor:
        """Return one raw sample from a file on disk."""
        try:
            with open(file, "rb") as content:
                return torch.from_numpy(self.decoder(content))
        except DataError as error:
            raise DataError(f"{file}: not a readable {self.decoder.media} file ({error})") from error
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error

    def load(self) -> None:
        """Find the splits, columns and classes. Then decode, or open the cache, or stream."""
        source = open_source(self.path, self.subset, self.decoder, (self.train_split, self.test_split))
        train_rows = source.split(self.train_split)
        column, label = columns(train_rows.features, self.decoder.media, self.column, self.label_column)
        feature = train_rows.features[label]
        declared = getattr(feature, "names", None)
        classes = range(len(declared)) if declared else sorted(set(train_rows[label][:]) - {None})
        self.classes = tuple(map(str, declared or classes))
        self.num_classes = len(classes)
        test_split = self._test_split(source, label)
        splits = []
        for name, samples in (self.train_split, self.train_samples), (test_split, self.test_samples):
            rows = source.split(name)
            if {column, label} - set(rows.features):
                raise DataError(f"the {name} split has no columns {column} and {label}: set test_split to another one")
            if getattr(rows.features[label], "names", None) != declared:
                raise DataError(f"the {name} split declares other classes than {self.train_split} in column {label!r}")
            labels = _class_indices(rows[label][:], classes, name, label)
            chosen = _balanced_subset(labels, samples, self.seed, name)
            splits.append(Split(rows, name, column, chosen, labels[chosen], self.decoder))
        train, test = splits
        self.check_splits(train, test)
        if sum(len(split) * split.first.nbytes for split in splits) <= self.cache_gb * 1e9:
            keys = [split.content_key() for split in splits]
            inputs, tests = (torch.from_numpy(_decoded(split, key)) for split, key in zip(splits, keys, strict=True))
            self.train_set, self.test_set = (inputs, train.labels), (tests, test.labels)
            self.num_workers = 0
            self.mean, self.std = self.statistics(train, inputs[:: max(1, len(train) // 10_000)])
        else:
            self.train_set, self.test_set = train, test
            keys = [digest(source.key(split.name), self.decoder.key, split.chosen.tolist()) for split in splits]
            self.mean, self.std = self.statistics(train, None)
        self.fingerprint = digest(*keys, train.labels, test.labels, list(classes))

    def _test_split(self, source: Source, label: str) -> str:
        """Return the name of the test split: `validation` where `test` is missing or has no labels."""
        free = canonical(base_and_part(self.train_split)[0]) != "validation"  # not trained on
        if free and canonical(self.test_split) == "test" and "validation" in source.names:
            if "test" not in source.names:
                return "validation"
            rows = source.split("test")
            if label not in rows.features or set(rows[label][:]) <= {None, -1}:
                return "validation"
        return self.test_split


def _class_indices(labels: Sequence[Any], classes: Sequence[Any], split: str, column: str) -> npt.NDArray[np.int64]:
    index = {value: i for i, value in enumerate(classes)}
    found = [index.get(label, -1) for label in labels]
    if -1 in found:
        row = found.index(-1)
        raise DataError(
            f"{split} split, row {row}: {column} {labels[row]} is none of the {len(classes)} classes: "
            "set label_column or the split to another one, or remove the row"
        )
    return np.array(found, dtype=np.int64)


def _balanced_subset(labels: npt.NDArray[np.int64], size: int | None, seed: int, split: str) -> npt.NDArray[np.int64]:
    """Return rows in order. Classes take turns in a random order until `size` rows are found.

    A smaller subset is a part of a larger one. `train_test_split` of `datasets` does not have this property.
    """
    if size is None:
        return np.arange(len(labels))
    if not 1 <= size <= len(labels):
        raise DataError(f"the {split} split has {len(labels)} samples, not {size}: change its number of samples")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = labels[shuffled] == label
        turn[members] = np.arange(members.sum())
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:size]])


class Split(BatchDataset):
    """The chosen rows of one split, with their files still compressed. A stream decodes them batch by batch."""

    def __init__(
        self,
        rows: datasets.Dataset,
        name: str,
        column: str,
        chosen: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        decoder: Decoder,
    ) -> None:
        self.name, self.column, self.chosen, self.decoder = name, column, chosen, decoder
        self.labels = torch.from_numpy(labels)
        self.rows = rows.select_columns([column]).with_format("arrow")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.chosen)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Decode the files at `indices`."""
        arrays = np.stack(list(self.decode(indices)))
        return torch.from_numpy(arrays), self.labels[torch.as_tensor(indices)]

    def read(self, places: Sequence[int] | range, function: Callable[[BinaryIO], Any]) -> Iterator[tuple[str, Any]]:
        """Yield the row and a function's result of the open file, for each of some places of the subset."""
        numbers = self.chosen[np.asarray(places)].tolist()
        contiguous = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        table = self.rows[slice(numbers[0], numbers[-1] + 1) if contiguous else numbers]
        for number, value in zip(numbers, table.column(self.column).to_pylist(), strict=True):
            entry = value if isinstance(value, dict) else {"bytes": value}
            path, content = entry.get("path") or "", entry.get("bytes")
            row = f"{self.name} split, row {number}" + (f" ({path})" if path else "")
            try:
                with open(path, "rb") if content is None else io.BytesIO(content) as file:
                    found = function(file)
            except (DataError, OSError) as error:
                cause = getattr(error, "strerror", None) or error
                media = self.decoder.media
                raise DataError(f"{row}: not a readable {media} file ({cause}): repair or remove it") from error
            yield row, found

    @cached_property
    def first(self) -> Array:
        """The first decoded sample. All must have its shape and type."""
        return next(found for _, found in self.read([0], self.decoder))

    def decode(self, places: Sequence[int] | range) -> Iterator[Array]:
        """Yield the samples at some places of the subset. All are of one shape."""
        for row, array in self.read(places, self.decoder):
            if array.shape != self.first.shape:
                sizes = " but the first is ".join("x".join(map(str, a.shape[1:])) for a in (array, self.first))
                raise DataError(f"{row}: its size is {sizes}: set image_size so that all are resized")
            yield array

    def content_key(self) -> str:
        """Return a digest of the files' bytes and of how they are decoded: the same on every machine."""
        total = hashlib.sha256(f"{self.decoder.key} {len(self)}".encode())
        for places in _blocks(len(self)):
            for _, found in self.read(places, cache.sha256):
                total.update(found)
        return total.hexdigest()[:32]


def _decoded(split: Split, key: str) -> Array:
    """Return the decoded samples, mapped from the cache; they are decoded first where it has none."""

    def write(file: BinaryIO) -> None:
        first = split.first
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (len(split), *first.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for places in cache.watched(list(_blocks(len(split))), f"decoding the {split.name} split"):
            for array in split.decode(places):
                file.write(np.ascontiguousarray(array).data)

    mapped: Array = np.lib.format.open_memmap(cache.entry(cache.folder() / f"{key}.npy", write), mode="c")
    return mapped


def _blocks(length: int) -> Iterator[range]:
    return (range(start, min(start + ROWS, length)) for start in range(0, length, ROWS))
