"""Stops a training whose loss is no longer a number, and finds the layer that it comes from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffstride._check import WorkError
from diffstride.training.checkpoints import checkpoint_from_before


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
        raise WorkError(
            f"epoch {trainer.current_epoch}, step {step}: {lost or 'a loss in another process'} became infinite or not "
            f"a number{f', first {origin}' if origin else ''}: lower learning_rates (and stride_lr, where strides are "
            "learned), start lower, up to a milestone, or clip gradients (--trainer.gradient_clip_val); "
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
