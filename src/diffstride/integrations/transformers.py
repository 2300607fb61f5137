"""A callback for the `Trainer` of transformers that keeps strides within their bounds."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffstride.nn.strides import clamp_strides_


class ClampStrides(TrainerCallback):
    """A callback that clamps strides to their bounds after each optimizer step, so that raw values cannot run away.

    `Trainer(model, arguments, callbacks=[ClampStrides()], optimizers=(optimizer, None), ...)`, where the optimizer is
    made from `diffstride.param_groups(model, ...)`. The Trainer's own optimizer decays strides like weights.
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clamp the strides of the whole model."""
        clamp_strides_(kwargs["model"])
