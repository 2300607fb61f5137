"""The training of a classifier with learnable strides, as a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffstride._check import UserError
from diffstride.cost import Budget, CostModel, evaluation, stride_cost
from diffstride.models import Network
from diffstride.nn import Exploration, learnable_layers, param_groups
from diffstride.training.explore import ExploreStrides


class Classifier(LightningModule):
    """Cross-entropy plus `cost_weight` times Eq. 6, SGD with momentum, piecewise constant rates as in the paper.

    Args:
        network: inputs to logits. A class derived from diffstride.models.Network, by name.
        learning_rates: rates of the weights, one more than `milestones`.
        milestones: optimiser steps at which the rate goes on to the next.
        momentum: of SGD, for weights and strides alike.
        weight_decay: of the weights; strides never decay.
        stride_lr: rate of the strides where `learning_rates` is highest; elsewhere in proportion.
        stride_clip: largest norm of one layer's stride gradient in a step; null does not clip. The gradient of a stride
            is a sum over batch and channels, and now and then a very large one.
        label_smoothing: of the cross-entropy in training.
        cost_weight: weight of the cost of strides (Eq. 6) in the loss; larger ones give larger strides.
        budget: multiply-accumulates to end at, as a fraction of those that the network would have with strided layers
            in place of learnable ones (`CostModel.original`); null: no budget.
        exploration: `Sweep` or `Jitter`: for a part of the training, windows other than the learned ones, so that
            strides find what their start hides; null: none. A `Sweep` takes fewer samples into steps that cost more.
        channels_last: run 2-d convolutions in this memory format, faster on most hardware.

    Raises:
        ValueError: rates and milestones that do not fit together, a negative value.
    """

    def __init__(
        self,
        network: Network,
        learning_rates: Sequence[float] = (0.1,),
        milestones: Sequence[int] = (),
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        stride_lr: float = 0.1,
        stride_clip: float | None = 1.0,
        label_smoothing: float = 0.0,
        cost_weight: float = 0.0,
        budget: float | None = None,
        exploration: Exploration | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if len(learning_rates) != len(milestones) + 1:
            raise ValueError(
                f"learning_rates must have one entry more than milestones, got {len(learning_rates)} for {milestones}"
            )
        if list(milestones) != sorted(set(milestones)) or any(m < 1 for m in milestones):
            raise ValueError(f"milestones must be increasing steps >= 1, got {list(milestones)}")
        if not min(learning_rates) > 0:
            raise ValueError(f"learning_rates must be > 0, got {list(learning_rates)}")
        for name, value in ("stride_lr", stride_lr), ("cost_weight", cost_weight), ("label_smoothing", label_smoothing):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if stride_clip is not None and not stride_clip > 0:
            raise ValueError(f"stride_clip must be > 0, got {stride_clip}")
        self.save_hyperparameters(ignore=["network", "exploration"])
        self.network = network
        if channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.learning_rates, self.milestones = tuple(learning_rates), tuple(milestones)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.stride_lr, self.stride_clip = stride_lr, stride_clip
        self.label_smoothing, self.cost_weight = label_smoothing, cost_weight
        self.has_strides = any(True for _ in learnable_layers(network))
        if budget is not None and not budget > 0:
            raise ValueError(f"budget must be > 0, got {budget}")
        if budget is not None and not self.has_strides:
            raise ValueError("budget must be null for a network without learnable strides: nothing could meet it")
        self.budget, self.cost = budget, cast(Budget | None, None)
        self.explorer = ExploreStrides(exploration) if exploration and self.has_strides else None

    def setup(self, stage: str) -> None:
        """Set up the budget, before a checkpoint is loaded into it."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.budget is None or self.cost is not None:
            return
        if data is None:
            raise UserError("budget needs a datamodule, which knows the shape of an input")
        try:
            self.cost = CostModel(self.network, torch.zeros(1, *data.sample_shape)).budget(self.budget)
        except UserError as error:
            raise UserError(str(error).replace("amount must", "budget must")) from error

    def on_fit_start(self) -> None:
        """Try the network on the data's shape, so that a misfit is told before any training."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None:  # plain loaders, in a loop of the user's own
            return
        try:
            with torch.no_grad(), evaluation(self.network), self.trainer.precision_plugin.forward_context():
                outputs = self.network(self.example()).shape[-1]
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the network cannot take inputs of {data.sample_shape} (change the data, or model.network, "
                f"in_channels for example): {' '.join(str(error).split())}"
            ) from error
        if outputs != data.num_classes:
            raise UserError(
                f"the data has {data.num_classes} classes but the network {outputs} outputs: "
                f"set model.network.num_classes to {data.num_classes}"
            )

    def example(self) -> Tensor:
        """One input of the data's shape, as the trainer's precision has it."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        zeros: Tensor = self.trainer.precision_plugin.convert_input(torch.zeros(1, *data.sample_shape))
        return zeros.to(self.device)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        inputs, targets = batch
        if self.explorer is not None:
            samples = self.explorer.samples(len(inputs))
            inputs, targets = inputs[:samples], targets[:samples]
        loss = F.cross_entropy(self(inputs), targets, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        if self.has_strides:
            cost = stride_cost(self.network)
            self.log("train/stride_cost", cost)
            if self.cost_weight:
                loss = loss + self.cost_weight * cost
        if self.cost is not None:
            optimizer: Any = self.optimizers()
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            loss = loss + self.cost(lr=rates["strides"])
            self.log("train/macs", float(self.cost.cost.count()))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of one batch; their means over the set are logged."""
        inputs, labels = batch
        logits = self(inputs)
        correct = (logits.argmax(-1) == labels).float().mean()
        self.log("val/loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log("val/accuracy", correct, batch_size=len(labels), prog_bar=True, sync_dist=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip each layer's stride gradient, apart from the weights'."""
        if self.stride_clip is not None:
            for _, layer in learnable_layers(self.network):
                clip_grad_norm_(layer.stride, self.stride_clip)

    def configure_callbacks(self) -> list[Callback]:
        """The exploration's."""
        return [] if self.explorer is None else [self.explorer]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD over weights and strides, and the schedule that both follow."""
        highest = max(self.learning_rates)
        groups = param_groups(self.network, highest, stride_lr=self.stride_lr, weight_decay=self.weight_decay)
        optimizer = torch.optim.SGD(groups, momentum=self.momentum)

        def factor(step: int) -> float:
            return self.learning_rates[sum(step >= m for m in self.milestones)] / highest

        schedule: Any = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}
