"""What TensorBoard shows of a run while it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger

from diffstride._files import describe_os_error
from diffstride._text import printable
from diffstride.experiments.history import StrideRow
from diffstride.experiments.training.checkpoints import say

# TensorBoard sorts groups (what stands before the slash) and their curves by name, and opens the first two groups.
TAGS = {
    "val/accuracy": "accuracy and cost/accuracy",
    "train/loss": "accuracy and cost/loss, training",
    "val/loss": "accuracy and cost/loss, validation",
    "train/macs": "accuracy and cost/multiply-accumulates",
    "train/stride_cost": "accuracy and cost/relative cost (Eq. 6)",
    "epoch": "schedule/epoch",
    "lr-SGD/weights": "schedule/rate of weights",
    "lr-SGD/strides": "schedule/rate of strides",
}
STRIDES, SIZES = "layer strides", "map sizes"


def _as_long_as_it_works(write: Callable[..., None]) -> Callable[..., None]:
    """Return a method that stops writing events, and prints a line, where that fails: the run does not depend on it."""

    @functools.wraps(write)
    def guarded(self: LiveView, *args: Any, **kwargs: Any) -> None:
        if self._lost:
            return
        try:
            write(self, *args, **kwargs)
        except (OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, ValueError) else error  # Lightning wraps those of files
            if not isinstance(cause, OSError):
                raise
            self._lost = True
            problem = describe_os_error(cause, self.log_dir)
            say(f"{problem}; the run goes on without TensorBoard, metrics.csv has everything")

    return guarded


class LiveView(TensorBoardLogger):
    """TensorBoard with names and groups that make its first page useful; `metrics.csv` has the names of the code.

    Its tab *Custom scalars* has all strides in one chart, all sizes of maps in another. Where its folder is deleted, or
    cannot be written, the run goes on without it.

    Args:
        folder: of the run; events go to `tensorboard/` in it.
        resumed_step: of a run that is resumed, the steps it has done. What it wrote after them is written again.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        # What Lightning logs is numbered by steps done before, so that it repeats at most the step of the checkpoint.
        purge_step = None if resumed_step is None else resumed_step + 1
        super().__init__(folder, name="", version="tensorboard", default_hp_metric=False, purge_step=purge_step)
        self._laid_out = self._lost = False

    @rank_zero_only
    @_as_long_as_it_works
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Scalars, those of `TAGS` under the names they have there."""
        super().log_metrics({TAGS.get(name, printable(name)): value for name, value in metrics.items()}, step)

    @rank_zero_only
    @_as_long_as_it_works
    def log_strides(self, rows: Iterable[StrideRow]) -> None:
        """Strides and output sizes of one moment. The layers are numbered so that they stand in order."""
        places: dict[str, int] = {}
        for row in rows:
            name = printable(f"{places.setdefault(row.layer, len(places) + 1)} {row.layer} {row.axis}")
            self.experiment.add_scalar(f"{STRIDES}/{name}", row.stride, row.step)
            self.experiment.add_scalar(f"{SIZES}/{name}", row.size, row.step)
        if places and not self._laid_out:
            charts = {group: ["Multiline", [f"{group}/.*"]] for group in (STRIDES, SIZES)}
            self.experiment.add_custom_scalars({"all layers": charts})
            self._laid_out = True

    @rank_zero_only
    @_as_long_as_it_works
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Record the settings of the model."""
        super().log_hyperparams(*args, **kwargs)

    @rank_zero_only
    @_as_long_as_it_works
    def save(self) -> None:
        """Flush."""
        super().save()

    @rank_zero_only
    @_as_long_as_it_works
    def finalize(self, status: str) -> None:
        """Flush and close."""
        super().finalize(status)
