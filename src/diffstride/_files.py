"""Files written whole or not at all, and what to say where a file cannot be read or written."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import TextIO

from diffstride.errors import UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM)
# What a disk may answer to anyone, however right the arguments are.
DISK_ERRORS = {*_FULL, *_REFUSED, errno.EROFS, errno.EIO}
# What it answers to a path that is wrong.
PATH_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENODEV}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A place to write to; what is written there replaces `path` in one move at the end.

    Where writing fails, what was there stays, and the error has the name of the file. Two writers of one file do not
    meet: each has a temporary file of its own, and the last one to finish wins.
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
    """Write a file so that it is never there by halves. A surrogate, which UTF-8 has not, becomes its escape."""
    with atomic_path(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a regular file of UTF-8 text, with its line ends as they are.

    Raises:
        OSError: a file that cannot be read, a pipe or a device, which might never end.
    """
    with TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
        yield file


_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # a pipe that nobody writes to is opened, too


def read_text(path: Path, most: int = 2**22) -> str:
    """Return the text of a regular file.

    Raises:
        OSError: as for `open_text`.
        ValueError: a file of more than `most` characters, or of bytes that are not UTF-8.
    """
    with open_text(path) as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"it has more than {most} characters")
    return text


def describe_os_error(error: OSError, path: str | Path | None = None) -> str:
    """What could not be read or written and why, then the cure, in one line."""
    name = path or error.filename or "to disk"
    if error.errno in _FULL:
        return f"cannot write {name} ({error.strerror}): make room"
    if error.errno in _REFUSED:
        verb = _refused(str(error.filename or name))
        return f"cannot {verb} {name} ({error.strerror}): give leave to {verb} it"
    if error.errno == errno.EROFS:
        return f"cannot write {name} ({error.strerror}): write to another place"
    if error.errno in PATH_ERRORS:
        return f"cannot open {name} ({error.strerror}): check the path"
    return f"cannot read or write {name} ({error.strerror}): check the disk"


def _refused(path: str) -> str:
    """What was tried in vain: the error itself does not say."""
    if os.path.exists(path):
        return "write" if may(os.R_OK, path) else "read"
    above = next((str(p) for p in Path(path).absolute().parents if os.path.exists(p)), "/")
    return "write" if may(os.X_OK, above) else "reach"


def may(mode: int, path: str | Path) -> bool:
    """Whether a path may be read, written or gone through, as `os.access` has it."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def open_regular(path: str | Path, most: int | None = None) -> BufferedReader:
    """Open a regular file for reading. Pipes and devices are refused, since reading them may block or never end.

    Args:
        path: the file.
        most: the largest size in bytes that is accepted.

    Returns:
        The open file.

    Raises:
        OSError: the file cannot be opened, is no regular file, or is larger than `most`.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _AT_ONCE))  # noqa: SIM115
    info = os.fstat(file.fileno())
    cause = None
    if not stat.S_ISREG(info.st_mode):
        cause = errno.ENODEV, "Not a regular file"
    elif most is not None and info.st_size > most:
        cause = errno.EFBIG, f"{info.st_size:,} bytes, above the limit of {most:,}"
    if cause is not None:
        file.close()
        raise OSError(*cause, str(path))
    return file


def check_output_path(path: str | os.PathLike[str]) -> Path:
    """Check that there is a folder for such a file."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}: make it, or give another path")
    return path
