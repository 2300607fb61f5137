"""Sources of sets: the hub, parquet files, folders of classes. Each becomes a table with a file in each row."""

from __future__ import annotations

import functools
import glob
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    """A function from a file's content to an array. It travels to other processes."""

    media: ClassVar[str]  # "image" or "audio": the first half of MIME types, and the name of the column in folders
    suffixes: ClassVar[tuple[str, ...]]  # in lower case

    @property
    def key(self) -> str:
        """Text that differs where decoding differs: caches with another key are not used."""

    def __call__(self, content: bytes | BinaryIO) -> Array:
        """Return the array, or raise a `DataError` whose message is the cause alone."""


@dataclass(frozen=True)
class Source:
    """The splits of a set."""

    path: str  # in messages
    names: Sequence[str]
    load: Callable[[str], datasets.Dataset]
    files: Mapping[str, list[Path]] | None = None  # of a local set

    def split(self, name: str) -> datasets.Dataset:
        """Return a split by any of its usual names, or a part of it in the notation of `datasets`: `train[:90%]`."""
        import datasets

        base, part = self.resolve(name)
        if base not in self.names:
            raise DataError(
                f"{self.path} has no split {name!r}, only {', '.join(self.names)}: add it, or set train_split and "
                "test_split to two of them, or to parts of one with shuffled rows, such as train[:90%] and train[90%:]"
            )
        rows = self.load(base)
        cause = "it is empty"
        try:
            (places,) = datasets.ReadInstruction.from_spec(f"rows{part}").to_absolute({"rows": len(rows)})
            if chosen := range(len(rows))[places.from_ : places.to]:
                return rows.select(chosen)
        except (ValueError, AssertionError) as error:
            cause = one_line(error)
        raise DataError(f"{name!r} is no part of the {len(rows)} rows of {self.path} ({cause}): set another split")

    def key(self, name: str) -> str:
        """Return a digest of a split by the contents of its local files, or by its version on the hub."""
        base, part = self.resolve(name)
        return digest(cache.digest_of_files(self.files[base]) if self.files else self.load(base)._fingerprint, part)

    def resolve(self, name: str) -> tuple[str, str]:
        """Return the usual name of a split and the part of it: `("train", "[:90%]")`, `("test", "")`."""
        base, part = name, ""
        if name.endswith("]") and name not in self.names:
            base, bracket, part = name.rpartition("[")
            part = bracket + part
        return base if base in self.names else folders.canonical(base), part


def open_source(path: str, subset: str | None, decoder: Decoder, wanted: Sequence[str]) -> Source:
    """Find the splits of a set, those `wanted` at least. A local path is never looked up on the hub."""
    import datasets

    local = Path(path).expanduser().absolute()
    if not local.exists():
        if path.startswith((".", "/", "~")) or path.endswith(".parquet") or path.count("/") > 1:
            raise DataError(f"{path} does not exist: check the path, or give a name on the hub such as cifar10")
        cure = "check the name and the connection, or give a local path"
        with _one_line_errors(f"could not load {path!r} from the hub ({{}}): {cure}"):
            splits = datasets.load_dataset(path=path, name=subset)
        return Source(path, list(splits), splits.__getitem__)
    if not local.is_dir():
        return _from_tables(path, {"train": [local]})
    files = sorted(folders.listed(str(local)))
    tables = {} if folders.has_class_folders(files, decoder) else folders.tables(path, files)
    found = tables or folders.class_folders(path, files, decoder)
    absolute = {split: [local / file for file in names] for split, names in found.items()}
    if tables:
        return _from_tables(path, absolute)
    used = {s: f for s, f in absolute.items() if s in folders.USUAL or any(name.startswith(s) for name in wanted)}
    return _from_class_folders(path, used or absolute, decoder.media)


def _from_tables(path: str, files: dict[str, list[Path]]) -> Source:
    import datasets
    import pyarrow.parquet as pq

    @functools.cache
    def load(split: str) -> datasets.Dataset:
        names = [glob.escape(str(file)) for file in files[split]]  # `datasets` reads patterns
        with _one_line_errors(f"could not read {files[split][0]} ({{}}): it must be a readable .parquet file"):
            shards = [datasets.Features.from_arrow_schema(pq.read_schema(file)) for file in files[split]]
            rows = datasets.Dataset.from_parquet(names, cache_dir=str(cache.folder("sources")), batch_size=ROWS)
        if any(shard != shards[0] for shard in shards):  # `datasets` reads all by the first one's class names
            raise DataError(f"the files of split {split!r} in {path} must have the same columns and classes")
        return rows

    return Source(path, list(files), load, files)


def _from_class_folders(path: str, files: dict[str, list[Path]], column: str) -> Source:
    import datasets

    # `imagefolder` and `audiofolder` of `datasets` guess splits from words anywhere in a path: a class `train` would
    # be one. `audiofolder` also needs FFmpeg.
    classes = datasets.ClassLabel(names=sorted({file.parent.name for found in files.values() for file in found}))
    file_of = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}

    @functools.cache
    def load(split: str) -> datasets.Dataset:
        rows = {
            column: [{"bytes": None, "path": str(file)} for file in files[split]],
            "label": [file.parent.name for file in files[split]],
        }
        return datasets.Dataset.from_dict(rows, datasets.Features({column: file_of, "label": classes}))

    return Source(path, list(files), load, files)


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
        of_disk = isinstance(cause, OSError) and cause.errno is not None
        raise (cause if of_disk else DataError(message.format(one_line(cause)))) from None


def columns(features: datasets.Features, media: str, column: str | None, label: str | None) -> tuple[str, str]:
    """Return the columns of files and of labels: as named, else that of a usual name, else the only one of its type."""
    import datasets

    def choose(option: str, named: str | None, guesses: Sequence[str], fit: Sequence[str]) -> str:
        usual = [name for name in features if name.casefold() in _USUAL_COLUMNS[option]]
        found = [named] if named else usual or guesses
        if len(found) != 1 or found[0] not in fit:
            mistake = f"column {found[0]!r} cannot be the" if len(found) == 1 else "the columns leave open which is the"
            raise DataError(f"{mistake} {option}: set {option} to one of {', '.join(fit or features)}")
        return found[0]

    types = {name: getattr(feature, "dtype", "") for name, feature in features.items()}
    kind = getattr(datasets, media.capitalize())
    # In a parquet file without the hub's metadata, a file is a structure with its bytes, or only bytes.
    files = [
        name
        for name, feature in features.items()
        if isinstance(feature, kind) or (isinstance(feature, dict) and "bytes" in feature) or "binary" in types[name]
    ]
    declared = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    numbers = [name for name, dtype in types.items() if re.match("u?int|bool", dtype) and name not in declared]
    texts = [name for name, dtype in types.items() if dtype in ("string", "large_string")]
    # A text may be a class or a caption. Beside one, a number may be a class or an index: neither is guessed.
    guesses = declared or (numbers and [*numbers, *texts])
    return (
        choose(f"{media}_column", column, files, files),
        choose("label_column", label, guesses, [*declared, *numbers, *texts]),
    )
