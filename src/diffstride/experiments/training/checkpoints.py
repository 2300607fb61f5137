"""Checkpoints that outlive what may happen to a machine: written whole or not at all, often, and read with care."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, TypedDict

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from diffstride._files import describe_os_error
from diffstride._text import printable
from diffstride.errors import UsageError
from diffstride.experiments.training.schema import Saved, check_kind
from diffstride.experiments.training.signals import EndTogether


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its place, then puts it there in one move: what was there is whole until then.

    Lightning's own writes to the folder of temporary files; from another disk, the move is a copy that can be cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it; a UsageError that names the last good one where that cannot be done."""
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
            raise UsageError(cannot_go_on(cause, path, path.parent)) from error


class EpochCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint at the end of each epoch, under a name of its own.

    So `trainer.callbacks` can have a further `ModelCheckpoint`: Lightning tells callbacks apart by their classes.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what a checkpoint has, once it is checked."""
        check_kind(state_dict, _Paths, "the state of EpochCheckpoint")
        super().load_state_dict(state_dict)


class _Paths(TypedDict):
    best_model_path: str
    kth_best_model_path: str
    last_model_path: str
    best_k_models: dict[str, Tensor]


class SaveWithinEpochs(Checkpoint):
    """Keep `last.ckpt` of a long epoch recent, so that little is lost with the machine; nothing where it gives notice.

    Notice is SIGTERM, as clusters send it before they take a machine away: Lightning then ends the training between
    two batches. Several processes end, and save, together: see `EndTogether`.

    A `Checkpoint`, which Lightning calls behind all other callbacks, the model's own too: what these do after a step is
    in it.

    The first process looks at its clock once in `log_every_n_steps` steps, and the others follow it. The step after
    one that is logged is taken: the row of a step is written behind this hook, and would be lost with a process that
    ends just there.

    Args:
        path: of the checkpoint.
        minutes: between two of them, at least.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.minutes = path, minutes
        self._end = EndTogether()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals."""
        self._end.listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and listen to signals."""
        self._saved, self._step, self._stepped = time.monotonic(), trainer.global_step, False
        self._end.listen(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End here, where the last epoch is saved."""
        self._end.agree(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save where it is time, after a step of the optimiser."""
        self._stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if not self._stepped or trainer.is_last_batch:  # the end of an epoch is saved with what is evaluated there
            return
        self._end.agree(trainer)
        every: int = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self._step % every != 1 % every:
            return
        if trainer.strategy.broadcast(time.monotonic() - self._saved >= 60 * self.minutes):
            trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where the machine has given notice, unless gradients are half accumulated."""
        noticed = isinstance(exception, SIGTERMException)
        if noticed and trainer.training and self._stepped and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Any checkpoint will do."""
        self._saved = time.monotonic()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of a run contains. Nothing in the file is executed.

    Raises:
        UsageError: a file that is damaged, or no checkpoint of a run; it names the last good one beside it.
    """
    try:
        return _read(path)
    except PermissionError:  # which says nothing of what is in it
        raise
    except Exception as error:  # whatever a damaged file makes the unpickler say
        why = f" ({error})" if isinstance(error, ValueError) else ""
        raise UsageError(f"{path} is not a readable checkpoint{why}: {_other_than(path)}") from error


def read_last(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at `path`; where it is damaged, the last good one beside it, which standard error says.

    Raises:
        UsageError: there is none.
    """
    try:
        return path, read_checkpoint(path)
    except UsageError:
        if (good := _last_good(path.parent)) is None:
            raise
    other, content = good
    say(f"{path} is damaged: going on from {other.name} (step {content['global_step']})")
    return good


def cannot_go_on(error: OSError, path: str | Path | None, checkpoints: Path) -> str:
    """What a disk has refused, and how to go on: the last good checkpoint of a folder."""
    said = describe_os_error(error, path)
    if (good := _last_good(checkpoints)) is None:
        return f"{said}, and start again; there is no checkpoint yet"
    last, content = good
    name = "last" if last.name == "last.ckpt" else last
    return f"{said}, and resume with --ckpt_path {name} (step {content['global_step']})"


def checkpoint_from_before(trainer: Trainer) -> str:
    """What a training that failed has left: the last good checkpoint, in words."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and (good := _last_good(Path(callback.dirpath or ""))) is not None:
            last, content = good
            return f"the checkpoint from before is {last} (step {content['global_step']})"
    return "there is no checkpoint from before"


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:  # torch itself does not compare the checksums
        if (damaged := file.testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    check_kind(content, Saved)
    return content


def _other_than(damaged: Path) -> str:
    if (good := _last_good(damaged.parent)) is None:
        return f"there is no other in {damaged.parent}"
    other, content = good
    return f"the last good one is {other} (step {content['global_step']})"


def _last_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder's best checkpoint that can be read: one to resume from, of most steps, called `last.ckpt`."""
    found = []
    for path in folder.glob("*.ckpt"):
        with contextlib.suppress(Exception):  # a damaged one is none of those
            found.append((path, _read(path)))

    def merit(one: tuple[Path, dict[str, Any]]) -> tuple[bool, int, bool]:
        path, content = one
        return "loops" in content, content["global_step"], path.name == "last.ckpt"

    return max(found, key=merit, default=None)


@rank_zero_only
def say(line: str) -> None:
    """Print a line to standard error, in the first process."""
    print(f"diffstride: {printable(line)}", file=sys.stderr)
