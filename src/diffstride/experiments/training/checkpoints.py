"""Checkpoints of a run: written completely or not at all, often, and checked when they are read."""

from __future__ import annotations

import contextlib
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from diffstride._files import atomic_path
from diffstride._text import one_line
from diffstride.errors import UsageError
from diffstride.experiments.models import Built
from diffstride.experiments.training.schema import Saved, check_kind
from diffstride.experiments.training.signals import EndTogether


class AtomicCheckpointIO(TorchCheckpointIO):
    """A writer of checkpoints that replaces the previous file in one move, when the new one is on disk.

    Lightning's own writes to the folder of temporary files; from another disk, the move is a copy that can be cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as unfinished, unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


class EpochCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint at the end of each epoch, as a class of its own.

    Lightning distinguishes callbacks by class, so `trainer.callbacks` can have a further `ModelCheckpoint`.
    """


class SaveWithinEpochs(Checkpoint):
    """A callback that keeps `last.ckpt` of a long epoch recent, and saves when the machine gives notice.

    Notice is SIGTERM, as clusters send it before they take a machine away. Lightning then ends the training between
    two batches. Several processes end, and save, together: see `EndTogether`.

    Lightning calls a `Checkpoint` after all other callbacks, so a checkpoint includes their work after a step.

    The first process reads its clock once in `log_every_n_steps` steps, and the others follow it. A checkpoint is
    written one step after a logged one, because the row of a step is written after this callback.

    Args:
        path: the checkpoint.
        minutes: minimum time between two checkpoints.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.minutes = path, minutes
        self._end = EndTogether()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals."""
        self._end.listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and listen for signals."""
        self._saved, self._step, self._stepped = time.monotonic(), trainer.global_step, False
        self._end.listen(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End here on a signal, when the last epoch is saved."""
        self._stepped = False
        self._end.agree(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save when it is time, after a step of the optimiser."""
        self._stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if not self._stepped or trainer.is_last_batch:  # the end of an epoch is saved with its evaluation
            return
        self._end.agree(trainer)
        every: int = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self._step % every != 1 % every:
            return
        if trainer.strategy.broadcast(time.monotonic() - self._saved >= 60 * self.minutes):
            trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when the machine has given notice, unless gradients are partly accumulated."""
        noticed = isinstance(exception, SIGTERMException)
        if noticed and trainer.training and self._stepped and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the time: any checkpoint counts."""
        self._saved = time.monotonic()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a run's checkpoint. Nothing in the file is executed.

    Raises:
        UsageError: a file that is damaged, or no checkpoint of a run; it names the last good one beside it.
    """
    try:
        return _read(path)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # the unpickler raises anything for a damaged file
        raise UsageError(f"{path} is not a readable checkpoint: {last_good(path.parent)}") from error


def load_weights(network: nn.Module, path: Path) -> None:
    """Load weights into a network, which may have strides that they lack, or be a `Built` of the same model.

    Args:
        network: the network.
        path: a checkpoint of a run, or a `.safetensors` file.

    Raises:
        UsageError: a file that cannot be read, or is of another network.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except SafetensorError as error:
            raise UsageError(f"{path} is not a readable safetensors file: {one_line(error)}") from error
    else:
        saved = read_checkpoint(path)["state_dict"]
        state = {name.removeprefix("network."): t for name, t in saved.items() if name.startswith("network.")}
    own = network.state_dict()
    if isinstance(network, Built) and not state.keys() & own.keys():
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    unknown = [name for name in state if name not in own]
    missing = [name for name in own if name not in state and not name.endswith("stride")]
    if unknown or missing:
        raise UsageError(
            f"{path} must have the network's weights: "
            + (f"{unknown[0]} is not in the network" if unknown else f"{missing[0]} is not in the file")
        )
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UsageError(f"{path} must have the network's weights: {one_line(error)}") from error


def last_good(folder: Path) -> str:
    """Return a phrase that names the readable checkpoint of most steps in a folder, `last.ckpt` before others."""
    found = []
    for path in folder.glob("*.ckpt"):
        with contextlib.suppress(Exception):  # a damaged one
            found.append((_read(path)["global_step"], path.name == "last.ckpt", path))
    if not found:
        return f"there is no good checkpoint in {folder}"
    step, _, path = max(found)
    return f"the last good checkpoint is {path} (step {step})"


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:  # torch itself does not compare the checksums
        if (damaged := file.testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    check_kind(content, Saved)
    return content
