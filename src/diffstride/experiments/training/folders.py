"""Folders of runs and studies: how they may be called, who may write to them, what in them may be deleted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from diffstride._files import describe_os_error
from diffstride._text import printable, short_repr
from diffstride.errors import UsageError
from diffstride.experiments.training.documents import read_yaml

RUN, STUDY = ".diffstride-run", ".diffstride-study"  # marks in folders that a run, or a study, has made
LOCK = ".lock"
_WAIT = 6.0  # seconds; workers of a training that was killed take up to five to end, and older file locks with them
_LONGEST = 255  # bytes, in the file systems of today


def check_name(what: str, name: str) -> str:
    """Return the name of a run or of a study if it is one plain component of a path.

    Args:
        what: the argument that the message names.
        name: from the user.

    Raises:
        UsageError: a name that leads elsewhere, that is hidden, that looks like an option, or that is too long.
    """
    plain = name.strip() == name and name[:1] not in (*".-~", "") and name.isprintable() and not {*name} & {*"/\\"}
    if not plain or len(name.encode()) > _LONGEST:
        raise UsageError(
            f"{what} must be a plain file name (without / and \\, not beginning with '.', '-' or '~', at most "
            f"{_LONGEST} bytes), got {short_repr(name)}"
        )
    return name


def as_name(text: str) -> str:
    """Return text as a plain file name; what such a name cannot have becomes `_`."""
    return re.sub(r"^[.-]+|[^\w.-]+", "_", text) or "_"


def runs_folder(text: str) -> Path:
    """Return the folder of all runs; `~` is the user's home.

    Raises:
        UsageError: `~NAME` without a user of that name.
    """
    if (path := os.path.expanduser(text)).startswith("~"):
        raise UsageError(
            f"--runs names the home of a user who does not exist: {short_repr(text)} (./{printable(text)} is a folder)"
        )
    return Path(path)


def is_run(folder: Path) -> bool:
    """Return whether `diffstride fit` made the folder: by its mark, or by the files of versions that left no mark."""
    if (folder / RUN).is_file():
        return True
    if not (folder / "checkpoints" / "last.ckpt").is_file():
        return False
    try:
        config = read_yaml(folder / "config.yaml")
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and {"name", "runs", "model", "data", "trainer"} <= config.keys()


@contextmanager
def held(folder: Path, mark: str = RUN, *, adopt: bool = False) -> Iterator[None]:
    """Hold the folder of a run or of a study, which no other process can meanwhile; make it if it is not there.

    The hold ends with the process, however that ends. A mark in the folder says whose it is: what is in a folder
    without one is not touched.

    Args:
        folder: of the run or of the study.
        mark: `RUN` or `STUDY`.
        adopt: hold a folder without a mark, too.

    Raises:
        UsageError: a folder with files of something else, one that another process holds, one that cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not adopt:
            check_unused(folder, mark)
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire(timeout=_WAIT)
        (folder / mark).touch()
    except Timeout:
        raise UsageError(
            f"{folder} is being worked on by another process: wait for it, or give another --name"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}): give another --runs") from error
    try:
        yield
    finally:
        lock.release()


def check_unused(folder: Path, mark: str) -> None:
    """Check that nothing in the folder belongs to something else.

    Raises:
        UsageError: the folder has files, but no mark.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(describe_os_error(error)) from error
    if mark not in names and (others := sorted({*names} - {LOCK})):
        raise UsageError(f"{folder} has files of something else (such as {others[0]}): give another --name")


def check_new(folder: Path) -> None:
    """Check that a run may start in the folder.

    Raises:
        UsageError: the folder has a run, or files of something else.
    """
    if is_run(folder) and any((folder / file).exists() for file in ("checkpoints/last.ckpt", "result.json")):
        raise UsageError(f"{folder} holds a run already: give another --name, or resume it with --ckpt_path last")
    check_unused(folder, RUN)


def clear(folder: Path) -> None:
    """Delete what a run that never reached a checkpoint has written, and nothing else."""
    records = [folder / name for name in ("config.yaml", "hparams.yaml", "metrics.csv", "strides.csv")]
    events = folder / "tensorboard"
    if not events.is_symlink():
        records += [events / "hparams.yaml", *events.glob("events.out.tfevents.*")]
    for file in records:
        with suppress(FileNotFoundError, NotADirectoryError):
            file.unlink()
    with suppress(OSError):  # it is not there, or has something else
        events.rmdir()
