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

from diffstride import _validation
from diffstride._files import open_regular
from diffstride.experiments.data import cache
from diffstride.experiments.data.base import Batch, BatchDataset, ClassificationData, DataError, digest
from diffstride.experiments.data.folders import canonical, shared
from diffstride.experiments.data.sources import ROWS, Array, Decoder, Source, base_and_part, columns, open_source

if TYPE_CHECKING:
    import datasets


class StoredData(ClassificationData):
    """Base of sets of files with one class each: finds splits, columns and classes; then decodes, or streams.

    A subclass has a `decoder`, and implements `settle` and both statistics. The arguments are documented there.
    """

    decoder: Decoder

    def __init__(
        self,
        path: str,
        column: str | None,
        label_column: str | None,
        train_split: str,
        test_split: str,
        batch_size: int,
        train_samples: int | None,
        test_samples: int | None,
        cache_gb: float,
        num_workers: int,
        seed: int,
        subset: str | None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if not os.fspath(path):
            raise DataError("path must not be empty: give a local path, or a name on the hub")
        for name, value in ("train_samples", train_samples), ("test_samples", test_samples):
            if value is not None:
                _validation.whole(name, value, 1)
        _validation.not_negative("cache_gb", cache_gb)
        self.path, self.subset, self.cache_gb = os.fspath(path), subset, cache_gb
        self.column, self.label_column = column, label_column
        self.train_split, self.test_split = train_split, test_split
        self.train_samples, self.test_samples = train_samples, test_samples

    def settle(self, train: Split, test: Split) -> None:
        """Check the splits, and set `sample_shape`; before anything is decoded but the first file."""
        raise NotImplementedError

    def statistics(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by channel, of raw samples as they are cached."""
        raise NotImplementedError

    def streamed_statistics(self, train: Split) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by channel, where reading every sample would take too long."""
        raise NotImplementedError

    def read(self, file: Path) -> Tensor:
        """Return one raw sample from a file on disk."""
        try:
            with open_regular(file, self.decoder.largest) as content:
                return torch.from_numpy(self.decoder(content))
        except DataError as error:
            raise DataError(f"{file}: not a readable {self.decoder.noun} ({error})") from error
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error

    def load(self) -> None:
        """Find the splits, columns and classes; then decode, or find the cache, or stream."""
        source = open_source(self.path, self.subset, self.decoder, (self.train_split, self.test_split))
        train_rows = source.split(self.train_split)
        column, label = columns(train_rows.features, self.decoder, self.column, self.label_column)
        feature = train_rows.features[label]
        test_rows, test_split = self._test_rows(source, label)
        classes, self.classes = _classes(feature, _column(train_rows, label), self.train_split)
        self.num_classes = len(classes)

        def choose(rows: datasets.Dataset, name: str, samples: int | None) -> Split:
            for needed in column, label:
                if needed not in rows.features:
                    raise DataError(f"the {name} split has no column {needed!r}: set test_split to another one")
            if getattr(rows.features[label], "names", None) != getattr(feature, "names", None):
                raise DataError(f"the {name} split declares other classes than {self.train_split} in column {label!r}")
            labels = _class_indices(_column(rows, label), classes, name, label)
            chosen = _balanced_subset(labels, samples, self.seed, name, self.decoder.noun)
            return Split(rows, name, column, chosen, labels[chosen], self.decoder)

        splits = [
            choose(train_rows, self.train_split, self.train_samples),
            choose(test_rows, test_split, self.test_samples),
        ]
        self.settle(*splits)
        self._refuse_shared_files(source, *splits)
        decoded = sum(len(split) * int(np.prod(split.shape)) * split.dtype.itemsize for split in splits)
        if decoded <= self.cache_gb * 1e9:
            self._cached(splits, classes)
        else:
            self._streamed(splits, classes)

    def _refuse_shared_files(self, source: Source, train: Split, test: Split) -> None:
        """Check that no file belongs to both splits, unless they are parts of one, which the user has divided."""
        names = [source.resolve(split.name)[0] for split in (train, test)]
        if names[0] != names[1]:
            files = [
                [*source.tables.get(str(name), ()), *split.named_files()]
                for name, split in zip(names, (train, test), strict=True)
            ]
            if both := shared(*files):
                raise DataError(
                    f"{self.path}: {both[0]} of the {train.name} split and {both[1]} of the {test.name} split are one "
                    "file: remove it from one of them"
                )

    def _test_rows(self, source: Source, label: str) -> tuple[datasets.Dataset, str]:
        """Return the rows and the name of the test split: `validation` where `test` is missing or has no labels."""
        free = canonical(base_and_part(self.train_split)[0]) != "validation"  # not trained on
        replaceable = free and canonical(self.test_split) == "test" and "validation" in source.names
        if replaceable and ("test" not in source.names or _unlabelled(source.split("test"), label)):
            return source.split("validation"), "validation"
        return source.split(self.test_split), self.test_split

    def _cached(self, splits: list[Split], classes: list[Any]) -> None:
        keys = [split.content_key() for split in splits]
        train, test = (torch.from_numpy(_decoded(split, key)) for split, key in zip(splits, keys, strict=True))
        labels = [torch.from_numpy(split.labels) for split in splits]
        self.train_set, self.test_set = (train, labels[0]), (test, labels[1])
        self.fingerprint = digest(*keys, *labels, classes)
        self.num_workers = 0
        self.mean, self.std = self.statistics(train[:: max(1, len(train) // 10_000)])

    def _streamed(self, splits: list[Split], classes: list[Any]) -> None:
        self.train_set, self.test_set = _Streamed(splits[0]), _Streamed(splits[1])
        arrays = [torch.from_numpy(array) for split in splits for array in (split.chosen, split.labels)]
        self.fingerprint = digest([split.source_key() for split in splits], *arrays, classes)
        self.mean, self.std = self.streamed_statistics(splits[0])


def _unlabelled(rows: datasets.Dataset, label: str) -> bool:
    """Return whether no row has a label: the column is missing or empty, or all its classes are negative."""
    if label not in rows.features:
        return True
    labels = _column(rows, label)
    return (
        all(each is None for each in labels)
        if labels.dtype == object
        else labels.dtype.kind == "i" and labels.max() < 0
    )


def _column(rows: datasets.Dataset, name: str) -> npt.NDArray[Any]:
    """A column of labels: integers or strings; of type object where values are missing or of another kind."""
    values = rows.select_columns([name]).with_format("arrow")[:].column(name)
    if values.null_count:
        return np.array(values.to_pylist(), dtype=object)
    array: npt.NDArray[Any] = values.to_numpy()
    return array.astype(str) if array.dtype == object else array


def _classes(feature: Any, labels: npt.NDArray[Any], split: str) -> tuple[list[Any], tuple[str, ...]]:
    """The classes in order, and their names: those the set declares, else the distinct values of the train split."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return list(range(feature.num_classes)), tuple(feature.names)
    if labels.dtype.kind not in "iuUb":
        raise DataError(f"labels of the {split} split are {labels.dtype}, not classes: set label_column to another one")
    classes = list(np.unique(labels).tolist())
    return classes, tuple(map(str, classes))


def _class_indices(labels: npt.NDArray[Any], classes: list[Any], split: str, column: str) -> npt.NDArray[np.int64]:
    if labels.dtype == object:
        raise DataError(f"column {column!r} of the {split} split has missing values: remove those rows")
    if (labels.dtype.kind == "U") != isinstance(classes[0], str):
        raise DataError(f"column {column!r} of the {split} split is not of the type that it has in the train split")
    index = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
    wrong = np.flatnonzero(np.asarray(classes)[index] != labels)
    if len(wrong):
        raise DataError(
            f"{split} split, row {wrong[0]}: {column} {labels[wrong[0]]!s} is none of the {len(classes)} classes: "
            "set label_column or the split to another one"
        )
    return index.astype(np.int64)


def _balanced_subset(
    labels: npt.NDArray[np.int64], size: int | None, seed: int, split: str, noun: str
) -> npt.NDArray[np.int64]:
    """Rows in order: each class gives its turn, until `size` are found."""
    if size is None:
        return np.arange(len(labels))
    if size > len(labels):
        raise DataError(f"the {split} split has {len(labels)} {noun}s, not {size}: lower its number of samples")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = labels[shuffled] == label
        turn[members] = np.arange(members.sum())
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:size]])


class Split:
    """The chosen rows of one split, with their files still compressed."""

    def __init__(
        self,
        rows: datasets.Dataset,
        name: str,
        column: str,
        chosen: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        decoder: Decoder,
    ) -> None:
        self.name, self.column, self.chosen, self.labels, self.decoder = name, column, chosen, labels, decoder
        self.rows = rows.select_columns([column]).with_format("arrow")

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.chosen)

    def opened(self, places: Sequence[int] | range) -> Iterator[tuple[int, str, io.BytesIO | io.BufferedReader]]:
        """Yield row number, file name and open file of the samples at some places of the subset."""
        numbers = self.chosen[np.asarray(places)].tolist()
        contiguous = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        table = self.rows[slice(numbers[0], numbers[-1] + 1) if contiguous else numbers]
        for number, value in zip(numbers, table.column(self.column).to_pylist(), strict=True):
            entry = value if isinstance(value, dict) else {"path" if isinstance(value, str) else "bytes": value}
            path, content = os.fsdecode(entry.get("path") or ""), entry.get("bytes")
            if content is None and not path:
                raise self._unreadable(number, path, "it is missing")
            try:
                file = open_regular(path, self.decoder.largest) if content is None else io.BytesIO(content)
            except OSError as error:
                raise self._unreadable(number, path, str(error.strerror)) from error
            with file:
                yield number, path, file

    def first(self, read: Callable[[BinaryIO], Any]) -> Any:
        """Return what a function reads from the first file."""
        return next(self._each([0], read))[-1]

    def _each(self, places: Sequence[int] | range, read: Callable[[BinaryIO], Any]) -> Iterator[tuple[int, str, Any]]:
        """Yield row number, file name and what a function reads from the file, for some places of the subset."""
        for number, path, file in self.opened(places):
            try:
                found = read(file)
            except DataError as error:
                raise self._unreadable(number, path, str(error)) from error
            yield number, path, found

    @cached_property
    def _decoded_first(self) -> Array:
        found: Array = self.first(self.decoder)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first decoded sample, which all must have."""
        return self._decoded_first.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of all decoded samples."""
        return self._decoded_first.dtype

    def decode(self, places: Sequence[int] | range) -> Iterator[Array]:
        """Yield the samples at some places of the subset; all are of one shape."""
        for number, path, array in self._each(places, self.decoder):
            if array.shape != self.shape:
                raise DataError(f"{self._where(number, path)}: {self.decoder.misfit(array.shape, self.shape)}")
            yield array

    def content_key(self) -> str:
        """Return a digest of the files' bytes and of how they are decoded: the same on every machine."""
        total = hashlib.sha256(f"{self.decoder.key} {len(self)}".encode())
        for places in _blocks(len(self)):
            for _, _, file in self.opened(places):
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()[:32]

    def source_key(self) -> str:
        """Return a digest of what a stream reads and how it decodes it, without reading all of it at every start.

        A local table stands for its files' contents, one of the hub for its commit there. Files that a table only
        names count by their contents, too.
        """
        return digest(self.rows._fingerprint, self.decoder.key, cache.digest_of_files(self.named_files()))

    def named_files(self) -> list[Path]:
        """Return the files that rows name without holding their content. Rows that were not chosen count, too."""
        named: list[Any] = []
        for chunk in self.rows[:].column(self.column).chunks:
            names = [field.name for field in chunk.type] if chunk.type.num_fields else []
            if "path" in names:
                named += chunk.field("path").filter(chunk.field("bytes").is_null()).to_pylist()
        return [Path(os.fsdecode(path)) for path in named if path]

    def _where(self, number: int, file: str) -> str:
        return f"{self.name} split, row {number}" + (f" ({file})" if file else "")

    def _unreadable(self, number: int, file: str, cause: str) -> DataError:
        return DataError(
            f"{self._where(number, file)}: not a readable {self.decoder.noun} ({cause}): repair it or remove the row"
        )


class _Streamed(BatchDataset):
    """A split that is decoded as it is asked for."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.labels = torch.from_numpy(split.labels)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.split)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Decode the files at `indices`."""
        arrays = np.stack(list(self.split.decode(indices)))
        return torch.from_numpy(arrays), self.labels[torch.as_tensor(indices)]


def _decoded(split: Split, key: str) -> Array:
    """Return the decoded samples, mapped from the cache; they are decoded first where it has none."""

    def write(file: BinaryIO) -> None:
        shape = (len(split), *split.shape)
        header = {"descr": np.lib.format.dtype_to_descr(split.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for places in cache.watched(list(_blocks(len(split))), f"decoding the {split.name} split"):
            for array in split.decode(places):
                file.write(np.ascontiguousarray(array).data)

    mapped: Array = np.lib.format.open_memmap(cache.entry(cache.folder() / f"{key}.npy", write), mode="c")
    return mapped


def _blocks(length: int) -> Iterator[range]:
    return (range(start, min(start + ROWS, length)) for start in range(0, length, ROWS))
