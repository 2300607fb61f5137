"""The TensorBoard curves of a run while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger

from diffstride._text import printable

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
LAYERS = {"stride": "layer strides", "size": "map sizes"}  # groups of stride/LAYER/AXIS and size/LAYER/AXIS


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
        self._places: dict[str, int] = {}  # of layers, in their order

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars under their names on the page, and with the first strides the charts of all layers."""
        is_first = not self._places
        super().log_metrics({self._tag(name): value for name, value in metrics.items()}, step)
        if self._places and is_first:
            charts = {group: ["Multiline", [f"{group}/.*"]] for group in LAYERS.values()}
            self.experiment.add_custom_scalars({"all layers": charts})

    def _tag(self, name: str) -> str:
        kind, _, rest = name.partition("/")
        if kind not in LAYERS:
            return TAGS.get(name, printable(name))
        layer, _, axis = rest.rpartition("/")
        place = self._places.setdefault(layer, len(self._places) + 1)  # it keeps layers in order
        return printable(f"{LAYERS[kind]}/{place} {layer} {axis}")
