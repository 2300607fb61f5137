"""Callbacks that stop a training whose loss or strides diverge, and name the layer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffstride.errors import RunError
from diffstride.experiments.history import axis_names
from diffstride.experiments.training.checkpoints import last_good
from diffstride.experiments.training.classifier import axes_of, network_of
from diffstride.integrations.input_sizes import InputSizes
from diffstride.nn.strides import learnable_layers, strides


class StopWhenDiverged(Callback):
    """A callback that stops when the loss becomes NaN or infinite, and names the layer, the step and what to try.

    It works for any LightningModule. The loss of each step is checked before its gradients reach the weights, without
    waiting for the device: the check is done long before the backward pass ends. Several processes must agree to stop,
    which takes time, so they check every `log_every_n_steps` steps. A logged `val/loss` is checked after each
    validation, and the parameters whenever they are saved.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, to repeat the step."""
        self._repeat = lambda: pl_module.training_step(batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Start the check on the device."""
        self._finite = loss.detach().isfinite().all().to("cpu", non_blocking=True)
        self._answered = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if the loss is not finite."""
        every: int = trainer.log_every_n_steps if trainer.world_size > 1 else 1  # type: ignore[attr-defined]
        step = trainer.global_step + 1
        if every and step % every == 0:
            if self._answered is not None:
                self._answered.synchronize()
            self._stop_if(trainer, pl_module, None if self._finite else "the loss", step, self._repeat)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch, to repeat the step."""
        self._repeat = lambda: pl_module.validation_step(batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the validation's loss."""
        loss = trainer.callback_metrics.get("val/loss", torch.zeros(1))
        self._stop_if(trainer, pl_module, None if loss.isfinite() else "val/loss", trainer.global_step, self._repeat)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the parameters; the file is written after this."""
        lost = (name for name, parameter in pl_module.named_parameters() if not parameter.isfinite().all())
        self._stop_if(trainer, pl_module, next(lost, None), trainer.global_step)

    def _stop_if(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        lost: str | None,
        step: int,
        repeat: Callable[[], Any] | None = None,
    ) -> None:
        # All processes stop where one must, or the others would wait for it.
        if not trainer.strategy.reduce_boolean_decision(lost is not None, all=False):
            return
        with trainer.precision_plugin.forward_context():
            origin = repeat and first_lost(pl_module, repeat)
        raise RunError(
            f"epoch {trainer.current_epoch}, step {step}: {lost or 'a loss in another process'} became NaN or infinite"
            f"{f', first {origin}' if origin else ''}: lower learning_rates (and stride_lr, where strides are "
            "learned), start lower, up to a milestone, or clip gradients (--trainer.gradient_clip_val); "
            f"{_last_good(trainer)}"
        )


class StopWhenStridesExplode(Callback):
    """A callback that stops when a stride becomes NaN or infinite, or explodes. It runs after `ClampStrides`.

    A stride above half the samples of its axis changes nothing more, and overshooting is harmless. A stride explodes
    if it more than doubles within `WITHIN` steps and exceeds all samples of its axis and `HARMLESS`. A stride that an
    upper bound of its layer limits does not explode.
    """

    WITHIN, HARMLESS = 10, 16

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the sizes of the layers' inputs."""
        self._inputs = InputSizes(network_of(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the strides; those of the checkpoint in a resumed run."""
        self._past = deque([strides(network_of(pl_module))], self.WITHIN + 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Check that every stride is finite and near its recent values."""
        self._past.append(strides(network_of(pl_module)))
        for name, layer in learnable_layers(network_of(pl_module)):
            before, now = self._past[0][name], self._past[-1][name]
            if not all(map(math.isfinite, now)):
                self._stop(trainer, f"the stride of {name} became {now}")
            for axis, size in enumerate(self._inputs.sizes.get(name, ())):
                upper = layer.options.limits(axis)[1] or math.inf
                if now[axis] > max(2 * before[axis], size, self.HARMLESS) and now[axis] < upper:
                    along = f"along {axis_names(layer.ndim, axes_of(trainer))[axis]} ({size} samples)"
                    grown = f"from {before[axis]:.4g} to {now[axis]:.4g} within {self.WITHIN} steps"
                    self._stop(trainer, f"the stride of {name} exploded {grown}, {along}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        if hasattr(self, "_inputs"):
            self._inputs.close()

    def _stop(self, trainer: Trainer, problem: str) -> None:
        raise RunError(
            f"epoch {trainer.current_epoch}, step {trainer.global_step}: {problem}: lower learning_rates or stride_lr "
            "(--model.stride_lr), clip its gradient (--model.stride_clip 1) or give the layer bounds; "
            f"{_last_good(trainer)}"
        )


def _last_good(trainer: Trainer) -> str:
    folders = [Path(each.dirpath or "") for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return last_good(folders[-1]) if folders else "there is no checkpoint"


def first_lost(module: LightningModule, repeat: Callable[[], Any]) -> str | None:
    """Return a phrase that names the first layer that turned finite inputs into NaN or infinity; None if none does.

    The step is repeated with hooks on all layers. The module is left as it was.
    """
    found: list[str] = []

    def watch(name: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not found and not _finite(output):
            within = f"in {name}" if _finite((args, kwargs)) else f"in what reaches {name}"
            own = [key for key, parameter in layer.named_parameters(recurse=False) if not _finite(parameter)]
            found.append(f"{within}, whose {own[0]} is not finite" if own else within)

    with ExitStack() as undo:
        for name, layer in module.named_modules():
            if name:
                undo.callback(layer.register_forward_hook(partial(watch, name), with_kwargs=True).remove)
        for buffer in module.buffers():
            undo.callback(buffer.copy_, buffer.clone())
        for method in "log", "log_dict":
            vars(module)[method] = lambda *_, **__: None
            undo.callback(vars(module).pop, method)
        with (
            suppress(Exception),  # of a step that cannot be repeated; the layers until then were checked
            torch.random.fork_rng([module.device] if module.device.type == "cuda" else []),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),  # compiled graphs have no layers
        ):
            repeat()
    return found[0] if found else None


def _finite(values: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
