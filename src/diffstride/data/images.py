"""Image-classification sets: names of the hub, parquet files and folders of images, all through `datasets`."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from diffstride.data.augment import Augment
from diffstride.data.base import Batch, BatchDataset, ClassificationData, DataError, digest

if TYPE_CHECKING:
    import datasets

Pixels = npt.NDArray[np.uint8]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ROWS = 1024  # read and decoded at once
_DECODING = 1  # raise when decoding changes, so that older caches are not used


class ImageData(ClassificationData):
    """Images with one class each, from a name on the hub or from files.

    The set is decoded once into uint8 arrays that are kept in `$DIFFSTRIDE_CACHE` (else in
    `$XDG_CACHE_HOME/diffstride`, else in `~/.cache/diffstride`) under a digest of the images' bytes and of their
    preparation. A set that is larger than `cache_gb` when decoded is streamed: its images stay compressed in the Arrow
    files (or the image folder) and are decoded batch by batch, in `num_workers` processes.

    All images come out as RGB: grey and palette images are converted, transparency is dropped. They are normalised by
    the mean and deviation of the train split's channels; streamed ones by ImageNet's.

    Args:
        path: a name on the hub (`cifar10`), or a local path, from which nothing is downloaded: a folder with
            `train.parquet` and `test.parquet` (or the hub's `train-00000-of-00001.parquet`, also under `data/`), a
            folder of images (`train/<class>/*.png`), or one parquet file, whose only split is `train`.
        image_column: the column of images; found by its type when not given.
        label_column: the column of classes; found by its type when not given.
        train_split: the split to train on.
        test_split: the split to evaluate on. Where the set has no `test` or leaves it unlabelled (ImageNet), its
            `validation` split serves.
        batch_size: samples per batch and rank.
        image_size: resize the shorter side to this and keep the middle square. Needed where sizes differ.
        train_samples: train on a random subset of this many images, with classes as equal in number as they can be.
            It depends on the seed alone, and a smaller subset is a part of a larger one. All of them when not given.
        test_samples: likewise for the test split.
        augment: what is done to training images at random; nothing when not given.
        cache_gb: decode once and keep, if both splits take no more than this many gigabytes decoded; else stream.
        num_workers: processes that decode streamed images; cached sets need none.
        seed: of the subset, the order and the augmentation.
        subset: the hub's name for one of several configurations of a set; rarely needed.
    """

    def __init__(
        self,
        path: str,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
        batch_size: int = 128,
        image_size: int | None = None,
        train_samples: int | None = None,
        test_samples: int | None = None,
        augment: Augment | None = None,
        cache_gb: float = 4.0,
        num_workers: int = 0,
        seed: int = 0,
        subset: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        for name, value in ("image_size", image_size), ("train_samples", train_samples), ("test_samples", test_samples):
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1, not {value}")
        self.path, self.subset = path, subset
        self.image_column, self.label_column = image_column, label_column
        self.train_split, self.test_split = train_split, test_split
        self.image_size, self.cache_gb = image_size, cache_gb
        self.train_samples, self.test_samples = train_samples, test_samples
        self.settings = augment or Augment()

    def augment(self, inputs: Tensor, labels: Tensor) -> Batch:
        """Apply the settings' random changes."""
        return self.settings(inputs, labels, self.num_classes)

    def prepare_evaluation(self, inputs: Tensor) -> Tensor:
        """Take the middle square where training crops."""
        return self.settings.center(inputs)

    def load(self) -> None:
        """Find the splits, columns and classes; then decode, or find the cache, or stream."""
        available = _open(self.path, self.subset)
        image, label = _columns(available.features, self.image_column, self.label_column)
        train_rows = available.split(self.train_split)
        test_rows, test_split = self._test_rows(available, label)
        classes = _classes(available.features[label], _column(train_rows, label), self.train_split)
        self.num_classes = len(classes)

        def choose(rows: datasets.Dataset, name: str, samples: int | None) -> _Split:
            labels = _class_indices(_column(rows, label), classes, name, label)
            chosen = _balanced_subset(labels, samples, self.seed, name)
            return _Split(rows, name, image, chosen, labels[chosen], self.image_size)

        splits = [
            choose(train_rows, self.train_split, self.train_samples),
            choose(test_rows, test_split, self.test_samples),
        ]
        shapes = [split.shape for split in splits]
        if shapes[0] != shapes[1]:
            raise DataError(
                f"{self.train_split} images are {_size(shapes[0])} and {test_split} images {_size(shapes[1])}: "
                "set image_size so that all are resized"
            )
        crop = self.settings.resized_crop
        self.sample_shape = shapes[0] if crop is None else (3, crop, crop)
        self.settings.center(torch.empty(shapes[0]))  # a crop that does not fit is known before training
        decoded = sum(len(split.labels) for split in splits) * int(np.prod(shapes[0]))
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

    def _cached(self, splits: list[_Split], classes: list[Any]) -> None:
        keys = [split.content_key() for split in splits]
        train, test = (torch.from_numpy(_from_cache(split, key)) for split, key in zip(splits, keys, strict=True))
        labels = [torch.from_numpy(split.labels) for split in splits]
        self.train_set, self.test_set = (train, labels[0]), (test, labels[1])
        self.fingerprint = digest(*keys, *labels, classes)
        self.num_workers = 0
        sample = train[:: max(1, len(train) // 10_000)].double().div_(255)
        self.mean = sample.mean((0, 2, 3)).float()
        self.std = sample.std((0, 2, 3)).clamp_min(1 / 255).float()

    def _streamed(self, splits: list[_Split], classes: list[Any]) -> None:
        self.train_set, self.test_set = _Streamed(splits[0]), _Streamed(splits[1])
        # Reading every byte would take too long: the builder's own key stands for the images (the hub's commit, or the
        # local files' paths and times of change).
        parts = [(split.rows._fingerprint, split.image_size) for split in splits]
        self.fingerprint = digest(parts, *(torch.from_numpy(split.labels) for split in splits), classes)
        self.mean, self.std = torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)


@dataclass(frozen=True)
class _Source:
    """What `datasets` has prepared: on disk, in Arrow files."""

    builder: datasets.DatasetBuilder
    path: str

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.builder.info.splits]

    @property
    def features(self) -> datasets.Features:
        return self.builder.as_dataset(self.names[0]).features

    def split(self, name: str) -> datasets.Dataset:
        if name.split("[")[0] not in self.names:  # `train[:1000]` is `datasets`' own way to name a part
            raise DataError(
                f"{self.path} has no split {name!r}: set train_split and test_split to {_either(self.names)}"
            )
        rows = self.builder.as_dataset(name)
        if not len(rows):
            raise DataError(f"the {name} split of {self.path} is empty: set train_split or test_split to another one")
        return rows


def _open(path: str, subset: str | None) -> _Source:
    """Prepare a set; with a local path nothing leaves the machine."""
    import datasets

    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix != ".parquet":
            raise DataError(f"{path} is not a parquet file: give a .parquet file or a folder")
        options: dict[str, Any] = {"path": "parquet", "data_files": {"train": str(local.resolve())}}
    elif local.is_dir():
        options = {"path": str(local.resolve())}
    elif path.startswith((".", "/", "~")) or path.endswith(".parquet") or path.count("/") > 1:
        raise DataError(f"{path} does not exist: check the path, or give a name on the hub such as cifar10")
    else:
        options = {"path": path, "name": subset}
    if local.exists():
        # Apart from the hub's sets: without a connection `datasets` would take a folder called cifar10 for the hub's.
        options["cache_dir"] = str(_cache_folder() / "arrow")
    try:
        builder = datasets.load_dataset_builder(**options)
        builder.download_and_prepare()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = _first_line(error.__cause__ or error)
        if not local.exists():
            raise DataError(
                f"could not load {path!r} from the hub ({cause}): check the name and the connection, or give a local "
                "path (a parquet file, or a folder of parquet files or of images)"
            ) from error
        raise DataError(
            f"could not read {path} ({cause}): it must be a readable .parquet file, or a folder with train.parquet and "
            "test.parquet or with train/<class>/<image> and test/<class>/<image>"
        ) from error
    return _Source(builder, path)


def _columns(features: datasets.Features, image: str | None, label: str | None) -> tuple[str, str]:
    """The columns of images and of labels: as named, or the only ones of their type."""
    import datasets

    def is_image(feature: Any) -> bool:
        if isinstance(feature, dict):  # the layout of an image in a parquet file without the hub's metadata
            return "bytes" in feature
        return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")

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

    images = [name for name, feature in features.items() if is_image(feature)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    integers = [name for name, feature in features.items() if is_integer(feature)]
    image, label = choose("image_column", image, images), choose("label_column", label, labels, integers)
    if not is_image(features[image]):
        raise DataError(f"column {image!r} holds no images: set image_column to {_either(images or list(features))}")
    if not isinstance(features[label], datasets.ClassLabel | datasets.Value) or is_image(features[label]):
        raise DataError(f"column {label!r} holds no classes: set label_column to {_either(labels or list(features))}")
    return image, label


def _column(rows: datasets.Dataset, name: str) -> npt.NDArray[Any]:
    """A column of labels: integers or strings; of type object where values are missing or of another kind."""
    values = rows.select_columns([name]).with_format("arrow")[:].column(name)
    if values.null_count:
        return np.array(values.to_pylist(), dtype=object)
    array: npt.NDArray[Any] = values.to_numpy()
    return array.astype(str) if array.dtype == object else array


def _classes(feature: Any, labels: npt.NDArray[Any], split: str) -> list[Any]:
    """The classes in order: those the set declares, else the distinct values of the train split."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return list(range(feature.num_classes))
    if labels.dtype.kind not in "iuU":
        raise DataError(f"labels of the {split} split are {labels.dtype}, not classes: set label_column to another one")
    return list(np.unique(labels).tolist())


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


def _balanced_subset(labels: npt.NDArray[np.int64], size: int | None, seed: int, split: str) -> npt.NDArray[np.int64]:
    """Rows in order: each class gives its turn, until `size` are found."""
    if size is None:
        return np.arange(len(labels))
    if size > len(labels):
        raise DataError(f"the {split} split has {len(labels)} images, not {size}: lower its number of samples")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = labels[shuffled] == label
        turn[members] = np.arange(members.sum())
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:size]])


class _Split:
    """The chosen rows of one split, with their images still compressed."""

    def __init__(
        self,
        rows: datasets.Dataset,
        name: str,
        column: str,
        chosen: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        image_size: int | None,
    ) -> None:
        self.name, self.column, self.chosen, self.labels, self.image_size = name, column, chosen, labels, image_size
        self.rows = rows.select_columns([column]).with_format("arrow")

    def __len__(self) -> int:
        return len(self.chosen)

    def compressed(self, places: Sequence[int] | range) -> list[tuple[int, str, bytes]]:
        """Row number, file name and bytes of the images at some places of the subset."""
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
                    raise self._unreadable(number, file, _first_line(error)) from error
            found.append((number, file, content))
        return found

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Of all decoded images, as the first one tells."""
        number, file, content = self.compressed([0])[0]
        channels, height, width = self._decode(number, file, content).shape
        return channels, height, width

    def decode(self, places: Sequence[int] | range) -> Iterator[Pixels]:
        """The images at some places of the subset, each `[3, H, W]`; all are of one size."""
        for number, file, content in self.compressed(places):
            pixels = self._decode(number, file, content)
            if pixels.shape != self.shape:
                raise DataError(
                    f"{self._where(number, file)}: the image is {_size(pixels.shape)} but the first is "
                    f"{_size(self.shape)}: set image_size so that all are resized"
                )
            yield pixels

    def content_key(self) -> str:
        """Digest of the images' bytes and of what is done to them: the same on every machine."""
        total = hashlib.sha256(f"{_DECODING} {self.image_size} {len(self)}".encode())
        for places in _blocks(len(self)):
            for _, _, content in self.compressed(places):
                total.update(struct.pack("<q", len(content)))
                total.update(content)
        return total.hexdigest()[:32]

    def _decode(self, number: int, file: str, content: bytes) -> Pixels:
        try:
            with PIL.Image.open(io.BytesIO(content)) as image:
                upright = _upright_rgb(image)
        except (OSError, SyntaxError, ValueError, struct.error, PIL.Image.DecompressionBombError) as error:
            raise self._unreadable(number, file, _first_line(error)) from error
        if self.image_size is not None:
            upright = _resize(upright, self.image_size)
        return np.ascontiguousarray(np.asarray(upright).transpose(2, 0, 1))

    def _where(self, number: int, file: str) -> str:
        return f"{self.name} split, row {number}" + (f" ({file})" if file else "")

    def _unreadable(self, number: int, file: str, cause: str) -> DataError:
        cause = cause.split("<_io")[0].strip()
        return DataError(f"{self._where(number, file)}: not a readable image ({cause}): repair it or remove the row")


class _Streamed(BatchDataset):
    """A split that is decoded as it is asked for."""

    def __init__(self, split: _Split) -> None:
        self.split = split
        self.labels = torch.from_numpy(split.labels)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.split)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Decode the images at `indices`."""
        pixels = np.stack(list(self.split.decode(indices)))
        return torch.from_numpy(pixels), self.labels[torch.as_tensor(indices)]


def _upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
        return PIL.ImageOps.exif_transpose(image).convert("RGB")


def _resize(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The shorter side to `size`, then the middle square."""
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _cache_folder() -> Path:
    """Where prepared sets are kept; made if need be."""
    chosen = os.environ.get("DIFFSTRIDE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffstride"
    folder = Path(chosen).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write to the cache {folder} ({_first_line(error)}): set DIFFSTRIDE_CACHE to a folder that can be "
            "written"
        ) from error
    return folder


def _from_cache(split: _Split, key: str) -> Pixels:
    """The decoded images, mapped from the cache; decoded first where it has none, or only a damaged one."""
    path = _cache_folder() / f"{key}.npy"
    shape = (len(split), *split.shape)
    try:
        pixels: Pixels = np.load(path, mmap_mode="c")
        if pixels.shape == shape and pixels.dtype == np.uint8:
            return pixels
    except (OSError, ValueError, EOFError):
        pass  # missing, truncated or not an array: decode
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        _decode_all(split, unfinished, shape)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    mapped: Pixels = np.load(path, mmap_mode="c")
    return mapped


def _decode_all(split: _Split, path: Path, shape: tuple[int, ...]) -> None:
    from rich.console import Console
    from rich.progress import track

    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    blocks = list(_blocks(len(split)))
    console = Console(stderr=True)
    for places in track(blocks, f"decoding the {split.name} split", console=console, transient=True):
        for place, image in zip(places, split.decode(places), strict=True):
            pixels[place] = image
    pixels.flush()


def _blocks(length: int) -> Iterator[range]:
    return (range(start, min(start + _ROWS, length)) for start in range(0, length, _ROWS))


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-2]}x{shape[-1]}"


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
