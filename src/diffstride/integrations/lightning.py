"""Callbacks for Lightning: keep strides within their bounds, log them, and explore."""

from __future__ import annotations

import math
import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diffstride.cost import CostModel
from diffstride.errors import UsageError
from diffstride.geometry import AXIS_NAMES
from diffstride.integrations.input_sizes import InputSizes
from diffstride.nn.explore import Exploration
from diffstride.nn.strides import all_layers, clamp_strides_, learnable_layers


class ClampStrides(Callback):
    """A callback that clamps strides to their bounds after each optimizer step, so that raw values cannot run away."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Clamp the strides of the whole module."""
        clamp_strides_(pl_module)


class LogStrides(Callback):
    """A callback that logs strides, sizes and cost to the loggers of any LightningModule, every `log_every_n_steps`.

    The names are `stride/LAYER/AXIS`, `size/LAYER/AXIS` for the output of the layer on the last batch, and `cost/macs`.

    Args:
        cost: a model of the cost to log; None: no cost.
    """

    def __init__(self, cost: CostModel | None = None) -> None:
        self.cost = cost
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the sizes that reach the layers."""
        self._inputs = InputSizes(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log after each step of the optimizer that the trainer logs."""
        step = trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self._step or step % every:  # accumulated batches belong to one step
            return
        self._step = step
        metrics: dict[str, float] = {}
        for name, layer in learnable_layers(pl_module):
            sizes = layer.output_size(self._inputs.sizes[name]) if name in self._inputs.sizes else ()
            for kind, values in (("stride", layer.strides), ("size", sizes)):
                axes = zip(AXIS_NAMES[layer.ndim], values, strict=False)
                metrics |= {f"{kind}/{name}/{axis}": value for axis, value in axes}
        if self.cost is not None:
            metrics[f"cost/{self.cost.measure}"] = self.cost.exact()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        if stage == "fit" and hasattr(self, "_inputs"):
            self._inputs.close()


class ExploreStrides(Callback):
    """A callback that scales the strides of a LightningModule before each training step.

    A step is a step of the optimizer, so accumulated batches share their scale. The module decides whether to use
    fewer samples where a step costs more: `inputs[: explorer.samples(len(inputs))]`, as `Classifier` does. These are
    the first samples, so let the loader shuffle.

    Args:
        exploration: a `Jitter`, a `Sweep`, or one of your own.
        seed: seed of its noise; None: that of `seed_everything` in the first process.

    Raises:
        UsageError: at the start of a training of unknown length, or with manual optimization.
    """

    def __init__(self, exploration: Exploration, seed: int | None = None) -> None:
        self.exploration, self.seed = exploration, seed
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._batch_fraction = 1.0
        self._inputs: InputSizes | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training continues from."""
        return {"seed": self.seed, "sizes": self._sizes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seed and the sizes of the training that is resumed."""
        self.seed, self._sizes = state_dict["seed"], state_dict["sizes"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the sizes that reach the layers."""
        if not pl_module.automatic_optimization:
            raise UsageError(
                "ExploreStrides needs automatic optimization: call the exploration's set_strides in training_step "
                "instead"
            )
        if self.seed is None:
            self.seed = trainer.strategy.broadcast(int(os.environ.get("PL_GLOBAL_SEED", 0)))
        if not self._sizes:  # the sizes of the first step serve throughout, so that resuming changes nothing
            self._inputs = InputSizes(pl_module)
            self._sizes = self._inputs.sizes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get the number of steps. Asked sooner, Lightning sets up the data before a checkpoint is restored."""
        steps = trainer.estimated_stepping_batches
        if steps == math.inf:
            raise UsageError("exploration needs to know how many steps there are: set max_epochs or max_steps")
        self._steps = max(1, int(steps))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Scale the strides."""
        assert self.seed is not None
        self.exploration.set_strides(pl_module, trainer.global_step, self._steps, seed=self.seed)
        self._batch_fraction = self.exploration.batch_fraction(pl_module, self._sizes)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop watching sizes after the first step."""
        self._close()

    def samples(self, batch_size: int) -> int:
        """Return how many samples of a batch the present step should use."""
        return min(max(2, round(self._batch_fraction * batch_size)), batch_size)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the scale where the training was interrupted or failed."""
        self._end(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the scale."""
        self._end(pl_module)

    def _end(self, pl_module: LightningModule) -> None:
        self._close()
        for _, layer in all_layers(pl_module):
            layer.set_stride_scale(None)

    def _close(self) -> None:
        if self._inputs is not None:
            self._inputs.close()
        self._inputs = None
