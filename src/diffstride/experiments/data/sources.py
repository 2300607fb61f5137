"""Sources of sets: the hub, parquet files, folders of classes. Each becomes a table with a file in each row."""

from __future__ import annotations

import functools
import glob
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Protocol

import numpy.typing as npt

from diffstride._text import one_line
from diffstride.experiments.data import cache, folders
from diffstride.experiments.data.base import DataError
from diffstride.experiments.data.hashing import digest

if TYPE_CHECKING:
    import datasets

Array = npt.NDArray[Any]

ROWS = 128  # read and decoded at once: sounds may take megabytes each
_USUAL_COLUMNS = {"image_column": ("image", "img"), "audio_column": ("audio",), "label_column": ("label", "class")}


class Decoder(Protocol):
    """A function from a file's content to an array. It travels to other processes.

    Attributes:
        media: MIME type of the files, "image" or "audio"; also the name of their column.
        suffixes: suffixes of the files that count in a folder, in lower case.
    """

    media: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @property
    def key(self) -> str:
        """Text that differs where decoding differs: caches with another key are not used."""
        ...

    def __call__(self, content: bytes | BinaryIO) -> Array:
        """Return the array.

        Raises:
            DataError: content that cannot be decoded; the message is the cause alone.
        """
        ...


@dataclass(frozen=True)
class Source:
    """The splits of a set.

    Attributes:
        path: name of the set in messages.
        names: names of the splits.
        load: returns the table of a split.
        files: local files of each split, none for a set of the hub.
    """

    path: str
    names: Sequence[str]
    load: Callable[[str], datasets.Dataset]
    files: dict[str, list[Path]] = field(default_factory=dict)

    def split(self, name: str) -> datasets.Dataset:
        """Return a split by any of its usual names, or a part of it in the notation of `datasets`: `train[:90%]`."""
        import datasets

        base, part = self._resolve(name)
        if base not in self.names:
            raise DataError(
                f"{self.path} has no split {name!r}, only {', '.join(self.names)}: add it, or set train_split and "
                "test_split to two of them, or to parts of one with shuffled rows, such as train[:90%] and train[90%:]"
            )
        rows = self.load(base)
        if part:
            try:
                (places,) = datasets.ReadInstruction.from_spec(f"rows{part}").to_absolute({"rows": len(rows)})
            except (ValueError, AssertionError) as error:
                raise DataError(f"{name!r} is no part of a split of {len(rows)} rows ({one_line(error)})") from error
            rows = rows.select(range(len(rows))[places.from_ : places.to] or range(0))
        if not len(rows):
            raise DataError(f"the {name} split of {self.path} is empty: set train_split or test_split to another one")
        return rows

    def key(self, name: str) -> str:
        """Return a digest of a split by the contents of its local files, or by its version on the hub."""
        base, part = self._resolve(name)
        return digest(cache.digest_of_files(self.files[base]) if self.files else self.load(base)._fingerprint, part)

    def _resolve(self, name: str) -> tuple[str, str]:
        base, part = (name, "") if name in self.names else base_and_part(name)
        return base if base in self.names else folders.canonical(base), part


def base_and_part(split: str) -> tuple[str, str]:
    """Return the name of a whole split and the part of it: `("train", "[:90%]")`, `("test", "")`."""
    part = re.fullmatch(r"(.+)(\[[^\[\]]*\])", split)
    return (part[1], part[2]) if part else (split, "")


