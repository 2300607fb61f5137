"""Local folders: the split and the class of each file. A name in a path is a name, never a pattern."""

from __future__ import annotations

import mimetypes
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from diffstride.experiments.data.base import DataError

Parts: TypeAlias = tuple[str, ...]  # of a path below the folder

USUAL = ("train", "validation", "test")
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def canonical(split: str) -> str:
    """Return the usual name of a split: `"validation"` for `"Val"`. Other names stay as they are."""
    return _SPLITS.get(split.casefold(), split)


def in_order(splits: Iterable[str]) -> list[str]:
    """Return names of splits, the usual ones first."""
    return sorted(splits, key=lambda split: (USUAL.index(split) if split in USUAL else len(USUAL), split))


def listed(folder: Path) -> list[Parts]:
    """Return the visible files in a folder and in all folders below it, in order of their paths."""
    found: list[Parts] = []
    for place, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        above = Path(place).relative_to(folder).parts
        found += [(*above, name) for name in files if not name.startswith(".")]
    return sorted(found, key="/".join)


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} cannot be read ({error.strerror}): check the path") from error


def tables(path: str, files: Sequence[Parts]) -> dict[str, list[Parts]]:
    """Return the parquet files of each split.

    A split is a word in the file's name (`train-00000-of-00001.parquet`, `digits_test.parquet`), or else the name of
    its folder (`train/0.parquet`). Files whose names have no such word are splits of their own names, or the train
    split where no file has one.

    Args:
        path: the folder, as the user calls it.
        files: all files in it.
    """
    sets: dict[Parts, dict[str, list[Parts]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        *above, name = file
        if not name.lower().endswith(".parquet"):
            continue
        stem = re.sub(r"-\d{5}-of-\d{5}.*", "", name[: -len(".parquet")])
        found = {word for word in re.split(r"[^a-z]+", stem.casefold()) if word in _SPLITS}
        if not found and above and above[-1].casefold() in _SPLITS:
            found = {above.pop()}
        if len(found) > 1:
            raise DataError(f"{path}: the name of {'/'.join(file)} has the words {' and '.join(found)}: rename it")
        sets[tuple(above)][found.pop() if found else stem].append(file)
    named = {above: splits for above, splits in sets.items() if any(canonical(split) in USUAL for split in splits)}
    choice = named or sets
    if len(choice) > 1:
        folders = ", ".join("/".join((path, *above)) for above in choice)
        raise DataError(f"{path} has several sets: give the path of one of {folders}")
    for splits in choice.values():
        return _by_split(path, splits) if named else {"train": [file for found in splits.values() for file in found]}
    return {}


def has_class_folders(files: Sequence[Parts], suffixes: Sequence[str]) -> bool:
    """Return whether a split of a usual name has folders of classes, whatever else there is."""
    return any(len(file) == 3 and canonical(file[0]) in USUAL and _suffix(file) in suffixes for file in files)


def class_folders(path: str, files: Sequence[Parts], media: str, suffixes: Sequence[str]) -> dict[str, list[Parts]]:
    """Return the files of each split of a folder with `SPLIT/CLASS/FILE`.

    Args:
        path: the folder, as the user calls it.
        files: all files in it. Those without one of the suffixes are left out.
        media: their MIME type: "image". Other files of this type are an error.
        suffixes: suffixes of the files that are read, in lower case.
    """
    splits: dict[str, list[Parts]] = defaultdict(list)
    elsewhere: list[Parts] = []
    for file in files:
        if _suffix(file) in suffixes:
            (splits[file[0]] if len(file) == 3 else elsewhere).append(file)
        elif len(file) == 3 and (mimetypes.guess_type(file[-1])[0] or "").startswith(f"{media}/"):
            raise DataError(f"{path}: {_suffix(file)} files are not read: convert or remove {'/'.join(file)}")
    misplaced = [file for file in elsewhere if not splits or (len(file) > 1 and file[0] in splits)]
    if misplaced or not splits:
        found = f"{'/'.join(misplaced[0])} outside of SPLIT/CLASS" if misplaced else f"no {media} files"
        raise DataError(
            f"{path} has {found}: it must be a folder with train.parquet and test.parquet, or with "
            f"train/<class>/<{media}> and test/<class>/<{media}>"
        )
    return _by_split(path, splits)


def _by_split(path: str, named: Mapping[str, list[Parts]]) -> dict[str, list[Parts]]:
    """Return the files by the usual names of their splits, each of which must occur once."""
    found: dict[str, list[Parts]] = {}
    for name, files in named.items():
        if found.setdefault(canonical(name), files) is not files:
            raise DataError(f"{path} has two names for the {canonical(name)} split: rename or remove {name}")
    return found


def _suffix(file: Parts) -> str:
    return os.path.splitext(file[-1])[1].lower()
