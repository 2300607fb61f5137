"""Converted models in transformers: a callback for its `Trainer`, and saving with the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffstride.convert import Plan
from diffstride.convert.apply import share_strides
from diffstride.nn.strides import clamp_strides_

PLAN = "diffstride.json"
"""The file of the plan, beside the weights."""

Model = TypeVar("Model", bound=PreTrainedModel)


class ClampStrides(TrainerCallback):
    """A callback that clamps strides to their bounds after each optimizer step, so that raw values cannot run away.

    `Trainer(model, arguments, callbacks=[ClampStrides(plan)], optimizers=(optimizer, None), ...)`, where the optimizer
    is made from `diffstride.param_groups(model, ...)`. The Trainer's own optimizer decays strides like weights.

    Args:
        plan: the plan by which the model was converted. It is written into every checkpoint, for `from_pretrained`.
    """

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clamp the strides of the whole model."""
        clamp_strides_(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the plan beside the checkpoint."""
        if self.plan is not None and state.is_world_process_zero:
            self.plan.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / PLAN)


def save_pretrained(model: PreTrainedModel, plan: Plan, folder: str | Path, **options: Any) -> None:
    """Save a converted model as `model.save_pretrained(folder, **options)` does, and its plan.

    Args:
        model: the converted model.
        plan: the plan by which it was converted.
        folder: the folder to write to.
        options: those of `save_pretrained`.
    """
    model.save_pretrained(folder, **options)
    plan.save(Path(folder) / PLAN)


def from_pretrained(model_class: type[Model], folder: str | Path, **options: Any) -> Model:
    """Load a converted model with its strides from a folder that has weights and a plan.

    Args:
        model_class: the class of the model, such as `ResNetForImageClassification`.
        folder: a folder of `save_pretrained`, or a checkpoint of a `Trainer` with `ClampStrides(plan)`.
        options: those of `model_class.from_pretrained`.

    Raises:
        UsageError: the folder has no plan, or the plan is of another model.
    """
    plan = Plan.load(Path(folder) / PLAN)

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        plan.apply(self)

    converted = type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})
    model: Model = converted.from_pretrained(folder, **options)  # type: ignore[attr-defined]
    model.__class__ = model_class
    share_strides(model, plan)  # each layer was given its own parameter
    return model
