"""A cache of prepared sets: entries that carry a checksum, and digests of the files that sets are made from."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from diffstride._files import atomic_path, open_regular
from diffstride.experiments.data.base import DataError, digest

_T = TypeVar("_T")
_SEAL = hashlib.sha256().digest_size
_RECENT = 2 * 10**9  # nanoseconds; two changes within them may have one time of change


def folder(*parts: str) -> Path:
    """Return the folder of the cache, or one below it, after making it if need be."""
    chosen = os.environ.get("DIFFSTRIDE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffstride"
    found = Path(chosen).expanduser().joinpath(*parts)
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(found, error) from error
    return found


def entry(path: Path, write: Callable[[BinaryIO], object], *, once: bool = False) -> Path:
    """Return the path of a cache entry, after writing it where it is missing or damaged.

    The last 32 bytes of an entry are the SHA-256 of all bytes before them.

    Args:
        path: of the entry.
        write: writes the content to a new file.
        once: check the content only where the entry's size or times have changed since the last check.
    """
    if _is_known_intact(path) if once else _is_intact(path):
        return path
    try:
        if path.is_dir():  # known before anything is decoded
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with atomic_path(path) as unfinished:
            with unfinished.open("xb") as file:
                write(file)
            with unfinished.open("rb+") as file:
                file.write(_sha256(file, unfinished.stat().st_size))
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise _unwritable(path, error) from error
    return path


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot write to the cache {path} ({error.strerror}): set DIFFSTRIDE_CACHE to a writable folder")


def digest_of_files(files: Sequence[Path]) -> str:
    """Return a digest of the contents of files, in their order.

    It is remembered by device, inode, size, time of modification and time of change of every file. No file can be
    changed in place and keep its time of change.
    """
    try:
        stamps, settled = _stamps(files)
        note = folder("sources") / digest("content", stamps)
        if settled and _is_intact(note):
            return note.read_bytes()[:-_SEAL].decode()
        total = hashlib.sha256()
        for file in watched(files, "reading the files"):
            with open_regular(file) as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    found = total.hexdigest()[:32]
    if settled:
        with suppress(OSError, DataError):  # a cache that can only be read
            entry(note, lambda opened: opened.write(found.encode()))
    return found


def watched(steps: Sequence[_T], description: str) -> Iterable[_T]:
    """Return the steps, with a progress bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(steps, description, console=console, transient=True, disable=not console.is_terminal)


def _is_intact(path: Path) -> bool:
    """Return whether an entry is there and has the content that was written."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size - _SEAL
            return size >= 0 and _sha256(file, size) == file.read()
    except OSError:
        return False


def _is_known_intact(path: Path) -> bool:
    """Return whether an entry is intact, without reading it where it has not changed since that was found."""
    try:
        stamps, settled = _stamps([path])
    except OSError:
        return False
    note = folder("sources") / digest("intact", stamps)
    if settled and note.is_file():
        return True
    intact = _is_intact(path)
    if settled and intact:
        with suppress(OSError):
            note.touch()
    return intact


def _sha256(file: BinaryIO, size: int) -> bytes:
    """Return the checksum of the next `size` bytes of a file."""
    total = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        total.update(block)
        size -= len(block)
    return total.digest()


def _stamps(files: Sequence[Path]) -> tuple[list[tuple[int, int, int, int, int]], bool]:
    """Return what changes whenever a file's content does, and whether the last change is long enough ago for that."""
    now = time.time_ns()
    states = [os.stat(file) for file in files]
    found = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states]
    return found, all(now - state.st_ctime_ns > _RECENT for state in states)
