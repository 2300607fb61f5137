"""Sets of files with one class each: labels, subsets, decoding, a cache of decoded samples, streaming."""

from __future__ import annotations

import hashlib
import io
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from diffstride.experiments.data.sources import ROWS, Array, Decoder, Source, columns, open_source

if TYPE_CHECKING:
    import datasets


class HubData(ClassificationData):
    """Base of sets of files with one class each, from a name on the hub or from local files.

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
        held_out: evaluate on new speakers, places or devices: a column and one of its values, such as
            `{speaker: theo}`. Rows of the train split with this value are left out, and only rows of the test split
            with it are used. Both may be the same split.
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
        held_out: dict[str, str | int] | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.path, self.subset, self.cache_gb = os.fspath(path), subset, cache_gb
        self.column, self.label_column = column, label_column
        self.train_split, self.test_split = train_split, test_split
        self.train_samples, self.test_samples = train_samples, test_samples
        self.held_out = dict(held_out or {})
        if len(self.held_out) > 1:
            raise ValueError(f"held_out must have one column, such as {{speaker: theo}}, got {list(self.held_out)}")

    @abstractmethod
    def check_splits(self, train: Split, test: Split) -> None:
        """Check the settings, and set `sample_shape`, before anything but the first file is decoded."""

    @abstractmethod
    def statistics(self, train: Split, decoded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of each channel, from samples that are decoded or from a stream."""

    def resizing_decoder(self) -> Decoder:
        """Return the decoder of files of any size. Sounds are cut or padded in any case."""
        return self.decoder

    def read(self, file: Path, resize: bool = False) -> Tensor:
        decoder = self.resizing_decoder() if resize else self.decoder
        with _named(str(file), decoder.media), open(file, "rb") as content:
            return torch.from_numpy(decoder(content))

    def load(self) -> None:
        source = open_source(self.path, self.subset, self.decoder, (self.train_split, self.test_split))
        train_rows = source.split(self.train_split)
        column, label = columns(train_rows.features, self.decoder.media, self.column, self.label_column)
        declared = getattr(train_rows.features[label], "names", None)
        classes = range(len(declared)) if declared else sorted(set(train_rows[label][:]) - {None})
        self.classes = tuple(map(str, declared or classes))
        self.num_classes = len(classes)
        test_split = self._test_split(source, label)
        splits = []
        for name, samples, held_out in (
            (self.train_split, self.train_samples, False),
            (test_split, self.test_samples, True),
        ):
            rows = source.split(name)
            if {column, label} - set(rows.features) or getattr(rows.features[label], "names", None) != declared:
                raise DataError(f"the {name} split must have {column!r} and {label!r}, and the classes of the other")
            labels = _class_indices(rows[label][:], classes, name, label)
            places, groups = self._places(rows, name, held_out)
            chosen = places[_balanced_subset(labels[places], samples, self.seed, name)]
            if groups is not None and not held_out:
                self.groups = groups[chosen].tolist()
            files = rows.select_columns([column]).with_format("arrow")
            splits.append(Split(files, name, chosen, torch.from_numpy(labels[chosen]), self.decoder))
        train, test = splits
        self.check_splits(train, test)
        test.first = train.first  # all samples of both splits have its shape and type
        next(test.decode([0]))
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

    def _places(
        self, rows: datasets.Dataset, split: str, held_out: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.str_] | None]:
        """Return the rows of a split that are held out, or those that are not, and the group of every row."""
        if not self.held_out:
            return np.arange(len(rows)), None
        ((column, value),) = self.held_out.items()
        if column not in rows.features:
            found = ", ".join(rows.features)
            raise DataError(f"held_out must name a column of the {split} split ({found}), got {column!r}")
        names = getattr(rows.features[column], "names", None)
        own = [names[group] if names and group is not None and group >= 0 else group for group in rows[column][:]]
        groups = np.array(list(map(str, own)))
        places = np.flatnonzero((groups == str(value)) == held_out)
        if not len(places):
            found = ", ".join(sorted(set(groups))[:10])
            raise DataError(
                f"held_out {{{column}: {value}}} leaves no rows of the {split} split: its values are {found}"
            )
        return places, groups

    def _test_split(self, source: Source, label: str) -> str:
        """Return the name of the test split: `validation` where `test` is missing or has no labels."""
        free = source.resolve(self.train_split)[0] != "validation"  # not trained on
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
        cure = "set label_column or another split, or remove it"
        raise DataError(f"{split} split, row {row}: {column} {labels[row]} is none of the {len(index)} classes: {cure}")
    return np.array(found, dtype=np.int64)


def _balanced_subset(labels: npt.NDArray[np.int64], size: int | None, seed: int, split: str) -> npt.NDArray[np.int64]:
    """Return rows in order. Classes take turns in a random order: a smaller subset is a part of a larger one."""
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


@dataclass(eq=False)
class Split(BatchDataset):
    """The chosen rows of one split, with their files still compressed. A stream decodes them batch by batch."""

    rows: datasets.Dataset  # a column of files
    name: str
    chosen: npt.NDArray[np.int64]
    labels: Tensor
    decoder: Decoder

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        arrays = np.stack(list(self.decode(indices)))
        return torch.from_numpy(arrays), self.labels[torch.as_tensor(indices)]

    def read(self, places: Sequence[int] | range, function: Callable[[BinaryIO], Any]) -> Iterator[tuple[str, Any]]:
        """Yield the row and a function's result of the open file, for each of some places of the subset."""
        numbers = self.chosen[np.asarray(places)].tolist()
        for number, value in zip(numbers, self.rows[numbers].column(0).to_pylist(), strict=True):
            entry = value if isinstance(value, dict) else {"bytes": value}
            path, content = entry.get("path") or "", entry.get("bytes")
            row = f"{self.name} split, row {number}" + (f" ({path})" if path else "")
            with (
                _named(row, self.decoder.media, ": repair or remove it"),
                open(path, "rb") if content is None else io.BytesIO(content) as file,
            ):
                found = function(file)
            yield row, found

    @cached_property
    def first(self) -> Array:
        """The first decoded sample."""
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


@contextmanager
def _named(name: str, media: str, cure: str = "") -> Iterator[None]:
    """Add the name of a file to errors in its content."""
    try:
        yield
    except (DataError, OSError) as error:
        cause = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: not a readable {media} file ({cause}){cure}") from error


def _decoded(split: Split, key: str) -> Array:
    """Return the decoded samples, mapped from the cache; they are decoded first where it has none."""

    def write(file: BinaryIO) -> None:
        first = split.first
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (len(split), *first.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for places in cache.watched(_blocks(len(split)), f"decoding the {split.name} split"):
            for array in split.decode(places):
                file.write(np.ascontiguousarray(array).data)

    mapped: Array = np.lib.format.open_memmap(cache.entry(cache.folder() / f"{key}.npy", write), mode="c")
    return mapped


def _blocks(length: int) -> list[range]:
    return [range(length)[start : start + ROWS] for start in range(0, length, ROWS)]
