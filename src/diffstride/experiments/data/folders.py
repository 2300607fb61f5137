"""Local folders: the split and the class of each file. A name in a path is a name, never a pattern."""

from __future__ import annotations

import mimetypes
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from diffstride.experiments.data.base import DataError

if TYPE_CHECKING:
    from diffstride.experiments.data.sources import Decoder

USUAL = ("train", "validation", "test")
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def canonical(split: str) -> str:
    """Return the usual name of a split: `"validation"` for `"Val"`. Other names stay as they are."""
    return _SPLITS.get(split.casefold(), split)


def listed(folder: str, above: str = "") -> Iterator[str]:
    """Yield the visible files in a folder and in all folders below it, as paths below the folder."""
    for entry in os.scandir(os.path.join(folder, above)):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from listed(folder, f"{above}{entry.name}/")
        else:
            yield above + entry.name


def tables(path: str, files: Sequence[str]) -> dict[str, list[str]]:
    """Return the parquet files of each split.

    A split is a word in the file's name (`train-00000-of-00001.parquet`, `digits_test.parquet`), or else the name of
    its folder (`train/0.parquet`). Files without such a word are left out, or the train split where no file has one.
    """
    sets: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        *above, name = file.split("/")
        if name.lower().endswith(".parquet"):
            words = _SPLITS.keys() & re.split(r"[^a-z]+", name.casefold())
            if not words and above and above[-1].casefold() in _SPLITS:
                words = {above.pop().casefold()}
            sets["/".join(above)]["/".join(sorted(words))].append(file)
    named = {above: splits for above, splits in sets.items() if any(splits)}
    choice = named or sets
    if len(choice) > 1:
        folders = ", ".join(os.path.join(path, above) for above in choice)
        raise DataError(f"{path} has several sets: give the path of one of {folders}")
    for splits in choice.values():
        unnamed = splits.pop("", [])
        return _by_split(path, splits) if named else {"train": unnamed}
    return {}


def has_class_folders(files: Sequence[str], decoder: Decoder) -> bool:
    """Return whether a split of a usual name has folders of classes, whatever else there is."""
    return any(file.count("/") == 2 and canonical(file.split("/")[0]) in USUAL for file in _media(files, decoder))


def class_folders(path: str, files: Sequence[str], decoder: Decoder) -> dict[str, list[str]]:
    """Return the files of each split of a folder with `SPLIT/CLASS/FILE`."""
    splits: dict[str, list[str]] = defaultdict(list)
    elsewhere: list[str] = []
    for file in _media(files, decoder):
        (splits[file.split("/")[0]] if file.count("/") == 2 else elsewhere).append(file)
    misplaced = [file for file in elsewhere if not splits or file.split("/")[0] in splits]
    if misplaced or not splits:
        found = f"{misplaced[0]} outside of SPLIT/CLASS" if misplaced else f"no {decoder.media} files"
        raise DataError(
            f"{path} has {found}: it must be a folder with train.parquet and test.parquet, or with "
            f"train/<class>/<{decoder.media}> and test/<class>/<{decoder.media}>"
        )
    return _by_split(path, splits)


def _media(files: Iterable[str], decoder: Decoder) -> Iterator[str]:
    """Yield the files of the decoder's type; also those of formats that it refuses, so that none is passed over."""
    for file in files:
        kind = mimetypes.guess_type(file)[0] or ""
        if file.lower().endswith(decoder.suffixes) or kind.startswith(f"{decoder.media}/"):
            yield file


def _by_split(path: str, named: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the files by the usual names of their splits, each of which must occur once."""
    found: dict[str, list[str]] = {}
    for name, files in named.items():
        if "/" in name or canonical(name) in found:
            raise DataError(f"{path} has two names for a split: rename or remove {files[0]}")
        found[canonical(name)] = files
    return found
