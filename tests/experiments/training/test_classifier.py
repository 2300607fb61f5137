"""The training module: loss, optimiser groups, clipping, and the cost term."""

import os
import socket
import unittest.mock

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn

import diffstride as ds
from diffstride.cost import count_macs
from diffstride.experiments.history import read_rows
from diffstride.experiments.models import ResNet, TinyCNN
from diffstride.experiments.training import ClampStrides, Classifier, classifier, fit


def test_the_cost_term_pushes_strides_up(run):
    _, free = run("free", "--model.cost_weight", "0", steps=12)
    _, costly = run("costly", "--model.cost_weight", "5", steps=12)
    for without, with_cost in zip(free["strides"]["down"], costly["strides"]["down"], strict=True):
        assert with_cost > without + 0.1
    assert costly["macs"] < free["macs"]


def test_schedule_groups_clipping_and_bounds(run, monkeypatch):
    """The optimiser: rates in proportion, no decay of strides, gradients clipped, raw values bounded."""
    seen = []

    class Spy(Classifier):
        def on_before_optimizer_step(self, optimizer):
            layer = self.network.down
            layer.stride.grad.mul_(1e6)
            super().on_before_optimizer_step(optimizer)
            groups = {g["name"]: g for g in optimizer.param_groups}
            seen.append((groups["weights"]["lr"], groups["strides"]["lr"], layer.stride.grad.norm().item()))
            assert groups["strides"]["weight_decay"] == 0
            assert groups["weights"]["weight_decay"] == 5e-4

        def on_train_batch_start(self, batch, batch_idx):
            assert (self.network.down.stride >= 1).all()

    monkeypatch.setattr(fit, "Classifier", Spy)
    run("spied", "--model.stride_lr", "2", "--model.stride_clip", "0.5", steps=12)
    factors = [0.1] * 3 + [1.0] * 5 + [0.1] * 2 + [0.01] * 2
    assert [lr for lr, _, _ in seen] == pytest.approx([0.1 * f for f in factors])
    assert [lr for _, lr, _ in seen] == pytest.approx([2 * f for f in factors])
    assert all(norm <= 0.5001 for _, _, norm in seen)


def test_label_smoothing_and_soft_targets_reach_the_loss():
    network = torch.nn.Linear(3, 4)
    module = Classifier(network, label_smoothing=0.2)
    module.log = lambda *args, **kwargs: None
    x, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    log_p = network(x).log_softmax(-1)
    target = torch.nn.functional.one_hot(labels, 4) * 0.8 + 0.2 / 4
    expected = -(target * log_p).sum(-1).mean()
    torch.testing.assert_close(module.training_step((x, labels), 0), expected)
    soft = torch.rand(5, 4).softmax(-1)
    expected = -((0.8 * soft + 0.05) * log_p).sum(-1).mean()
    torch.testing.assert_close(module.training_step((x, soft), 0), expected)


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers")
def test_the_module_trains_with_plain_loaders_too():
    torch.manual_seed(0)
    network = TinyCNN(width=4)
    before = network.down.strides
    x, y = torch.randn(32, 1, 16, 16), torch.randint(4, (32,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ClampStrides()],
    )  # fmt: skip
    trainer.fit(Classifier(network), loader, loader)
    assert network.down.strides != before
    assert 0 <= trainer.callback_metrics["val/accuracy"] <= 1


class Exponential(torch.nn.Module):
    """The parametrization `S = exp(raw)`."""

    def forward(self, raw):
        return raw.exp()

    def right_inverse(self, stride):
        return stride.log()


