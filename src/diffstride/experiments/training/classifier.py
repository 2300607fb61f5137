"""The training of a classifier with learnable strides, as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffstride import _validation
from diffstride._text import one_line
from diffstride.cost import Budget, CostModel, evaluation, stride_cost
from diffstride.errors import UsageError
from diffstride.experiments.data.base import Batch, mean_of_views
from diffstride.experiments.models import Network
from diffstride.experiments.training.checkpoints import load_weights
from diffstride.experiments.training.measured import SearchSplit, augmented_batches, recalibrated_loss, train_briefly
from diffstride.integrations.lightning import ExploreStrides
from diffstride.nn import Exploration, learnable_layers, param_groups

DRAWS = 50
"""The number of random directions that are tried."""
WITHIN = 0.02
"""The part of the budget by which the cost of random strides may miss it."""


class Classifier(LightningModule):
    """A classifier trained with piecewise constant rates, as in the paper.

    The loss is the cross-entropy plus `cost_weight` times the cost of strides (Eq. 6). With several tasks (`MultiTask`,
    and `num_classes` by task), batches and logits are mappings from task names. All samples pass through the network
    together; the loss is the weighted mean of the tasks' losses, and the accuracy the mean of their accuracies.

    Args:
        network: the network, from inputs to logits. A class derived from diffstride.experiments.models.Network.
        learning_rates: rates of the weights, one more than `milestones`.
        milestones: optimiser steps at which the next rate begins.
        optimizer: "sgd" (the paper) or "adamw", for weights and strides. AdamW takes steps of about the rate, whatever
            the size of a gradient: see "The strides' learning rate" in the guide to training.
        momentum: momentum of SGD, for weights and strides.
        weight_decay: decay of the weights; strides never decay.
        decay: "all" weights, or "kernels", those of convolutions and linear layers: no biases, no batch norms.
        stride_lr: rate of the strides while `learning_rates` is highest; otherwise in proportion.
        stride_clip: largest norm of one layer's stride gradient in a step; null does not clip. The gradient of a stride
            is a sum over batch and channels, and occasionally very large.
        label_smoothing: smoothing of the labels in the cross-entropy of training.
        task_weights: weights of the tasks' losses by task name; the default weight is 1.
        cost_weight: weight of the cost of strides in the loss; larger weights give larger strides.
        init_from: weights to start from: a checkpoint of a run, or a `.safetensors` file with the same names. Strides
            that it lacks stay as they are. null: random weights.
        stride_steps: optimiser steps in which strides are learned. Then they are moved onto the budget, if there is
            one, and stay. null: they learn to the end.
        stride_search: "gradient": strides learn by their gradient. "measured": they keep their values until
            `stride_steps`. Then they are set to the budget by the measured loss
            (`CostModel.find_strides`), and stay. "random": they are drawn on the budget instead, as a control.
        search_steps: steps in which weights are trained, at the strides as they are, before allocations are compared by
            the measured loss. A part of the training set is kept for this loss: a group, where the data hold out
            another one for the test, or a random fifth. The training is undone after the search: with `stride_steps` 0,
            the strides that were found are trained from the start.
        search_rounds: how often weights are trained and allocations compared, from the best of the round before, with
            other samples for the loss. Allocations near those that the weights were trained at are preferred.
        compare_steps: steps that adapt the weights to an allocation before its loss is measured. Only those are adapted
            to that are among the best three so far without.
        compare_lr: learning rate of these steps, by SGD or AdamW as in the training. null: 0.01 with SGD, a third of
            the highest of `learning_rates` with AdamW.
        budget: multiply-accumulates to reach, as a fraction of those of the same network with strided layers in place
            of learnable ones (`CostModel.baseline`); null: no budget.
        budget_warmup: training batches in which the budget goes from the cost at the start to its value.
        exploration: `Sweep` or `Jitter`: in a part of the training, other windows than the learned ones, so that
            strides can recover from a bad initial choice; null: none. A `Sweep` uses fewer samples in costly steps.
        channels_last: run 2-d convolutions in this memory format, which is faster on most hardware.

    Raises:
        ValueError: rates and milestones that do not fit together, or a negative value.
    """

    def __init__(
        self,
        network: Network,
        learning_rates: Sequence[float] = (0.1,),
        milestones: Sequence[int] = (),
        optimizer: Literal["sgd", "adamw"] = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        decay: Literal["all", "kernels"] = "all",
        stride_lr: float = 0.1,
        stride_clip: float | None = 1.0,
        label_smoothing: float = 0.0,
        task_weights: dict[str, float] | None = None,
        cost_weight: float = 0.0,
        init_from: str | None = None,
        stride_steps: int | None = None,
        stride_search: Literal["gradient", "measured", "random"] = "gradient",
        search_steps: int = 0,
        search_rounds: int = 1,
        compare_steps: int = 50,
        compare_lr: float | None = None,
        budget: float | None = None,
        budget_warmup: int = 0,
        exploration: Exploration | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if len(learning_rates) != len(milestones) + 1 or list(milestones) != sorted(set(milestones)):
            raise ValueError(
                "milestones must be increasing, one fewer than learning_rates, "
                f"got {list(milestones)} for {len(learning_rates)}"
            )
        for name, value in (
            ("learning_rates", min(learning_rates)),
            ("stride_clip", stride_clip),
            ("budget", budget),
            ("compare_lr", compare_lr),
        ):
            if value is not None:
                _validation.above_zero(name, value)
        for name, value in (
            ("stride_lr", stride_lr),
            ("cost_weight", cost_weight),
            ("weight_decay", weight_decay),
            ("momentum", momentum),
            ("stride_steps", stride_steps or 0),
            ("budget_warmup", budget_warmup),
            ("search_steps", search_steps),
            ("compare_steps", compare_steps),
            ("label_smoothing", label_smoothing),
            *((f"task_weights[{task!r}]", weight) for task, weight in (task_weights or {}).items()),
        ):
            _validation.not_negative(name, value)
        self.save_hyperparameters(ignore=["network", "exploration"])
        self.network = network
        if channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.learning_rates, self.milestones = tuple(learning_rates), tuple(milestones)
        self.optimizer = _validation.one_of("optimizer", optimizer, ("sgd", "adamw"))
        self.momentum, self.weight_decay = momentum, weight_decay
        self.decay = _validation.one_of("decay", decay, ("all", "kernels"))
        self.stride_lr, self.stride_clip = stride_lr, stride_clip
        self.label_smoothing, self.cost_weight = label_smoothing, cost_weight
        self.task_weights = dict(task_weights or {})
        _validation.one_of("stride_search", stride_search, ("gradient", "measured", "random"))
        if stride_search != "gradient" and (budget is None or stride_steps is None):
            raise ValueError(
                f"stride_search {stride_search} needs a budget, and the step stride_steps at which it takes place"
            )
        _validation.integer("search_rounds", search_rounds, 1)
        if search_rounds > 1 and not search_steps:
            raise ValueError(
                f"search_rounds must be 1 unless weights are trained for search_steps, got {search_rounds}"
            )
        if search_steps and stride_search != "measured":
            raise ValueError(f"search_steps must be 0 unless stride_search is measured, got {search_steps}")
        hard = any(layer.window == "hard" and layer.learns_strides for _, layer in learnable_layers(network))
        if hard and stride_search == "gradient" and stride_lr:
            raise ValueError(
                "strides of a hard window have no gradient: set stride_search to measured, or stride_lr to 0, "
                f"got stride_lr {stride_lr:g}"
            )
        self.init_from, self.stride_steps, self.stride_search = init_from, stride_steps, stride_search
        self.search_steps, self.search_rounds = search_steps, search_rounds
        self.compare_steps, self.compare_lr = compare_steps, compare_lr
        self.has_strides = any(True for _ in learnable_layers(network))
        self._holding = False
        self.budget, self.budget_warmup, self.cost = budget, budget_warmup, cast(Budget | None, None)
        self.explorer = ExploreStrides(exploration) if exploration and self.has_strides else None

    def setup(self, stage: str) -> None:
        """Load the weights to start from, and set up the budget. Then a checkpoint may be loaded into both."""
        if stage == "fit" and self.trainer.ckpt_path is None:
            self.load_initial_weights()
        self._set_budget(self.trainer.datamodule)  # type: ignore[attr-defined]

    def load_initial_weights(self) -> None:
        """Load the weights of `init_from` into the network.

        Raises:
            UsageError: a file that cannot be read, or is of another network.
        """
        if self.init_from is not None:
            load_weights(self.network, Path(self.init_from))

    def on_fit_start(self) -> None:
        """Begin a training, in which strides are not held yet."""
        self._holding = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Hold the strides from the step `stride_steps` on."""
        if self.holds_strides and not self._holding:
            self._holding = True
            if self.cost is not None and self.global_step == self.stride_steps:  # a resumed training has set them
                self._set_strides(self.cost)
            if self.trainer.model is self:  # otherwise several processes wait for the gradient of each parameter
                for parameter in self._stride_parameters():
                    parameter.requires_grad_(False)
        if self._holding and self.explorer is not None:
            for _, layer in learnable_layers(self.network):
                layer.set_stride_scale(None)

    def _stride_parameters(self) -> list[nn.Parameter]:
        return [parameter for _, layer in learnable_layers(self.network) for parameter in layer.stride_parameters]

    def _set_strides(self, budget: Budget) -> None:
        """Set the strides to the budget, alike in all processes."""
        if self.stride_search == "measured":
            with torch.random.fork_rng():  # the search leaves the numbers of the training as they are
                self._find_strides(budget)
        elif self.stride_search == "random":
            self._draw_strides(budget)
        else:
            budget.settle()
        layers = [layer for _, layer in learnable_layers(self.network)]
        found = self.trainer.strategy.broadcast([layer.entries for layer in layers])
        for layer, strides in zip(layers, found, strict=True):
            layer.write_strides(strides)

    def _find_strides(self, budget: Budget) -> None:
        """Set the strides by the measured loss, after trainings that are undone."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        layers = [layer for _, layer in learnable_layers(self.network)]
        before = {name: value.clone() for name, value in self.network.state_dict().items()}
        for number in range(self.search_rounds):
            split = SearchSplit.of(data, number) if self.search_steps else None
            loss = recalibrated_loss(
                data, self.device, steps=self.compare_steps, optimizer=self._adaptation, split=split
            )
            if self.search_steps:
                self.print(f"training for {self.search_steps} steps before strides are compared")
                made: Any = self.configure_optimizers()
                batches = augmented_batches(data, self.search_steps, self.device, split)
                train_briefly(self.network, batches, made["optimizer"], made["lr_scheduler"]["scheduler"].step)
            self.print("comparing strides on the budget by the loss")
            quick = partial(loss, adapt=False) if self.compare_steps else None
            for tried in budget.cost.find_strides(loss, budget.target, of="absolute", screen=quick):
                shown = ", ".join(f"{name} {' '.join(f'{s:.2f}' for s in own)}" for name, own in tried.strides.items())
                self.print(f"loss {tried.loss:.4f} at {tried.cost / 1e6:.4g} million MACs: {shown}")
            found = [layer.entries for layer in layers]
            self.network.load_state_dict(before)
            for layer, strides in zip(layers, found, strict=True):
                layer.write_strides(strides)

    def _adaptation(self, weights: list[nn.Parameter]) -> Optimizer:
        """Return the optimizer that adapts weights to the strides that are compared."""
        if self.optimizer == "adamw":
            lr = self.compare_lr or max(self.learning_rates) / 3
            return torch.optim.AdamW(weights, lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(weights, self.compare_lr or 0.01, momentum=self.momentum)

    def _draw_strides(self, budget: Budget) -> None:
        """Draw directions of log strides uniformly, until one meets the budget."""
        direction = torch.distributions.Dirichlet(torch.ones(len(budget.places)))
        for _ in range(DRAWS):
            budget.settle(direction.sample().tolist())
            if abs(budget.cost.exact() / budget.target - 1) <= WITHIN:
                return
        raise UsageError(f"model.budget must be in reach of random strides: none of {DRAWS} draws meets {self.budget}")

    @property
    def holds_strides(self) -> bool:
        """True from the step `stride_steps` on."""
        return self.stride_steps is not None and self.global_step >= self.stride_steps

    def try_on(self, data: Any) -> None:
        """Check that the network and the settings fit loaded data. This needs no trainer.

        Raises:
            UsageError: an input that the network cannot take, another number of classes, a budget out of reach.
        """
        try:
            with torch.no_grad(), evaluation(self.network):
                logits = self(torch.zeros(1, *data.sample_shape))
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"the network cannot take inputs of {data.sample_shape} (change the data, or model.network, "
                f"in_channels for example): {one_line(error)}"
            ) from error
        tasks = logits if isinstance(logits, Mapping) else {}
        outputs = {task: own.shape[-1] for task, own in tasks.items()} or logits.shape[-1]
        if outputs != data.outputs:
            raise UsageError(
                f"the network has {outputs} outputs, and the data other classes: set model.network.num_classes to "
                f"{data.outputs}"
            )
        if tasks and self.stride_search == "measured":
            raise UsageError(f"stride_search measured needs data with one task, got {', '.join(tasks)}")
        if unknown := sorted(self.task_weights.keys() - tasks.keys()):
            raise UsageError(f"task_weights must name tasks of the data, got {unknown[0]}")
        self._set_budget(data)

    def _set_budget(self, data: Any) -> None:
        if self.budget is None or self.cost is not None:
            return
        try:
            cost = CostModel(self.network, torch.zeros(1, *data.sample_shape))
            self.cost = cost.budget(self.budget, warmup=self.budget_warmup)
        except ValueError as error:
            raise UsageError(str(error).replace("amount must", "budget must")) from error

    def example(self) -> Tensor:
        """Return one input of the data's shape, in the trainer's precision."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        zeros: Tensor = self.trainer.precision_plugin.convert_input(torch.zeros(1, *data.sample_shape))
        return zeros.to(self.device)

    def forward(self, x: Tensor) -> Any:
        """Return the logits; those of several tasks by name."""
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        parts = _by_task(batch)
        if self.explorer is not None and not self._holding:
            for task, (inputs, targets) in parts.items():
                samples = self.explorer.samples(len(inputs))
                parts[task] = inputs[:samples], targets[:samples]
        logits = self._logits(parts)
        losses = {
            task: F.cross_entropy(logits[task], targets, label_smoothing=self.label_smoothing)
            for task, (_, targets) in parts.items()
        }
        weights = {task: self.task_weights.get(task, 1.0) for task in parts}
        loss = sum(weights[task] * own for task, own in losses.items()) / sum(weights.values())
        assert isinstance(loss, Tensor)
        self.log("train/loss", loss, prog_bar=True)
        for task in filter(None, losses):
            self.log(f"train/loss/{task}", losses[task])
        if self.has_strides:
            cost = stride_cost(self.network)
            self.log("train/stride_cost", cost)
            if self.cost_weight:
                loss = loss + self.cost_weight * cost
        if self.cost is not None and not self.holds_strides and self.stride_search == "gradient":
            optimizer: Any = self.optimizers()
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            loss = loss + self.cost(lr=rates["strides"])
            self.log("train/macs", float(self.cost.cost.exact()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss and accuracy of one batch, by task; Lightning averages them."""
        parts = _by_task(batch)
        logits = self._logits(parts)
        for task, (_, labels) in parts.items():
            own = mean_of_views(logits[task], len(labels))
            correct = (own.argmax(-1) == labels).float().mean()
            options: dict[str, Any] = {"batch_size": len(labels), "sync_dist": True, "add_dataloader_idx": False}
            self.log(f"val/loss/{task}".rstrip("/"), F.cross_entropy(own, labels), **options)
            self.log(f"val/accuracy/{task}".rstrip("/"), correct, prog_bar=not task, **options)

    def on_validation_epoch_end(self) -> None:
        """Log the means over tasks."""
        for name in ("val/loss", "val/accuracy"):
            found = [value for key, value in self.trainer.callback_metrics.items() if key.startswith(f"{name}/")]
            if found:
                self.log(name, torch.stack(found).mean(), prog_bar=name == "val/accuracy", sync_dist=True)

    def _logits(self, parts: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Return each task's logits, computed in one pass."""
        inputs = [inputs for inputs, _ in parts.values()]
        found = self(torch.cat(inputs) if len(inputs) > 1 else inputs[0])
        if not isinstance(found, Mapping):
            return dict.fromkeys(parts, found)
        logits, start = {}, 0
        for task, (own, _) in parts.items():
            logits[task] = found[task][start : start + len(own)]
            start += len(own)
        return logits

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip each layer's stride gradient separately from the weights'; leave out those of strides that are held."""
        if self._holding:
            for parameter in self._stride_parameters():
                parameter.grad = None
        if self.stride_clip is not None:
            for _, layer in learnable_layers(self.network):
                clip_grad_norm_(layer.stride_parameters, self.stride_clip)

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback of the exploration."""
        return [] if self.explorer is None else [self.explorer]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer of weights and strides, and the schedule of both."""
        highest = max(self.learning_rates)
        stride_lr = self.stride_lr if self.stride_search == "gradient" else 0.0
        groups = param_groups(self.network, highest, stride_lr=stride_lr, weight_decay=self.weight_decay)
        if self.decay == "kernels":
            weights = groups[0]["params"]
            groups[0]["params"] = [parameter for parameter in weights if parameter.ndim > 1]
            others = [parameter for parameter in weights if parameter.ndim <= 1]
            groups.append({"params": others, "lr": highest, "weight_decay": 0.0, "name": "without_decay"})
        optimizer = (
            torch.optim.AdamW(groups) if self.optimizer == "adamw" else torch.optim.SGD(groups, momentum=self.momentum)
        )

        def factor(step: int) -> float:
            return self.learning_rates[sum(step >= m for m in self.milestones)] / highest

        schedule: Any = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def _by_task(batch: Batch | Mapping[str, Batch]) -> dict[str, Batch]:
    """Return a batch by task; a single task has the name ""."""
    return dict(batch) if isinstance(batch, Mapping) else {"": batch}


def network_of(pl_module: LightningModule) -> nn.Module:
    """Return the network that names its layers."""
    return pl_module.network if isinstance(pl_module, Classifier) else pl_module


def axes_of(trainer: Trainer) -> list[str]:
    """Return the names of the data's axes, if it has any."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return [axis.name for axis in getattr(data, "axes", ())]
