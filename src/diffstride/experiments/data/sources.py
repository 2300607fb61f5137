"""Where sets come from: the hub, parquet files, folders of classes. All become tables with a file in each row."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Protocol

import numpy.typing as npt

from diffstride._files import open_regular
from diffstride.experiments.data import cache, folders
from diffstride.experiments.data.base import DataError

if TYPE_CHECKING:
    import datasets

Array = npt.NDArray[Any]

ROWS = 128  # read and decoded at once: sounds may take megabytes each
_PART = re.compile(r"(.+)(\[[^\[\]]*\])")  # of a split: `train[:90%]`
_PARTS = "set train_split and test_split to parts of one, such as train[:90%] and train[90%:], if rows are shuffled"
_OTHER_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".arrow", ".feather", ".xlsx", ".npz", ".tar", ".zip")
_USUAL_COLUMNS = {"image_column": ("image", "img"), "audio_column": ("audio",), "label_column": ("label", "class")}


class Decoder(Protocol):
    """A function from a file's content to an array. It travels to other processes."""

    noun: ClassVar[str]
    """Name of the content in messages: "image"."""
    option: ClassVar[str]
    """Setting that names the column of files: "image_column"."""
    feature: ClassVar[str]
    """Class of the column in `datasets`, "Image"; in lower case, the MIME type."""
    suffixes: ClassVar[tuple[str, ...]]
    """Suffixes of the files that count in a folder, in lower case."""
    largest: ClassVar[int | None]
    """Largest size in bytes of a file that is read; None where a file need not fit into memory."""

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

    def misfit(self, shape: Sequence[int], first: Sequence[int]) -> str:
        """Return the message about an array whose shape is not that of the first one."""
        ...


@dataclass(frozen=True)
class Source:
    """The splits of a set.

    Attributes:
        path: name of the set in messages.
        names: of the splits.
        load: returns the table of a split.
        cure: what to do where the set has one split only; `{split}` stands for the other one.
        tables: the local parquet files of each split; empty for other sets.
    """

    path: str
    names: Sequence[str]
    load: Callable[[str], datasets.Dataset]
    cure: str
    tables: Mapping[str, Sequence[Path]]

    def resolve(self, name: str) -> tuple[str | None, str]:
        """Return the split that a name means, or None where there is none, and the part of it."""
        base, part = (name, "") if name in self.names else base_and_part(name)
        return next((each for each in (base, folders.canonical(base)) if each in self.names), None), part

    def split(self, name: str) -> datasets.Dataset:
        """Return a split by any of its usual names, or a part of it, as `datasets` writes one: `train[:90%]`."""
        import datasets

        found, part = self.resolve(name)
        if found is None:
            names = ", ".join(self.names)
            if len(self.names) > 1:
                raise DataError(f"{self.path} has no split {name!r}: set train_split and test_split to two of {names}")
            raise DataError(
                f"{self.path} has no split {name!r}, only {names}: {self.cure.format(split=base_and_part(name)[0])}"
            )
        rows = self.load(found)
        if part:
            try:
                (places,) = datasets.ReadInstruction.from_spec(f"rows{part}").to_absolute({"rows": len(rows)})
            except (ValueError, AssertionError) as error:
                raise DataError(f"{name!r} is no part of a split of {len(rows)} rows ({first_line(error)})") from error
            rows = rows.select(range(len(rows))[places.from_ : places.to] or range(0))
        if not len(rows):
            raise DataError(f"the {name} split of {self.path} is empty: set train_split or test_split to another one")
        return rows


def base_and_part(split: str) -> tuple[str, str]:
    """Return the name of a whole split, and the part of it that is meant: `("train", "[:90%]")`, `("test", "")`."""
    part = _PART.fullmatch(split)
    return (part[1], part[2]) if part else (split, "")