def test_the_parameters_behind_a_parametrized_stride_are_clipped():
    network = TinyCNN(width=4)
    torch.nn.utils.parametrize.register_parametrization(network.down, "stride", Exponential())
    raw = network.down.parametrizations.stride.original
    raw.grad = torch.tensor([30.0, 40.0])
    Classifier(network, stride_clip=0.5).on_before_optimizer_step(None)
    torch.testing.assert_close(raw.grad, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("options", [{"budget": 0.5}, {"stride_steps": 0}])
def test_a_measured_search_needs_a_budget_and_a_step(options):
    for search in ("measured", "random"):
        with pytest.raises(ValueError, match=f"stride_search {search} needs a budget, and the step stride_steps"):
            Classifier(nn.Identity(), stride_search=search, **options)


def test_settings_that_would_do_nothing_are_refused():
    with pytest.raises(ValueError, match="search_steps must be 0 unless stride_search is measured, got 5"):
        Classifier(nn.Identity(), search_steps=5)
    with pytest.raises(ValueError, match="search_rounds must be 1 unless weights are trained for search_steps, got 2"):
        Classifier(nn.Identity(), search_rounds=2)
    hard = TinyCNN(width=4, downsample_options={"window": "hard"})
    with pytest.raises(
        ValueError, match=r"hard window have no gradient: .*stride_search to measured, or stride_lr to 0"
    ):
        Classifier(hard)
    assert Classifier(hard, stride_lr=0).has_strides


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's
def test_random_strides_meet_the_budget_and_differ_by_seed():
    """Drawn before the first step, then held; the cost is that of the real network."""

    def strides(seed):
        torch.manual_seed(seed)
        network = ResNet(
            width=1 / 8, downsample="diffstride", placement="before", downsample_options={"window": "inner"}
        )
        model = Classifier(network, budget=0.5, stride_search="random", stride_steps=0)
        strided = sum(count_macs(ResNet(width=1 / 8, downsample="conv"), torch.zeros(1, 3, 32, 32)))
        inputs, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
        trainer = Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, datamodule=Sample(inputs, labels))
        assert sum(count_macs(network, inputs[:1])) == pytest.approx(0.5 * strided, rel=0.02)
        return ds.strides(network)

    assert strides(1) == strides(1)
    assert strides(1) != strides(2)


class Sample(LightningDataModule):
    """A set of one batch with the attributes that a budget needs."""

    def __init__(self, inputs, labels):
        super().__init__()
        self.dataset = torch.utils.data.TensorDataset(inputs, labels)
        self.sample_shape = tuple(inputs.shape[1:])

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.dataset, batch_size=len(self.dataset))

    val_dataloader = train_dataloader


def test_the_first_step_of_adamw_is_the_rate_and_strides_do_not_decay():
    network = TinyCNN(width=4, strides=[[3, 4]])
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    made = Classifier(
        network, learning_rates=[0.01], optimizer="adamw", stride_lr=0.02, weight_decay=0.1
    ).configure_optimizers()
    signs = {}
    for name, parameter in network.named_parameters():
        signs[name] = torch.where(torch.randn_like(parameter) > 0, 1.0, -1.0)
        parameter.grad = 7 * signs[name]
    made["optimizer"].step()
    for name, parameter in network.named_parameters():
        rate, decay = (0.02, 0.0) if "stride" in name else (0.01, 0.1)
        expected = before[name] * (1 - rate * decay) - rate * signs[name]
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-5)


def test_decay_of_kernels_alone():
    """One step without a gradient: kernels shrink by rate times decay, all else stays."""
    torch.manual_seed(0)
    network = TinyCNN(width=4)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    module = Classifier(network, learning_rates=(0.5,), weight_decay=0.1, decay="kernels")
    optimizer = module.configure_optimizers()["optimizer"]
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped}) == len(before)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kernels = {name for name, value in before.items() if value.ndim > 1}
    assert 0 < len(kernels) < len(before) - 1
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if name in kernels else 1.0))


@pytest.mark.parametrize(
    ("options", "kind", "lr"),
    [
        ([], torch.optim.SGD, 0.01),
        (["--model.optimizer", "adamw"], torch.optim.AdamW, 0.1 / 3),
        (["--model.optimizer", "adamw", "--model.compare_lr", "0.02"], torch.optim.AdamW, 0.02),
    ],
)
def test_weights_are_adapted_by_the_optimizer_of_the_training(run, monkeypatch, options, kind, lr):
    seen = []
    measured = classifier.recalibrated_loss
    monkeypatch.setattr(
        classifier, "recalibrated_loss", lambda *a, **given: seen.append(given) or measured(*a, **given)
    )
    hard = ["--model.network.downsample_options.window", "hard", "--model.budget", "1", "--model.compare_steps", "3"]
    run("found", *hard, "--model.stride_search", "measured", "--model.stride_steps", "0", *options, steps=1)
    (given,) = seen
    assert given["steps"] == 3
    optimizer = given["optimizer"]([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_strides_are_held_where_several_processes_wait_for_gradients(run):
    """DDP waits for the gradient of every parameter that it was given."""
    options = ["--model.stride_steps", "3", "--trainer.strategy", "ddp", "--trainer.devices", "1"]
    alone, _ = run("alone", *options[:2], steps=8)
    with socket.socket() as free:  # a port of this test
        free.bind(("", 0))
        port = free.getsockname()[1]
    with unittest.mock.patch.dict(os.environ, MASTER_PORT=str(port)):  # Lightning leaves variables behind
        try:
            cli, result = run("ddp", *options, steps=8)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    steps = {row.step: row.stride for row in read_rows(cli.run_folder / "strides.csv") if row.axis == "height"}
    assert steps[8] != 3.0
    assert result["strides"] == {"down": [*ds.strides(alone.model.network)["down"]]}
