"""Files written completely or not at all, files read safely, and messages about files."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from diffstride.errors import UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM)
# Errors of a disk that do not depend on the arguments.
DISK_ERRORS = {*_FULL, *_REFUSED, errno.EROFS, errno.EIO}
# Errors of a wrong path.
PATH_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENODEV}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces `path` in one move at the end.

    If writing fails, the previous file stays, and the error names `path`. Two writers of one file have a temporary file
    each, and the last one to finish wins.
    """
    unfinished = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # in a folder that can no longer be written
            unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files of `atomic_path` that a killed process left in a folder. No other may be writing."""
    for file in folder.glob(f".*.{'[0-9a-f]' * 8}.tmp"):
        file.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all. A surrogate, which UTF-8 cannot encode, becomes its escape."""
    with atomic_path(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a regular file of UTF-8 text and keep its line ends.

    Raises:
        OSError: a file that cannot be read, or is not a regular file.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # do not wait for the writer of a pipe

    with open(path, encoding="utf-8", newline="", opener=opener) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.ENODEV, "Not a regular file", str(path))
        yield file


def read_text(path: Path, most: int = 2**22) -> str:
    """Return the text of a regular file.

    Raises:
        OSError: as for `open_text`.
        ValueError: a file of more than `most` characters, or one that is not UTF-8.
    """
    with open_text(path) as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"it has more than {most} characters")
    return text


def describe_os_error(error: OSError, path: str | Path | None = None) -> str:
    """Return one line that names the file, the cause and the cure."""
    name = os.fsdecode(path or error.filename or "to disk")
    if error.errno in _FULL:
        return f"cannot write {name} ({error.strerror}): make room"
    if error.errno in _REFUSED:
        return f"cannot open {name} ({error.strerror}): change its permissions"
    if error.errno == errno.EROFS:
        return f"cannot write {name} ({error.strerror}): write to another place"
    if error.errno in PATH_ERRORS:
        return f"cannot open {name} ({error.strerror}): check the path"
    return f"cannot read or write {name} ({error.strerror}): check the disk"


def check_output_path(path: str | os.PathLike[str]) -> Path:
    """Check that the folder of a new file exists."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}: make it, or give another path")
    return path
