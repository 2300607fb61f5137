"""A cache of prepared sets: entries with a checksum, and remembered digests of source files."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from diffstride._files import atomic_path, atomic_write_text
from diffstride.experiments.data.base import DataError
from diffstride.experiments.data.hashing import digest

_T = TypeVar("_T")
_CHECKSUM = hashlib.sha256().digest_size


def folder(*parts: str) -> Path:
    """Return the folder of the cache, or one below it. It is created where it is missing."""
    chosen = os.environ.get("DIFFSTRIDE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffstride"
    found = Path(chosen).expanduser().joinpath(*parts)
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(error) from error
    return found


def entry(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Return the path of a cache entry, after writing it where it is missing or damaged.

    The last 32 bytes of an entry are the SHA-256 of all bytes before them.

    Args:
        path: path of the entry.
        write: writes the content to a new file.
    """
    if not _is_intact(path):
        try:
            with atomic_path(path) as unfinished:
                with unfinished.open("xb") as file:
                    write(file)
                with unfinished.open("rb+") as file:
                    file.write(sha256(file, unfinished.stat().st_size))
        except PermissionError as error:
            raise _unwritable(error) from error
    return path


def digest_of_files(files: Sequence[Path]) -> str:
    """Return a digest of the contents of files, in their order.

    The digest is remembered by device, inode, size, time of modification and time of change of every file. A file that
    is changed in place gets another time of change.
    """
    try:
        states = [os.stat(file) for file in files]
        note = folder("sources") / digest(
            [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states]
        )
        if note.exists():
            return note.read_text()
        total = hashlib.sha256()
        for path in watched(files, "reading the files"):
            with path.open("rb") as file:
                total.update(sha256(file))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    found = total.hexdigest()[:32]
    with suppress(OSError):  # a cache that can only be read
        atomic_write_text(note, found)
    return found


def _unwritable(error: OSError) -> DataError:
    return DataError(
        f"cannot write to the cache {error.filename} ({error.strerror}): set DIFFSTRIDE_CACHE to a writable folder"
    )


def watched(steps: Sequence[_T], description: str) -> Iterable[_T]:
    """Return the steps, with a progress bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(steps, description, console=console, transient=True, disable=not console.is_terminal)


def _is_intact(path: Path) -> bool:
    """Return whether an entry exists and has the content that was written."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size - _CHECKSUM
            return size >= 0 and sha256(file, size) == file.read()
    except OSError:
        return False


def sha256(file: BinaryIO, size: float = math.inf) -> bytes:
    """Return the checksum of the next `size` bytes of a file."""
    total = hashlib.sha256()
    while size > 0 and (block := file.read(int(min(size, 1 << 20)))):
        total.update(block)
        size -= len(block)
    return total.digest()
