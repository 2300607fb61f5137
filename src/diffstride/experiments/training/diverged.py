"""Stops a training whose loss is no longer a number, and finds the layer that it comes from."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffstride.errors import RunError
from diffstride.experiments.history import axis_names
from diffstride.experiments.training.checkpoints import checkpoint_from_before
from diffstride.experiments.training.classifier import axes_of, network_of
from diffstride.integrations.input_sizes import InputSizes
from diffstride.nn.strides import learnable_layers, strides


class StopWhenDiverged(Callback):
    """Stop with a clear word when the loss is no longer a number: which layer, when, and what to try.

    For any LightningModule: the loss of each step is looked at before its gradients reach the weights. The host does
    not wait for that: the answer is there long before the backward pass is done. Several processes must agree to stop,
    which takes them time: they look every `log_every_n_steps` steps. `val/loss`, where it is logged, is looked at after
    each validation, and the parameters whenever they are saved.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, to be looked at again."""
        self._repeat = lambda: pl_module.training_step(batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Ask the device whether the loss is a number."""
        self._finite = loss.detach().isfinite().all().to("cpu", non_blocking=True)
        self._answered = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have its answer."""
        every: int = trainer.log_every_n_steps if trainer.world_size > 1 else 1  # type: ignore[attr-defined]
        step = trainer.global_step + 1
        if every and step % every == 0:
            if self._answered is not None:
                self._answered.synchronize()
            self._stop_if(trainer, pl_module, None if self._finite else "the loss", step, self._repeat)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch, to be looked at again."""
        self._repeat = lambda: pl_module.validation_step(batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validation's loss."""
        loss = trainer.callback_metrics.get("val/loss")
        lost = None if loss is None or loss.isfinite() else "val/loss"
        self._stop_if(trainer, pl_module, lost, trainer.global_step, self._repeat)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at the parameters; the file is written after this."""
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
        origin = None
        if repeat is not None:
            with trainer.precision_plugin.forward_context():
                origin = first_lost(pl_module, repeat)
        raise RunError(
            f"epoch {trainer.current_epoch}, step {step}: {lost or 'a loss in another process'} became infinite or not "
            f"a number{f', first {origin}' if origin else ''}: lower learning_rates (and stride_lr, where strides are "
            "learned), start lower, up to a milestone, or clip gradients (--trainer.gradient_clip_val); "
            f"{checkpoint_from_before(trainer)}"
        )


class StopWhenStridesExplode(Callback):
    """Stop with a clear message when a stride becomes NaN or infinite, or explodes. Runs after `ClampStrides`.

    From half the samples of its axis on, a stride changes nothing more. To overshoot that does no harm, and is soon
    done on a short axis: a stride explodes where it more than doubles within `WITHIN` steps and lies beyond all the
    samples of its axis, and beyond `HARMLESS`. What an upper bound of the layer's stops is bounded.
    """

    WITHIN, HARMLESS = 10, 16

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start watching the sizes that reach the layers."""
        self._inputs = InputSizes(network_of(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the strides, those of a checkpoint where a run is resumed."""
        self._past = deque([strides(network_of(pl_module))], self.WITHIN + 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Check that every stride is finite and near its recent values."""
        self._past.append(strides(network_of(pl_module)))
        for name, layer in learnable_layers(network_of(pl_module)):
            before, now = self._past[0][name], self._past[-1][name]
            if not all(map(math.isfinite, now)):
                self._stop(trainer, f"the stride of {name} became {now}")
            upper = layer.bounds[1] or math.inf
            for axis, size in enumerate(self._inputs.sizes.get(name, ())):
                if now[axis] > max(2 * before[axis], size, self.HARMLESS) and now[axis] < upper:
                    self._stop(
                        trainer,
                        f"the stride of {name} exploded from {before[axis]:.4g} to {now[axis]:.4g} within "
                        f"{self.WITHIN} steps, along {axis_names(layer.ndim, axes_of(trainer))[axis]} "
                        f"({size} samples)",
                    )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        if hasattr(self, "_inputs"):
            self._inputs.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching: Lightning tears down only what went well."""
        self.teardown(trainer, pl_module, "fit")

    def _stop(self, trainer: Trainer, said: str) -> None:
        raise RunError(
            f"epoch {trainer.current_epoch}, step {trainer.global_step}: {said}: lower learning_rates or stride_lr "
            "(--model.stride_lr), clip its gradient (--model.stride_clip 1) or give the layer bounds; "
            f"{checkpoint_from_before(trainer)}"
        )


def first_lost(module: LightningModule, repeat: Callable[[], Any]) -> str | None:
    """Where, in a step that is done again, numbers are first lost: in words, or None where they are not.

    It is the first module that makes of finite numbers others, innermost first. The module is left as it was.
    """
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and not _finite(output):
                within = f"in {name}" if _finite((args, kwargs)) else f"in what reaches {name}"
                own = [key for key, parameter in layer.named_parameters(recurse=False) if not _finite(parameter)]
                found.append(f"{within}, whose {own[0]} is lost" if own else within)

        return hook

    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    handles = [
        layer.register_forward_hook(look(name), with_kwargs=True) for name, layer in module.named_modules() if name
    ]
    devices = [module.device] if module.device.type == "cuda" else []
    silent = dict.fromkeys(("log", "log_dict"), lambda *_, **__: None)
    vars(module).update(silent)
    try:
        with (
            contextlib.suppress(Exception),  # a step may not allow to be done again: what was found until then is true
            torch.random.fork_rng(devices),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),  # compiled graphs have no layers to look at
        ):
            repeat()
    finally:
        for name in silent:
            del vars(module)[name]
        for handle in handles:
            handle.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
    return found[0] if found else None


def _finite(values: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
