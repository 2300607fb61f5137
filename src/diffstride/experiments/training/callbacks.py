"""Callbacks of a run: random numbers by step, the history of strides, costs, and the result."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger

from diffstride._files import atomic_write_text
from diffstride.cost import Macs, count_macs, cutoff_frequencies, stride_cost
from diffstride.experiments import history
from diffstride.experiments.data import ClassificationData
from diffstride.experiments.data.hashing import seed_of
from diffstride.experiments.figures.style import save
from diffstride.experiments.figures.training import stride_trajectories
from diffstride.experiments.provenance import provenance
from diffstride.experiments.training.classifier import Classifier, axes_of, network_of
from diffstride.experiments.training.schema import total_macs
from diffstride.integrations.input_sizes import InputSizes
from diffstride.nn import strides


class SeedSteps(Callback):
    """A callback that makes random numbers of a step, as of dropout, a function of seed, step and rank.

    So a resumed training draws the same numbers as an uninterrupted one, and processes draw different ones.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed torch on all devices."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready  # those of an accumulated gradient differ
        torch.manual_seed(seed_of(self.seed, batches, trainer.global_rank))


class StrideHistory(Callback):
    """A callback that writes `strides.csv`, and logs strides and output sizes to all loggers but those of CSV files.

    The names are those of `LogStrides`.

    Args:
        path: the CSV file.
        every_n_steps: optimiser steps between two entries; each validation has one, too.
    """

    def __init__(self, path: Path, every_n_steps: int = 10) -> None:
        self.path, self.every_n_steps = Path(path), every_n_steps
        self._written = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the sizes of the layers' inputs; continue after the rows of a resumed run."""
        self._written = max((row.step for row in history.read_rows(self.path)), default=-1)
        self._inputs = InputSizes(network_of(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write every n-th step."""
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == 1:
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the strides that were evaluated; before the first step, the initial ones."""
        self._write(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        if hasattr(self, "_inputs"):
            self._inputs.close()

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or step == self._written:
            return
        self._written = step
        rows = list(history.stride_rows(network_of(pl_module), step, self._inputs.sizes, axes_of(trainer)))
        if rows:
            history.append_rows(self.path, rows)
        metrics = {
            f"{kind}/{row.layer}/{row.axis}": value
            for row in rows
            for kind, value in (("stride", row.stride), ("size", row.size))
        }
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_metrics(metrics, step)


class LiveCost(Callback):
    """A callback that logs the multiply-accumulates at the current strides at each validation, but to no CSV file."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count in all processes, since a network may be sharded over them."""
        if trainer.sanity_checking and trainer.global_step:  # a resumed run has already logged them
            return
        assert isinstance(pl_module, Classifier)
        macs = sum(_macs(trainer, pl_module))
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_metrics({"train/macs": macs}, trainer.global_step)


def _macs(trainer: Trainer, module: Classifier) -> Macs:
    """Count the multiply-accumulates of one input at the current strides."""
    with trainer.precision_plugin.forward_context():
        return count_macs(module.network, module.example())


class StrideProgressBar(RichProgressBar):
    """Lightning's rich progress bar with the current strides at the end of the line."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics of the line."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if learned := strides(network_of(pl_module)):
            metrics["strides"] = in_short(learned)
        return dict(metrics)


class EpochLines(Callback):
    """A callback that prints a line at each validation, in place of a progress bar where there is no terminal."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print epoch, step, loss, accuracy and strides."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        parts = [f"epoch {trainer.fit_loop.epoch_progress.total.ready}, step {trainer.global_step}"]
        parts += [
            f"{name} {trainer.callback_metrics[key]:.4f}"
            for key, name in {"train/loss": "loss", "val/loss": "validation loss", "val/accuracy": "accuracy"}.items()
            if key in trainer.callback_metrics
        ]
        if learned := strides(network_of(pl_module)):
            parts.append(f"strides {in_short(learned)}")
        print(", ".join(parts), flush=True)


def in_short(learned: Mapping[str, Sequence[float]]) -> str:
    """Return the strides of layers as in 3.00x2.50 2.00."""
    return " ".join("x".join(f"{stride:.2f}" for stride in layer) for layer in learned.values())


def in_one_line(result: Mapping[str, Any]) -> str:
    """Return the outcome of a run: accuracy, strides and multiply-accumulates."""
    parts = [] if result["accuracy"] is None else [f"accuracy {result['accuracy']:.4f}"]
    if result["strides"]:
        parts.append(f"strides {in_short(result['strides'])}")
    return ", ".join([*parts, f"{total_macs(result) / 1e6:.2f} million MACs per sample"])


class WriteResult(Callback):
    """A callback that collects the result of a run; `write` leaves `result.json` and the figure of the strides.

    Args:
        folder: folder of the run.
    """

    validated_step = -1

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._ends: list[float] = []
        self._seconds = 0.0
        self._initial: dict[str, tuple[float, ...]] = {}
        self._metrics: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time, and the strides of a run that is not resumed."""
        self._start = time.perf_counter() - self._seconds
        self._initial = self._initial or strides(network_of(pl_module))
        _reset_peak_memory(trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        """Return the values that a resumed run continues from."""
        return {
            "initial": self._initial,
            "seconds": time.perf_counter() - self._start,
            "validated_step": self.validated_step,
            "metrics": self._metrics,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the initial strides, the time and the last evaluation of a resumed run."""
        self._initial, self._seconds = state_dict["initial"], state_dict["seconds"]
        self.validated_step, self._metrics = state_dict["validated_step"], state_dict["metrics"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Note the time of the step, which includes that of its data."""
        self._ends.append(time.perf_counter())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics and their step."""
        if not trainer.sanity_checking:
            self.validated_step = trainer.global_step
            found = trainer.callback_metrics.items()
            self._metrics = {name: float(value) for name, value in found if name.startswith("val/")}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._seconds = time.perf_counter() - self._start

    def write(self, trainer: Trainer, module: Classifier) -> None:
        """Write the result of a run that has ended."""
        result = self._result(trainer, module)
        if trainer.is_global_zero:
            atomic_write_text(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
            if rows := history.read_rows(self.folder / "strides.csv"):
                save(stride_trajectories(rows), self.folder / "strides")

    def _result(self, trainer: Trainer, module: Classifier) -> dict[str, Any]:
        network = module.network
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        macs = _macs(trainer, module)
        steps, of_task = [b - a for a, b in pairwise(self._ends)], "val/accuracy/"
        return {
            "accuracy": self._metrics.get("val/accuracy"),
            "accuracies": {
                name.removeprefix(of_task): value for name, value in self._metrics.items() if name.startswith(of_task)
            },
            "loss": self._metrics.get("val/loss"),
            "axes": {axis.name: axis.unit for axis in data.axes},
            "strides_initial": self._initial,
            "strides": strides(network),
            "cutoffs": _cutoffs(module, data) if module.has_strides else None,
            "stride_cost": stride_cost(network).item() if module.has_strides else None,
            "macs": macs.model,
            "macs_budget": None if module.cost is None else module.cost.target,
            "resampling_macs": macs.resampling,
            "parameters": sum(p.numel() for p in network.parameters()),
            "steps": trainer.global_step,
            "epochs": _epochs(trainer),
            "train_seconds": round(self._seconds, 1),
            "step_time_ms": round(1e3 * statistics.median(steps), 2) if steps else None,
            "peak_memory_mb": round(_peak_memory(trainer.strategy.root_device) / 2**20),
            "seed": data.seed,
            "data": type(data).__name__,
            "data_fingerprint": data.fingerprint,
            **provenance(trainer.strategy.root_device),
        }


def _epochs(trainer: Trainer) -> float:
    """Return the epochs of the training; one that was not finished counts in part."""
    done = trainer.fit_loop.epoch_loop.batch_progress.total.completed / trainer.num_training_batches
    return int(done) if done.is_integer() else round(done, 3)


def _cutoffs(module: Classifier, data: ClassificationData) -> dict[str, Any] | None:
    """Return the cut-off frequencies by layer along the axes, exact and in whole bins.

    Return None if the axes have no unit, or the network cannot be traced from its input to its layers.
    """
    if not (spacing := [axis.spacing for axis in data.axes]):
        return None
    with contextlib.suppress(ValueError):
        exact, whole = (cutoff_frequencies(module.network, spacing, module.example(), bins) for bins in (False, True))
        return {"exact": exact, "whole_bins": whole}
    return None


def _reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of earlier work in this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes: allocated on the GPU, or resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:  # the other one starts at the peak of the process that has started this one
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
