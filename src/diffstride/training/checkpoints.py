"""Checkpoints that outlive what may happen to a machine: written whole or not at all, often, and read with care."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer

from diffstride._check import UserError, WorkError


class WholeFiles(TorchCheckpointIO):
    """Writes each checkpoint beside its place, then puts it there in one move: what was there is whole until then.

    Lightning's own writes to the folder of temporary files; from another disk, the move is a copy that can be cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it; a WorkError that names the last good one where that cannot be done."""
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):  # in a folder that can no longer be written
                unfinished.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
            if not isinstance(cause, OSError):
                raise
            raise WorkError(cannot_write(cause, path, path.parent)) from error


class SaveWithinEpochs(Callback):
    """Keep `last.ckpt` of a long epoch recent, so that little is lost with the machine.

    The first process looks at its clock once in `log_every_n_steps` steps, and the others follow it. The step after
    one that is logged is taken: the row of a step is written behind this hook, and would be lost with a process that
    ends just there.

    Args:
        path: of the checkpoint.
        minutes: between two of them, at least.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.minutes = path, minutes
        self._step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._saved = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save where it is time, after a step of the optimiser."""
        before, self._step = self._step, trainer.global_step
        every: int = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        looks = trainer.global_step != before and trainer.global_step % every == 1 % every
        if not looks or trainer.is_last_batch:  # the end of an epoch is saved anyway, with what is evaluated there
            return
        if trainer.strategy.broadcast(time.monotonic() - self._saved >= 60 * self.minutes):
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Any checkpoint will do."""
        self._saved = time.monotonic()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of a run contains. Nothing in the file is executed.

    Raises:
        UserError: a file that is damaged, or no checkpoint of a run; it names the last good one beside it.
    """
    try:
        return _read(path)
    except Exception as error:  # whatever a damaged file makes the unpickler say
        raise UserError(f"{path} is not a readable checkpoint: {_or_another(path)}") from error


def last_readable(path: Path) -> Path:
    """`path`, or where it is damaged the last good checkpoint beside it, which is said on standard error.

    Raises:
        UserError: there is none.
    """
    try:
        _read(path)
    except Exception as error:  # as above
        good = _good_ones(path.parent, but=path)
        if not good:
            raise UserError(f"{path} is not a readable checkpoint: {_or_another(path)}") from error
        step, other = good[-1]
        _say(f"{path} is damaged: going on from {other.name} (step {step})")
        return other
    return path


DISK_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO")
    if name in vars(errno)
}


def cannot_write(error: OSError, path: str | Path | None, checkpoints: Path) -> str:
    """What a disk has refused, and how to go on: the last good checkpoint of a folder."""
    said = f"cannot write {path or error.filename or 'to disk'} ({error.strerror}): make room or give leave to write, "
    good = _good_ones(checkpoints)
    if not good:
        return f"{said}and start again; there is no checkpoint yet"
    step, last = good[-1]
    return f"{said}and resume with --ckpt_path {'last' if last.name == 'last.ckpt' else last} (step {step})"


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:  # torch itself does not compare the checksums
        if (damaged := file.testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    content["state_dict"], content["global_step"], content["epoch"]
    return content


def _or_another(path: Path) -> str:
    good = _good_ones(path.parent, but=path)
    if not good:
        return f"there is no other in {path.parent}"
    step, other = good[-1]
    return f"the last good one is {other} (step {step})"


def _good_ones(folder: Path, but: Path | None = None) -> list[tuple[int, Path]]:
    """The folder's checkpoints that can be read, by their steps, `last.ckpt` behind another of the same step."""
    found = []
    for path in folder.glob("*.ckpt"):
        if but is not None and path.name == but.name:
            continue
        try:
            found.append((int(_read(path)["global_step"]), path.name == "last.ckpt", path))
        except Exception:  # a damaged one is none of those
            continue
    return [(step, path) for step, _, path in sorted(found)]


@rank_zero_only
def _say(line: str) -> None:
    print(f"diffstride: {line}", file=sys.stderr)
