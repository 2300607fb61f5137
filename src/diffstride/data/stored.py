"""Sets read from the hub or from files, through `datasets`: rows, classes, subsets, a cache of what is decoded."""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffstride import _check
from diffstride.data.base import Batch, BatchDataset, ClassificationData, DataError, at_least, digest, not_negative

if TYPE_CHECKING:
    import datasets

Array = npt.NDArray[Any]

_SPLITS = {"val": "validation", "valid": "validation", "dev": "validation"}  # other names of folders
_ROWS = 128  # read and decoded at once: sounds may take megabytes each


class Decoder(Protocol):
    """What makes an array of a file's content. It travels to other processes."""

    noun: ClassVar[str]
    """What the content is: "image"."""
    option: ClassVar[str]
    """What the column of files is set by: "image_column"."""
    feature: ClassVar[str]
    """Its class in `datasets`: "Image"."""

    @property
    def key(self) -> str:
        """Of all that decides what comes out: caches with another key are not used."""
        ...

    def __call__(self, content: bytes) -> Array:
        """The array; a DataError with the cause alone where it cannot be read."""
        ...

    def misfit(self, shape: Sequence[int], first: Sequence[int]) -> str:
        """What to say where an array has not the shape of the first one."""
        ...


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
        _check.an_instance("path", path, (str, os.PathLike), "a path or a name on the hub")
        if not os.fspath(path):
            raise DataError("path must not be empty: give a local path, or a name on the hub")
        for name, text in ("train_split", train_split), ("test_split", test_split):
            _check.an_instance(name, text, str, "a text")
        for name, given in ("label_column", label_column), ("subset", subset):
            _check.an_instance(name, given, (str, type(None)), "a text or None")
        for name, value in ("train_samples", train_samples), ("test_samples", test_samples):
            if value is not None:
                at_least(name, value, 1)
        not_negative("cache_gb", cache_gb)
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
        """One raw sample from a file on disk."""
        _check.an_instance("file", file, (str, os.PathLike), "a path")
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        try:
            return torch.from_numpy(self.decoder(content))
        except DataError as error:
            raise DataError(f"{file}: not a readable {self.decoder.noun} ({error})") from error

    def load(self) -> None:
        """Find the splits, columns and classes; then decode, or find the cache, or stream."""
        available = _open(self.path, self.subset, self.decoder)
        column, label = _columns(available.features, self.decoder, self.column, self.label_column)
        train_rows = available.split(self.train_split)
        test_rows, test_split = self._test_rows(available, label)
        classes, self.classes = _classes(available.features[label], _column(train_rows, label), self.train_split)
        self.num_classes = len(classes)

        def choose(rows: datasets.Dataset, name: str, samples: int | None) -> Split:
            labels = _class_indices(_column(rows, label), classes, name, label)
            chosen = _balanced_subset(labels, samples, self.seed, name, self.decoder.noun)
            return Split(rows, name, column, chosen, labels[chosen], self.decoder)

        splits = [
            choose(train_rows, self.train_split, self.train_samples),
            choose(test_rows, test_split, self.test_samples),
        ]
        self.settle(*splits)
        decoded = sum(len(split) * int(np.prod(split.shape)) * split.dtype.itemsize for split in splits)
        if decoded <= self.cache_gb * 1e9:
            self._cached(splits, classes)
        else:
            self._streamed(splits, classes)

    def _test_rows(self, available: _Source, label: str) -> tuple[datasets.Dataset, str]:
        if self.test_split == "test" and "validation" in available.names:
            if "test" not in available.names:
                return available.split("validation"), "validation"
            rows = available.split("test")
            labels = _column(rows, label)
            unlabelled = len(labels) and (labels.dtype == object or (labels.dtype.kind == "i" and (labels < 0).all()))
            return (available.split("validation"), "validation") if unlabelled else (rows, "test")
        return available.split(self.test_split), self.test_split

    def _cached(self, splits: list[Split], classes: list[Any]) -> None:
        keys = [split.content_key() for split in splits]
        train, test = (torch.from_numpy(_from_cache(split, key)) for split, key in zip(splits, keys, strict=True))
        labels = [torch.from_numpy(split.labels) for split in splits]
        self.train_set, self.test_set = (train, labels[0]), (test, labels[1])
        self.fingerprint = digest(*keys, *labels, classes)
        self.num_workers = 0
        self.mean, self.std = self.statistics(train[:: max(1, len(train) // 10_000)])

    def _streamed(self, splits: list[Split], classes: list[Any]) -> None:
        self.train_set, self.test_set = _Streamed(splits[0]), _Streamed(splits[1])
        # Reading every byte would take too long: the builder's own key stands for the files (the hub's commit, or the
        # local files' paths and times of change).
        parts = [(split.rows._fingerprint, split.decoder.key) for split in splits]
        self.fingerprint = digest(parts, *(torch.from_numpy(split.labels) for split in splits), classes)
        self.mean, self.std = self.streamed_statistics(splits[0])


@dataclass(frozen=True)
class _Source:
    """Splits that `datasets` has prepared or been given.

    Attributes:
        path: what the user calls it.
        names: of the splits.
        features: of all splits.
        rows: by the name of a split, or of a part of one where `datasets` itself has prepared them (`train[:1000]`).
    """

    path: str
    names: list[str]
    features: datasets.Features
    rows: Callable[[str], datasets.Dataset]

    def split(self, name: str) -> datasets.Dataset:
        try:
            rows = self.rows(name) if name.split("[")[0] in self.names else None
        except KeyError:  # a part of a split, of which only `datasets` knows
            rows = None
        except ValueError:  # how `datasets` answers for a split without rows
            rows = ()
        if rows is None:
            raise DataError(
                f"{self.path} has no split {name!r}: set train_split and test_split to {_either(self.names)}"
            )
        if not len(rows):
            raise DataError(f"the {name} split of {self.path} is empty: set train_split or test_split to another one")
        return rows


def _open(path: str, subset: str | None, decoder: Decoder) -> _Source:
    """Prepare a set; with a local path nothing leaves the machine."""
    import datasets

    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix != ".parquet":
            raise DataError(f"{path} is not a parquet file: give a .parquet file or a folder")
        options: dict[str, Any] = {"path": "parquet", "data_files": {"train": str(local.resolve())}}
    elif local.is_dir():
        if decoder.feature == "Audio" and not any(local.rglob("*.parquet")):
            return _folder_of_sounds(path, local)
        options = {"path": str(local.resolve())}
    elif path.startswith((".", "/", "~")) or path.endswith(".parquet") or path.count("/") > 1:
        raise DataError(f"{path} does not exist: check the path, or give a name on the hub such as cifar10")
    else:
        options = {"path": path, "name": subset}
    if local.exists():
        # Apart from the hub's sets: without a connection `datasets` would take a folder called cifar10 for the hub's.
        options["cache_dir"] = str(_cache_folder() / "arrow")
    try:
        with _quiet_unless_watched():
            builder = datasets.load_dataset_builder(**options)
            builder.download_and_prepare()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = first_line(error.__cause__ or error)
        if not local.exists():
            raise DataError(
                f"could not load {path!r} from the hub ({cause}): check the name and the connection, or give a local "
                f"path (a parquet file, or a folder of parquet files or of {decoder.noun}s)"
            ) from error
        raise DataError(
            f"could not read {path} ({cause}): it must be a readable .parquet file, or a folder with train.parquet and "
            f"test.parquet or with train/<class>/<{decoder.noun}> and test/<class>/<{decoder.noun}>"
        ) from error
    names = [str(name) for name in builder.info.splits]
    return _Source(path, names, builder.info.features, builder.as_dataset)


@contextmanager
def _quiet_unless_watched() -> Iterator[None]:
    """Without the progress of `datasets` where standard error is no terminal, and without its own words for errors."""
    import datasets

    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _folder_of_sounds(path: str, folder: Path) -> _Source:
    """Files in `SPLIT/CLASS/`: `datasets` reads such a folder of images, but for sounds asks for FFmpeg."""
    import datasets

    def visible(inside: Path) -> list[Path]:
        return sorted(entry for entry in inside.iterdir() if not entry.name.startswith("."))

    found = {
        split.name: [(file, kind.name) for kind in visible(split) if kind.is_dir() for file in visible(kind)]
        for split in visible(folder)
        if split.is_dir()
    }
    classes = sorted({kind for files in found.values() for _, kind in files})
    if not classes:
        raise DataError(
            f"{path} has no sounds: it must be a folder with train/<class>/<sound> and test/<class>/<sound>"
        )
    file_of = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"audio": file_of, "label": datasets.ClassLabel(names=classes)})
    rows = {}
    for split, files in found.items():
        content = {
            "audio": [{"bytes": None, "path": str(file.resolve())} for file, _ in files],
            "label": [kind for _, kind in files],
        }
        changed = [(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file, _ in files)]
        fingerprint = digest(content, changed)
        name = _SPLITS.get(split, split)
        if name in rows:
            raise DataError(f"{path} has two folders for the {name} split: remove or rename {split}")
        rows[name] = datasets.Dataset(datasets.Dataset.from_dict(content, features).data, fingerprint=fingerprint)
    return _Source(path, list(rows), features, lambda name: rows[name])


def _columns(features: datasets.Features, decoder: Decoder, column: str | None, label: str | None) -> tuple[str, str]:
    """The columns of files and of labels: as named, or the only ones of their type."""
    import datasets

    def is_file(feature: Any) -> bool:
        if isinstance(feature, dict):  # the layout of a file in a parquet file without the hub's metadata
            return "bytes" in feature
        return isinstance(feature, getattr(datasets, decoder.feature)) or getattr(feature, "dtype", "") in (
            "binary",
            "large_binary",
        )

    def is_integer(feature: Any) -> bool:
        return isinstance(feature, datasets.Value) and "int" in feature.dtype

    def choose(option: str, named: str | None, *tiers: list[str]) -> str:
        everything = ", ".join(features)
        if named is not None:
            if named not in features:
                raise DataError(f"there is no column {named!r}: set {option} to one of {everything}")
            return named
        found = next((tier for tier in tiers if tier), [])
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(f"columns {', '.join(found)} could all be the {option}: set {option} to one of them")
        raise DataError(f"no column looks like the {option}: set {option} to one of {everything}")

    files = [name for name, feature in features.items() if is_file(feature)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    integers = [name for name, feature in features.items() if is_integer(feature)]
    option = decoder.option
    column, label = choose(option, column, files), choose("label_column", label, labels, integers)
    if not is_file(features[column]):
        raise DataError(
            f"column {column!r} holds no {decoder.noun}s: set {option} to {_either(files or list(features))}"
        )
    if not isinstance(features[label], datasets.ClassLabel | datasets.Value) or is_file(features[label]):
        raise DataError(f"column {label!r} holds no classes: set label_column to {_either(labels or list(features))}")
    return column, label


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
    if labels.dtype.kind not in "iuU":
        raise DataError(f"labels of the {split} split are {labels.dtype}, not classes: set label_column to another one")
    classes = list(np.unique(labels).tolist())
    return classes, tuple(map(str, classes))


def _class_indices(labels: npt.NDArray[Any], classes: list[Any], split: str, column: str) -> npt.NDArray[np.int64]:
    if labels.dtype == object:
        raise DataError(f"column {column!r} of the {split} split has missing values: remove those rows")
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

    def compressed(self, places: Sequence[int] | range) -> list[tuple[int, str, bytes]]:
        """Row number, file name and bytes of the files at some places of the subset."""
        numbers = self.chosen[np.asarray(places)].tolist()
        contiguous = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        table = self.rows[slice(numbers[0], numbers[-1] + 1) if contiguous else numbers]
        found = []
        for number, value in zip(numbers, table.column(self.column).to_pylist(), strict=True):
            entry = value if isinstance(value, dict) else {"bytes": value}
            file, content = entry.get("path") or "", entry.get("bytes")
            if content is None:
                if not file:
                    raise self._unreadable(number, file, "it is missing")
                try:
                    content = Path(file).read_bytes()
                except OSError as error:
                    raise self._unreadable(number, file, first_line(error)) from error
            found.append((number, file, content))
        return found

    def first(self, read: Callable[[bytes], Any]) -> Any:
        """What can be read from the first file."""
        number, file, content = self.compressed([0])[0]
        try:
            return read(content)
        except DataError as error:
            raise self._unreadable(number, file, str(error)) from error

    @cached_property
    def _decoded_first(self) -> Array:
        found: Array = self.first(self.decoder)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all decoded samples, as the first one tells."""
        return self._decoded_first.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of all decoded samples."""
        return self._decoded_first.dtype

    def decode(self, places: Sequence[int] | range) -> Iterator[Array]:
        """The samples at some places of the subset; all are of one shape."""
        for number, file, content in self.compressed(places):
            try:
                array = self.decoder(content)
            except DataError as error:
                raise self._unreadable(number, file, str(error)) from error
            if array.shape != self.shape:
                raise DataError(f"{self._where(number, file)}: {self.decoder.misfit(array.shape, self.shape)}")
            yield array

    def content_key(self) -> str:
        """Digest of the files' bytes and of what is done to them: the same on every machine."""
        total = hashlib.sha256(f"{self.decoder.key} {len(self)}".encode())
        for places in _blocks(len(self)):
            for _, _, content in self.compressed(places):
                total.update(struct.pack("<q", len(content)))
                total.update(content)
        return total.hexdigest()[:32]

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


def _cache_folder() -> Path:
    """Where prepared sets are kept; made if need be."""
    chosen = os.environ.get("DIFFSTRIDE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffstride"
    folder = Path(chosen).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write to the cache {folder} ({first_line(error)}): set DIFFSTRIDE_CACHE to a folder that can be "
            "written"
        ) from error
    return folder


def _from_cache(split: Split, key: str) -> Array:
    """The decoded samples, mapped from the cache; decoded first where it has none, or only a damaged one."""
    path = _cache_folder() / f"{key}.npy"
    shape = (len(split), *split.shape)
    try:
        found: Array = np.lib.format.open_memmap(path, mode="c")  # which takes nothing but a plain array
        if found.shape == shape and found.dtype == split.dtype:
            return found
    except (OSError, ValueError, EOFError):
        pass  # missing, truncated or not an array: decode
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        _decode_all(split, unfinished, shape)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    mapped: Array = np.lib.format.open_memmap(path, mode="c")
    return mapped


def _decode_all(split: Split, path: Path, shape: tuple[int, ...]) -> None:
    from rich.console import Console
    from rich.progress import track

    arrays = np.lib.format.open_memmap(path, mode="w+", dtype=split.dtype, shape=shape)
    blocks = list(_blocks(len(split)))
    console = Console(stderr=True)
    for places in track(
        blocks, f"decoding the {split.name} split", console=console, transient=True, disable=not console.is_terminal
    ):
        for place, array in zip(places, split.decode(places), strict=True):
            arrays[place] = array
    arrays.flush()


def _blocks(length: int) -> Iterator[range]:
    return (range(start, min(start + _ROWS, length)) for start in range(0, length, _ROWS))


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
