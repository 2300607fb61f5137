"""A cache of prepared sets: entries with a checksum, and remembered digests of source files."""

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
        cure = "set DIFFSTRIDE_CACHE to a writable folder"
        raise DataError(f"cannot write to the cache {found} ({error.strerror}): {cure}") from error
    return found


def entry(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Return the path of a cache entry, after writing its content with `write` where it is missing or damaged.

    The last 32 bytes of an entry are the SHA-256 of all bytes before them.
    """
    if not _is_intact(path):
        with atomic_path(path) as unfinished:
            with unfinished.open("xb") as file:
                write(file)
            with unfinished.open("rb+") as file:
                file.write(sha256(file, unfinished.stat().st_size))
    return path


def digest_of_files(files: Sequence[Path]) -> str:
    """Return a digest of the contents of files, in their order.

    It is remembered by device, inode, size and times of every file. A change in place changes the time of change.
    """
    states = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in map(os.stat, files)]
    note = folder("sources") / digest(states)
    if note.exists():
        return note.read_text()
    total = hashlib.sha256()
    for path in watched(files, "reading the files"):
        with path.open("rb") as file:
            total.update(sha256(file))
    found = total.hexdigest()[:32]
    with suppress(OSError):  # a cache that can only be read
        atomic_write_text(note, found)
    return found


def watched(steps: Sequence[_T], description: str) -> Iterable[_T]:
    """Return the steps, with a progress bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(steps, description, console=console, transient=True, disable=not console.is_terminal)


def _is_intact(path: Path) -> bool:
    """Return whether an entry exists and has the content that was written."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        size = path.stat().st_size - _CHECKSUM
        return size >= 0 and sha256(file, size) == file.read()


def sha256(file: BinaryIO, size: float = math.inf) -> bytes:
    """Return the checksum of the next `size` bytes of a file."""
    total = hashlib.sha256()
    while size > 0 and (block := file.read(int(min(size, 1 << 20)))):
        total.update(block)
        size -= len(block)
    return total.digest()
