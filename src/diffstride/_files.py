"""Files written whole or not at all, and what to say where a file cannot be read or written."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM)
# What a disk may answer to anyone, however right the arguments are.
DISK_ERRORS = {*_FULL, *_REFUSED, errno.EROFS, errno.EIO}
# What it answers to a path that is wrong.
PATH_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
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


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is never there by halves. A surrogate, which UTF-8 has not, becomes its escape."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


def trouble(error: OSError, path: str | Path | None = None) -> str:
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
