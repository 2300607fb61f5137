"""Local folders: which file belongs to which split and class. A name in a path is a name, never a pattern."""

from __future__ import annotations

import mimetypes
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from diffstride.experiments.data.base import DataError

Parts: TypeAlias = tuple[str, ...]  # of a path below the folder
Identity: TypeAlias = tuple[int, int]  # device and inode

USUAL = ("train", "validation", "test")
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def canonical(split: str) -> str:
    """Return the usual name of a split: `"validation"` for `"Val"`. Other names stay as they are."""
    return _SPLITS.get(split.casefold(), split)


def listed(folder: Path) -> list[Parts]:
    """Return the visible files in a folder and in all folders below it, in order of their paths."""
    return sorted(_walk(os.fspath(folder)), key="/".join)


def in_order(splits: Iterable[str]) -> list[str]:
    """Return names of splits, the usual ones first."""
    return sorted(splits, key=lambda split: (USUAL.index(split) if split in USUAL else len(USUAL), split))


def _walk(folder: str) -> Iterator[Parts]:
    waiting: list[tuple[str, Parts, tuple[Identity, ...]]] = [(folder, (), ())]
    while waiting:
        path, parts, above = waiting.pop()
        identity = identify(path)
        if identity in above:  # a link to a folder that it lies in
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append((entry.path, (*parts, entry.name), (*above, identity)))
                else:
                    yield (*parts, entry.name)


def identify(path: str | Path) -> Identity:
    """Return what two paths of one file or folder have in common."""
    info = os.stat(path)
    return info.st_dev, info.st_ino


def shared(first: Iterable[Path], second: Iterable[Path]) -> tuple[Path, Path] | None:
    """Return two paths of one file, if there is a file in both of two lists. Files that are missing are left out."""
    known = dict(_identified(first))
    return next(((known[identity], file) for identity, file in _identified(second) if identity in known), None)


def _identified(files: Iterable[Path]) -> Iterator[tuple[Identity, Path]]:
    for file in files:
        with suppress(OSError):
            yield identify(file), file


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
    words: dict[tuple[Parts, str], str] = {}
    for file in files:
        if not file[-1].lower().endswith(".parquet"):
            continue
        *above, name = file
        stem = re.sub(r"-\d{5}-of-\d{5}.*", "", name[: -len(".parquet")])
        found = {word for word in re.split(r"[^a-z]+", stem.casefold()) if word in _SPLITS}
        if not found and above and above[-1].casefold() in _SPLITS:
            found = {above.pop().casefold()}
        if len(found) > 1:
            raise DataError(
                f"{path}: the name of {'/'.join(file)} has two splits, {', '.join(sorted(found))}: rename it"
            )
        word = found.pop() if found else stem
        split = canonical(word)
        if words.setdefault((tuple(above), split), word) != word:
            raise DataError(f"{path} has two names for the {split} split: remove or rename {'/'.join(file)}")
        sets[tuple(above)][split].append(file)
    named = {above: splits for above, splits in sets.items() if any(split in _SPLITS for split in splits)}
    choice = named or sets
    if len(choice) > 1:
        folders = ", ".join("/".join((path, *above)) for above in choice)
        raise DataError(f"{path} has several sets: give the path of one of {folders}")
    for splits in choice.values():
        return dict(splits) if named else {"train": [file for found in splits.values() for file in found]}
    return {}


def has_class_folders(files: Sequence[Parts], suffixes: Sequence[str]) -> bool:
    """Return whether a split of a usual name has folders of classes, whatever else there is."""
    return any(len(file) == 3 and canonical(file[0]) in USUAL and _suffix(file) in suffixes for file in files)


def _suffix(file: Parts) -> str:
    return os.path.splitext(file[-1])[1].lower()


def class_folders(
    path: str, files: Sequence[Parts], media: str, noun: str, suffixes: Sequence[str]
) -> dict[str, list[Parts]]:
    """Return the files of each split of a folder with `SPLIT/CLASS/FILE`.

    Args:
        path: the folder, as the user calls it.
        files: all files in it. Those without one of the suffixes are left out.
        media: what they are by MIME type: "image". Other files of this type are an error.
        noun: what messages call one.
        suffixes: of the files that are read, in lower case.
    """
    splits: dict[str, list[Parts]] = {}
    elsewhere: list[Parts] = []
    for file in files:
        suffix = _suffix(file)
        if suffix in suffixes:
            if len(file) == 3:
                splits.setdefault(canonical(file[0]), []).append(file)
            else:
                elsewhere.append(file)
        elif len(file) == 3 and (mimetypes.guess_type(file[-1])[0] or "").startswith(f"{media}/"):
            raise DataError(f"{path}: {suffix} is no {noun} format that is read: convert or remove {'/'.join(file)}")
    for split, found in splits.items():
        if len(names := sorted({file[0] for file in found})) > 1:
            raise DataError(f"{path} has two folders for the {split} split: remove or rename {names[1]}")
    folders = {found[0][0] for found in splits.values()}
    for file in elsewhere:
        belongs = len(file) > 1 and (file[0] in folders or file[0].casefold() in _SPLITS)
        unlabelled = len(file) == 2 and canonical(file[0]) == "test" and "validation" in splits and "test" not in splits
        if not splits or (belongs and not unlabelled):
            raise DataError(
                f"{path} has {noun}s outside of SPLIT/CLASS, at {'/'.join(file)}: "
                f"it must be a folder with train/<class>/<{noun}> and test/<class>/<{noun}>"
            )
    return splits