def open_source(path: str, subset: str | None, decoder: Decoder, wanted: Sequence[str]) -> Source:
    """Find the splits of a set. With a local path nothing leaves the machine.

    Args:
        path: a local path, or a name on the hub.
        subset: the hub's name of one of several configurations of a set.
        decoder: of the files.
        wanted: names of the splits that will be asked for.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if path.startswith((".", "/", "~")) or path.endswith(".parquet") or path.count("/") > 1:
            raise DataError(f"{path} does not exist: check the path, or give a name on the hub such as cifar10")
        return _from_hub(path, subset, decoder)
    if not local.is_dir():
        if local.suffix.lower() != ".parquet":
            raise DataError(f"{path} is not a parquet file: give a .parquet file or a folder")
        return _from_tables(path, {"train": [local]}, f"give a folder with train.parquet and test.parquet, or {_PARTS}")
    try:
        files = folders.listed(local)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): check the path") from error
    noun, suffixes = decoder.noun, decoder.suffixes
    tables = {} if folders.has_class_folders(files, suffixes) else folders.tables(path, files)
    if tables:
        absolute = {split: [local.joinpath(*file) for file in found] for split, found in tables.items()}
        return _from_tables(path, absolute, f"add {{split}}.parquet, or {_PARTS}")
    splits = folders.class_folders(path, files, decoder.feature.lower(), noun, suffixes)
    if not splits:
        other = next(("/".join(file) for file in files if file[-1].lower().endswith(_OTHER_TABLES)), None)
        raise DataError(
            f"{path} has no {noun}s{f' that are read ({other} is no parquet file)' if other else ''}: it must be a "
            f"folder with train.parquet and test.parquet, or with train/<class>/<{noun}> and test/<class>/<{noun}>"
        )
    used = {base_and_part(name)[0] for name in wanted}.union(folders.USUAL)
    splits = {split: found for split, found in splits.items() if split in used} or splits
    return _from_class_folders(path, local, splits, decoder)


def _from_hub(path: str, subset: str | None, decoder: Decoder) -> Source:
    import datasets

    try:
        with _quiet_unless_watched():
            builder = datasets.load_dataset_builder(path=path, name=subset)
            builder.download_and_prepare()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"could not load {path!r} from the hub ({first_line(error.__cause__ or error)}): check the name and the "
            f"connection, or give a local path (a parquet file, or a folder of parquet files or of {decoder.noun}s)"
        ) from error

    @functools.cache
    def load(split: str) -> datasets.Dataset:
        if not builder.info.splits[split].num_examples:
            return datasets.Dataset.from_dict({})
        return builder.as_dataset(split)

    return Source(path, [str(name) for name in builder.info.splits], load, _PARTS, {})


@contextmanager
def _quiet_unless_watched() -> Iterator[None]:
    """Silence the log of `datasets`, and its progress bars where standard error is no terminal."""
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


def _from_tables(path: str, files: Mapping[str, Sequence[Path]], cure: str) -> Source:
    return Source(path, folders.in_order(files), functools.cache(lambda split: _table(files[split])), cure, files)


def _table(files: Sequence[Path]) -> datasets.Dataset:
    """Return the rows of parquet files, mapped from an Arrow file in the cache, where any row is found at once."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = files[0]

    def write(arrow: BinaryIO) -> None:
        nonlocal file
        with open_regular(file) as opened:
            schema = _without_dictionaries(pq.read_schema(opened))
        with pa.ipc.new_stream(arrow, schema) as writer:
            for file in cache.watched(files, "preparing the set"):
                with open_regular(file) as opened:
                    shard = pq.ParquetFile(opened, buffer_size=1 << 20)
                    if _declared_classes(shard.schema_arrow) != _declared_classes(schema):
                        raise ValueError(f"its classes are not those of {files[0].name}")
                    for batch in shard.iter_batches(ROWS):
                        writer.write_table(pa.Table.from_batches([batch]).select(schema.names).cast(schema))

    key = cache.digest_of_files(files)
    try:
        entry = cache.entry(cache.folder("sources") / f"{key}.arrow", write, once=True)
        return datasets.Dataset(datasets.table.MemoryMappedTable.from_file(str(entry)), fingerprint=key)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"could not read {file} ({first_line(error)}): it must be a readable .parquet file") from error


