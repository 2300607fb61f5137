"""Exploration in a Lightning training."""

from __future__ import annotations

import math
import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diffstride._check import UserError
from diffstride.nn.explore import Exploration
from diffstride.tracking import InputSizes


class ExploreStrides(Callback):
    """Set the strides' factors before each training step, for any LightningModule with learnable strides.

    Args:
        exploration: a `Jitter`, a `Sweep`, or one of your own.
        seed: of its noise; None: that of `seed_everything`.
    """

    def __init__(self, exploration: Exploration, seed: int | None = None) -> None:
        self.exploration, self.seed = exploration, seed
        self._share = 1.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how long the training is, and watch the sizes that reach the layers."""
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise UserError(
                f"exploration needs to know how many steps there are, got {steps}: set max_epochs or max_steps"
            )
        self._steps = int(steps)
        self._inputs = InputSizes(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the factors; accumulated batches are one step."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        self.exploration.set_strides(pl_module, trainer.global_step, self._steps, seed=seed)
        self._share = self.exploration.share_of_batch(pl_module, self._inputs.sizes)

    def samples(self, batch_size: int) -> int:
        """How many of a batch's samples the present step should take."""
        return min(max(2, round(self._share * batch_size)), batch_size)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no factors behind, however the training ended."""
        if hasattr(self, "_inputs"):
            self._inputs.close()
            self.exploration.set_strides(pl_module, self._steps, self._steps)
