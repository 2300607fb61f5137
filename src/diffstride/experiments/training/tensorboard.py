"""The TensorBoard curves of a run while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger

from diffstride._text import printable
from diffstride.experiments.history import StrideRow

# TensorBoard sorts groups (the part before the slash) and their curves by name, and opens the first two groups.
TAGS = {
    "val/accuracy": "accuracy and cost/accuracy",
    "train/loss": "accuracy and cost/loss, training",
    "val/loss": "accuracy and cost/loss, validation",
    "train/macs": "accuracy and cost/multiply-accumulates",
    "train/stride_cost": "accuracy and cost/relative cost (Eq. 6)",
    "epoch": "schedule/epoch",
    "lr-SGD/weights": "schedule/rate of weights",
    "lr-SGD/strides": "schedule/rate of strides",
    "lr-AdamW/weights": "schedule/rate of weights",
    "lr-AdamW/strides": "schedule/rate of strides",
}
STRIDES, SIZES = "layer strides", "map sizes"


class LiveView(TensorBoardLogger):
    """A TensorBoard log with names and groups that make its first page useful.

    Its tab *Custom scalars* has all strides in one chart, and all sizes of maps in another.

    Args:
        folder: folder of the run; events go to `tensorboard/` in it.
        resumed_step: the steps that a resumed run has done. Later records of the run are written again.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        # Lightning's records count the steps done before, so it repeats at most the step of the checkpoint.
        purge_step = None if resumed_step is None else resumed_step + 1
        super().__init__(folder, name="", version="tensorboard", default_hp_metric=False, purge_step=purge_step)
        self._laid_out = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars under their names in `TAGS`, if they have one."""
        super().log_metrics({TAGS.get(name, printable(name)): value for name, value in metrics.items()}, step)

    @rank_zero_only
    def log_strides(self, rows: Iterable[StrideRow]) -> None:
        """Write strides and output sizes of one step. A number before a layer's name keeps layers in order."""
        places: dict[str, int] = {}
        for row in rows:
            name = printable(f"{places.setdefault(row.layer, len(places) + 1)} {row.layer} {row.axis}")
            self.experiment.add_scalar(f"{STRIDES}/{name}", row.stride, row.step)
            self.experiment.add_scalar(f"{SIZES}/{name}", row.size, row.step)
        if places and not self._laid_out:
            charts = {group: ["Multiline", [f"{group}/.*"]] for group in (STRIDES, SIZES)}
            self.experiment.add_custom_scalars({"all layers": charts})
            self._laid_out = True
