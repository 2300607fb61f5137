"""Trainings that diverge stop and name the layer; strides that only grow large do not stop them."""

import math
import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diffstride as ds
from diffstride.errors import RunError
from diffstride.experiments.training import ClampStrides, ExploreStrides, StopWhenDiverged, StopWhenStridesExplode
from diffstride.experiments.training.diverged import first_lost

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, of such loops


class Exp(nn.Module):
    def forward(self, x):
        return (100 * x.abs() + 100).exp()


class Block(nn.Module):
    """A block whose branches are finite and whose quotient is not."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x) / (0 * self.other(x))


class Steps(LightningModule):
    """Any training: here one that adds what `extra` makes of its network to the loss."""

    def __init__(self, network, extra=lambda network: 0.0, lr=0.1, stride_lr=0.1, clip=None):
        super().__init__()
        self.network, self.extra, self.lr, self.stride_lr, self.clip = network, extra, lr, stride_lr, clip

    def training_step(self, batch, batch_idx):
        loss = self.network(batch[0]).square().mean() + self.extra(self.network)
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer):
        for _, layer in ds.nn.learnable_layers(self.network):
            if self.clip:
                nn.utils.clip_grad_norm_(layer.stride, self.clip)

    def configure_optimizers(self):
        return torch.optim.SGD(ds.param_groups(self, self.lr, stride_lr=self.stride_lr), momentum=0.9)


def train(module, tmp_path, inputs, *callbacks, steps=60, **options):
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, enable_checkpointing=False,
        callbacks=[ClampStrides(), StopWhenStridesExplode(), StopWhenDiverged(), *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(inputs), 2))
    return trainer


def layers(*more):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), ds.DiffStride2d(2.0, 1.0), *more)


@pytest.mark.parametrize(
    ("network", "value", "message"),
    [
        (layers(Exp(), nn.Conv2d(4, 4, 1)), 1.0, "in network.4"),
        (layers(Block(), nn.ReLU()), 1.0, "in network.4"),
        (layers(nn.Conv2d(4, 4, 1)), math.inf, "in what reaches network.0"),
        (layers(nn.ReLU()), 1.0, None),
    ],
    ids=["a layer", "a block whose layers are sound", "the batch", "nowhere"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_first_layer_with_values_that_are_not_finite(network, value, message, compiled):
    module = Steps(network)
    if compiled:
        network.compile(backend="eager")
    images = torch.randn(2, 3, 16, 16)
    images[0, 0, 5, 5] = value
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    assert first_lost(module, lambda: module.training_step([images], 0)) == message
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer._forward_hooks for layer in module.modules())
    assert "log" not in vars(module)


def test_a_layer_whose_weight_is_lost_is_named_with_it():
    module = Steps(layers(nn.Conv2d(4, 4, 1)))
    module.network[4].bias.data.fill_(math.nan)
    message = first_lost(module, lambda: module.training_step([torch.randn(2, 3, 16, 16)], 0))
    assert message == "in network.4, whose bias is not finite"


@pytest.mark.parametrize("accumulated", [1, 2])
def test_any_training_stops_before_its_weights_are_lost(tmp_path, accumulated):
    images = torch.randn(12, 3, 16, 16)
    images[8] = math.nan  # the fifth batch
    module = Steps(layers(nn.Conv2d(4, 4, 1)))
    message = "the loss became NaN or infinite, first in what reaches network.0: lower learning_rates"
    step = -(-5 // accumulated)
    with pytest.raises(RunError, match=f"epoch 0, step {step}: {message}.*; there is no checkpoint"):
        train(module, tmp_path, images, accumulate_grad_batches=accumulated)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_stride_that_explodes_stops_the_training(tmp_path):
    module = Steps(layers(), stride_lr=1e4)
    with pytest.raises(RunError) as error:
        train(module, tmp_path, torch.randn(64, 3, 26, 20))
    found = re.fullmatch(
        r"epoch 0, step 1: the stride of network.3 exploded from 2 to ([\d.]+) within 10 steps, along (height|width) "
        r"\((24|18) samples\): lower learning_rates or stride_lr .*; there is no checkpoint",
        str(error.value),
    )
    assert found
    assert float(found[1]) > int(found[3]) == {"height": 24, "width": 18}[found[2]]


@pytest.mark.parametrize(
    ("size", "layer", "options", "callbacks"),
    [
        (34, ds.DiffStride2d(2.0, 4.0), {"stride_lr": 0.3, "clip": 1.0}, []),
        (8, ds.DiffStride2d(1.0, 1.0), {"stride_lr": 0.3, "clip": 1.0}, []),
        (4, ds.DiffStride2d(1.0, 1.0, shared=True), {"stride_lr": 0.3, "clip": 1.0}, []),
        (34, ds.DiffStride2d(1.5, 1.0, bounds=(1.0, 100.0)), {"stride_lr": 1e4}, []),
        (34, ds.DiffStride2d(1.5, 4.0), {"clip": 1.0}, [ExploreStrides(ds.Sweep(depth=1.0))]),
        (34, ds.DiffStride2d(9.0, 4.0), {"clip": 1.0}, [ExploreStrides(ds.Jitter(2.0), seed=0)]),
    ],
    ids=["a strong cost", "a short axis", "a very short axis", "an upper bound", "a sweep", "a wild jitter"],
)
def test_large_strides_are_no_explosion(tmp_path, size, layer, options, callbacks):
    """A cost ten times as strong as that of the demo, at its rate and at three times this."""
    module = Steps(nn.Sequential(nn.Conv2d(3, 4, 1), layer), lambda network: 3 * ds.stride_cost(network), **options)
    train(module, tmp_path, torch.randn(120, 3, size, size), *callbacks)
    assert max(layer.strides) > 2 * max(layer.initial_strides) or callbacks
