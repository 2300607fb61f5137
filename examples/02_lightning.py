"""Learn strides in a Lightning module. Needs the extra `train`; takes seconds on a CPU."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diffstride as ds
from diffstride.integrations.lightning import ClampStrides, LogStrides


class LitNetwork(pl.LightningModule):
    """A small network with one learned stride."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            ds.DiffStride2d(stride=2.0),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 2),
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels) + 0.1 * ds.stride_cost(self)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(ds.param_groups(self, lr=0.05, stride_lr=0.1, weight_decay=5e-4), momentum=0.9)


def main(steps: int = 60) -> LitNetwork:
    """Train on waves of 2 or 6 cycles in noise, and return the module."""
    pl.seed_everything(0)
    labels = torch.arange(1024) % 2
    cycles = 2.0 + 4.0 * labels.view(-1, 1, 1, 1)
    waves = torch.cos(2 * torch.pi * (cycles * torch.arange(32) / 32 + torch.rand(1024, 1, 1, 1)))
    images = waves + torch.randn(1024, 1, 32, 32)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)

    module = LitNetwork()
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[ClampStrides(), LogStrides()], accelerator="cpu", logger=False,  # or your logger
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    print(f"loss {trainer.callback_metrics['loss']:.3f}, strides {ds.strides(module)}")
    return module


if __name__ == "__main__":
    main()