def open_source(path: str, subset: str | None, decoder: Decoder, wanted: Sequence[str]) -> Source:
    """Find the splits of a set. A local path is never looked up on the hub.

    Args:
        path: a local path, or a name on the hub.
        subset: the hub's name of one of several configurations of a set.
        decoder: decoder of the files.
        wanted: names of the splits that are needed.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if path.startswith((".", "/", "~")) or path.endswith(".parquet") or path.count("/") > 1:
            raise DataError(f"{path} does not exist: check the path, or give a name on the hub such as cifar10")
        return _from_hub(path, subset)
    if not local.is_dir():
        if local.suffix.lower() != ".parquet":
            raise DataError(f"{path} is not a parquet file: give a .parquet file or a folder")
        return _from_tables(path, {"train": [local]})
    files = folders.listed(local)
    tables = {} if folders.has_class_folders(files, decoder.suffixes) else folders.tables(path, files)
    if tables:
        absolute = {split: [local.joinpath(*file) for file in found] for split, found in tables.items()}
        return _from_tables(path, absolute)
    splits = folders.class_folders(path, files, decoder.media, decoder.suffixes)
    used = {base_and_part(name)[0] for name in wanted}.union(folders.USUAL)
    return _from_class_folders(path, local, {s: f for s, f in splits.items() if s in used} or splits, decoder.media)


def _from_hub(path: str, subset: str | None) -> Source:
    import datasets

    with _one_line_errors(
        f"could not load {path!r} from the hub ({{}}): check the name and the connection, or give a local path"
    ):
        splits = datasets.load_dataset(path=path, name=subset)
    return Source(path, list(splits), splits.__getitem__)


def _from_tables(path: str, files: dict[str, list[Path]]) -> Source:
    import datasets
    import pyarrow.parquet as pq

    @functools.cache
    def load(split: str) -> datasets.Dataset:
        names = [glob.escape(str(file.absolute())) for file in files[split]]  # `datasets` reads patterns
        with _one_line_errors(f"could not read {files[split][0]} ({{}}): it must be a readable .parquet file"):
            shards = [datasets.Features.from_arrow_schema(pq.read_schema(file)) for file in files[split]]
            rows = datasets.Dataset.from_parquet(names, cache_dir=str(cache.folder("sources")), batch_size=ROWS)
        if any(shard != shards[0] for shard in shards):  # `datasets` reads all by the first one's class names
            raise DataError(f"the files of split {split!r} in {path} must have the same columns and classes")
        return rows

    return Source(path, folders.in_order(files), load, files)


@contextmanager
def _one_line_errors(message: str) -> Iterator[None]:
    """Raise the errors of `datasets` in one line. Its progress bars are for terminals only."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:  # of the disk
            raise cause from None
        raise DataError(message.format(one_line(cause))) from error


def _from_class_folders(path: str, local: Path, splits: dict[str, list[folders.Parts]], column: str) -> Source:
    import datasets

    # `imagefolder` and `audiofolder` of `datasets` guess splits from words anywhere in a path: a class `train` would
    # be one. `audiofolder` also needs FFmpeg.
    classes = datasets.ClassLabel(names=sorted({kind for files in splits.values() for _, kind, _ in files}))
    file_of = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}

    root = local.absolute()
    paths = {split: [root.joinpath(*file) for file in found] for split, found in splits.items()}

    @functools.cache
    def load(split: str) -> datasets.Dataset:
        rows = {
            column: [{"bytes": None, "path": str(file)} for file in paths[split]],
            "label": [kind for _, kind, _ in splits[split]],
        }
        return datasets.Dataset.from_dict(rows, datasets.Features({column: file_of, "label": classes}))

    return Source(path, folders.in_order(splits), load, paths)


def columns(features: datasets.Features, media: str, column: str | None, label: str | None) -> tuple[str, str]:
    """Return the columns of files and of labels: as named, else that of a usual name, else the only one of its type."""
    import datasets

    def choose(option: str, named: str | None, usual: Sequence[str], of_type: Sequence[str]) -> str:
        if named is not None and named not in features:
            raise DataError(f"there is no column {named!r}: set {option} to one of {', '.join(features)}")
        found = [named] if named else [name for name in usual if name.casefold() in _USUAL_COLUMNS[option]] or of_type
        if len(found) != 1:
            choice = ", ".join(found or features)
            raise DataError(f"{len(found)} columns could be the {option}: set {option} to one of {choice}")
        return found[0]

    types = {name: getattr(feature, "dtype", "") for name, feature in features.items()}
    kind = getattr(datasets, media.capitalize())
    # In a parquet file without the hub's metadata, a file is a structure with its bytes, or only bytes.
    files = [
        name
        for name, feature in features.items()
        if isinstance(feature, kind) or (isinstance(feature, dict) and "bytes" in feature) or "binary" in types[name]
    ]
    column = choose(f"{media}_column", column, files, files)
    if column not in files:
        raise DataError(f"column {column!r} holds no {media} files: set {media}_column to another column")
    declared = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    numbers = [name for name, dtype in types.items() if re.match("u?int|bool", dtype)]
    # A text may be a class or a caption. Beside one, a number may be a class or an index: neither is guessed.
    guesses = declared or (numbers and [*numbers, *(name for name, dtype in types.items() if "string" in dtype)])
    label = choose("label_column", label, [name for name in features if name != column], guesses)
    if types[label] not in ("string", "large_string") and label not in (*declared, *numbers):
        raise DataError(f"column {label!r} holds no classes: set label_column to another column")
    return column, label
