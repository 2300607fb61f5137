"""Folders of runs and studies: their names, who may write to them, and which files may be deleted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from diffstride._files import remove_unfinished
from diffstride._text import short_repr
from diffstride.errors import UsageError

RUN, STUDY = ".diffstride-run", ".diffstride-study"  # marks in the folders of runs and of studies
LOCK = ".lock"
_WAIT = 6.0  # seconds; the workers of a killed training, which inherit its lock, take up to five to end


def check_name(what: str, name: str) -> str:
    """Return the name of a run or of a study if it is one plain component of a path; `what` is for the message.

    Raises:
        UsageError: a name that leads elsewhere, is hidden, resembles an option, or is too long.
    """
    plain = name.strip() == name and name[:1] not in (*".-~", "") and name.isprintable() and not {*name} & {*"/\\"}
    if not plain or len(name.encode()) > 255:
        raise UsageError(
            f"{what} must be a plain file name (without / and \\, not beginning with '.', '-' or '~', at most "
            f"255 bytes), got {short_repr(name)}"
        )
    return name


def as_name(text: str) -> str:
    """Return text as a plain file name, with `_` for each part that a name cannot have."""
    return re.sub(r"^[.-]+|[^\w.-]+", "_", text) or "_"


@contextmanager
def locked(folder: Path, mark: str = RUN, *, adopt: bool = False) -> Iterator[None]:
    """Lock the folder of a run or of a study against other processes. Make it if it does not exist.

    The lock ends with the process, however that ends. A mark in the folder names its owner, and a folder of files
    without a mark is not touched.

    Args:
        folder: folder of the run or of the study.
        mark: `RUN` or `STUDY`.
        adopt: also lock a folder without a mark.

    Raises:
        UsageError: a folder with other files, or one that another process has locked.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not adopt:
            check_unused(folder, mark)
        lock.acquire(timeout=_WAIT)
        (folder / mark).touch()
    except Timeout:
        problem = f"{folder} is being worked on by another process: wait for it, or give another --name"
        raise UsageError(problem) from None
    try:
        yield
    finally:
        lock.release()


def check_unused(folder: Path, mark: str) -> None:
    """Check that the folder has the mark, or no files."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if mark not in names and (others := sorted(names - {LOCK})):
        raise UsageError(f"{folder} has files of something else (such as {others[0]}): give another --name")


def check_new(folder: Path) -> None:
    """Check that the folder has neither a run nor other files."""
    if (folder / RUN).is_file() and any((folder / file).exists() for file in ("checkpoints/last.ckpt", "result.json")):
        raise UsageError(f"{folder} holds a run already: give another --name, or resume it with --ckpt_path last")
    check_unused(folder, RUN)


def clear(folder: Path) -> None:
    """Delete the records of a run that never reached a checkpoint, and nothing else."""
    remove_unfinished(folder / "checkpoints")
    events = folder / "tensorboard"
    names = ("config.yaml", "hparams.yaml", "metrics.csv", "strides.csv", "tensorboard/hparams.yaml")
    for file in [*(folder / name for name in names), *events.glob("events.out.tfevents.*")]:
        file.unlink(missing_ok=True)
    with suppress(OSError):  # missing, or with other files
        events.rmdir()