def _without_dictionaries(schema: Any) -> Any:
    """Return a schema in which columns that are stored as dictionaries, such as pandas' categories, are plain."""
    import pyarrow as pa

    for i, field in enumerate(schema):
        if pa.types.is_dictionary(field.type):
            schema = schema.set(i, field.with_type(field.type.value_type))
    return schema


def _declared_classes(schema: Any) -> dict[str, list[str]]:
    import datasets

    features = datasets.Features.from_arrow_schema(_without_dictionaries(schema))
    return {name: each.names for name, each in features.items() if isinstance(each, datasets.ClassLabel)}


def _from_class_folders(
    path: str, local: Path, splits: Mapping[str, Sequence[folders.Parts]], decoder: Decoder
) -> Source:
    import datasets
    import pyarrow as pa

    classes = sorted({kind for files in splits.values() for _, kind, _ in files})
    column, number = decoder.feature.lower(), {kind: i for i, kind in enumerate(classes)}
    # Names of files need not be text, so paths are bytes here.
    file_of = {"bytes": datasets.Value("binary"), "path": datasets.Value("binary")}
    features = datasets.Features({column: file_of, "label": datasets.ClassLabel(names=classes)})

    def load(split: str) -> datasets.Dataset:
        paths = [os.fsencode(os.path.join(local.absolute(), *file)) for file in splits[split]]
        files = pa.StructArray.from_arrays(
            [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.binary())], ["bytes", "path"]
        )
        labels = pa.array([number[kind] for _, kind, _ in splits[split]], pa.int64())
        table = pa.table([files, labels], schema=features.arrow_schema)
        return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="files")

    cure = f"add a folder {{split}}/<class>/<{decoder.noun}>"
    return Source(path, folders.in_order(splits), functools.cache(load), cure, {})


def columns(features: datasets.Features, decoder: Decoder, column: str | None, label: str | None) -> tuple[str, str]:
    """Return the columns of files and of labels: as named, else that of a usual name, else the only one of its type."""
    import datasets

    def is_file(feature: Any) -> bool:
        if isinstance(feature, dict):  # the layout of a file in a parquet file without the hub's metadata
            return "bytes" in feature
        return isinstance(feature, getattr(datasets, decoder.feature)) or "binary" in getattr(feature, "dtype", "")

    def choose(
        option: str, named: str | None, candidates: list[str], usual: list[str], possible: Sequence[str] = ()
    ) -> str:
        everything = ", ".join(features)
        if named is not None:
            if named not in features:
                raise DataError(f"there is no column {named!r}: set {option} to one of {everything}")
            return named
        found = [name for name in usual if name.casefold() in _USUAL_COLUMNS[option]] or candidates
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(f"columns {', '.join(found)} could all be the {option}: set {option} to one of them")
        choice = _either(possible) if possible else f"one of {everything}"
        raise DataError(f"no column looks like the {option}: set {option} to {choice}")

    def of_type(*kinds: str) -> list[str]:
        values = {name: each.dtype for name, each in features.items() if isinstance(each, datasets.Value)}
        return [name for name, dtype in values.items() if any(kind in dtype for kind in kinds)]

    files = [name for name, feature in features.items() if is_file(feature)]
    declared = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    whole = of_type("int", "bool")
    # A text may be a class or a caption. Beside one, a number may be a class or an index: neither is guessed.
    texts = of_type("string")
    guesses = declared or (whole and [*whole, *texts])
    option = decoder.option
    column = choose(option, column, files, files)
    label = choose("label_column", label, guesses, [name for name in features if name != column], texts)
    if not is_file(features[column]):
        raise DataError(
            f"column {column!r} holds no {decoder.noun}s: set {option} to {_either(files or list(features))}"
        )
    if not isinstance(features[label], datasets.ClassLabel | datasets.Value) or is_file(features[label]):
        raise DataError(f"column {label!r} holds no classes: set label_column to {_either(declared or list(features))}")
    return column, label


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
