"""Exploration in a run, in a loop of one's own module, and on two processes."""

import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diffstride as ds
from diffstride.errors import UsageError
from diffstride.experiments import history
from diffstride.experiments.models import TinyCNN
from diffstride.experiments.training import Classifier, ExploreStrides
from diffstride.experiments.training.fit import train
from diffstride.experiments.training.runs import load
from diffstride.nn import learnable_layers

CONFIG = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
SMALL = [
    "--config", CONFIG,
    "--data.train_samples", "192", "--data.test_samples", "64", "--data.batch_size", "32", "--model.network.width", "4",
    "--model.milestones", "[3,8,10]", "--trainer.max_steps", "-1", "--trainer.max_epochs", "3",
    "--trainer.enable_progress_bar", "false",
]  # fmt: skip
EXPLORATIONS = [["Jitter", "--model.exploration.sigma", "0.3"], ["Sweep", "--model.exploration.until", "0.8"]]


class Notes(Callback):
    """A callback that records the scale of the strides and the number of samples in each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.samples = None
        if not hasattr(self, "handle"):
            self.handle = pl_module.network.register_forward_pre_hook(self.hook)

    def hook(self, network, inputs):
        if network.training:
            self.samples = len(inputs[0])

    def on_train_batch_end(self, trainer, pl_module, *_):
        jitter = getattr(pl_module.network.down, "stride_scale", None)
        self.seen.append((trainer.global_step, jitter, self.samples))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train in a folder of the test's own; returns (cli, what each step saw)."""

    def start(name, *more):
        notes = Notes()
        with monkeypatch.context() as patch:
            callbacks = Classifier.configure_callbacks
            patch.setattr(Classifier, "configure_callbacks", lambda self: [*callbacks(self), notes])
            cli = train([*SMALL, "--runs", str(tmp_path), "--name", name, *more])
        return cli, notes.seen

    return start


@pytest.mark.parametrize("exploration", EXPLORATIONS, ids=lambda e: e[0])
def test_a_resumed_run_explores_and_ends_as_an_uninterrupted_one(run, exploration):
    explored = ["--model.exploration", *exploration]
    whole, seen = run("whole", *explored)

    class StopsError(Exception):
        pass

    def stop(trainer, pl_module, *_):
        if trainer.global_step == 8:  # the checkpoint is that of step 6
            raise StopsError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "on_train_batch_end", lambda self, *_: stop(self.trainer, self), raising=False)
        with pytest.raises(StopsError):
            run("half", *explored)
    resumed, after = run("half", *explored, "--ckpt_path", "last")
    assert after == seen[6:]
    jitters = [jitter for _, jitter, _ in seen]
    assert len(set(jitters)) > 6
    until = 9 if exploration[0] == "Jitter" else 15  # of 18 steps, 0.5 and 0.8
    assert [jitter is None for jitter in jitters] == [step >= until for step in range(18)]
    ends = [cli.model.network.state_dict() for cli in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends), strict=True))
    for name in ("strides.csv", "metrics.csv"):
        assert history.read_dicts(resumed.run_folder / name) == history.read_dicts(whole.run_folder / name), name


def test_the_run_differs_by_what_is_explored_and_records_the_learned_strides(run):
    plain, _ = run("plain")
    swept, _ = run("swept", "--model.exploration", "Sweep")
    first = [history.read_rows(cli.run_folder / "strides.csv")[:2] for cli in (plain, swept)]
    assert first[0] == first[1] == [(0, "down", axis, 3.0, 18) for axis in ("height", "width")]
    ends = [json.loads((cli.run_folder / "result.json").read_text())["strides"] for cli in (plain, swept)]
    assert ends[0] != ends[1]
    assert swept.model.network.down.stride_scale is None
    with (swept.run_folder / "metrics.csv").open() as file:
        costs = [float(row["train/stride_cost"]) for row in csv.DictReader(file) if row["train/stride_cost"]]
    assert costs[0] == pytest.approx(1 / 9, rel=0.1)  # not that of the open window


def test_a_sweep_takes_as_many_samples_as_leave_the_map_at_its_size(run):
    _, seen = run("run", "--model.exploration", "Sweep", "--model.network.strides", "[[3,3]]")
    for step, jitter, samples in seen:
        if jitter is None:
            assert samples == 32
        else:
            opened = [min(32, int(32 / (3 * f) + 8)) for f in jitter]
            assert samples == pytest.approx(32 * 18 * 18 / (opened[0] * opened[1]), abs=1.5), step
    assert seen[0][2] < 20 < seen[8][2]
    _, seen = run("jittered", "--model.exploration", "Jitter")
    assert all(samples == 32 for _, _, samples in seen)


def test_one_seed_gives_one_noise_and_another_another(run):
    noise = [
        [jitter for _, jitter, _ in run(f"run{i}", "--model.exploration", "Jitter", "--seed_everything", seed)[1]]
        for i, seed in enumerate(("5", "5", "6"))
    ]
    assert noise[0] == noise[1]
    assert not set(noise[0][:8]) & set(noise[2][:8])


def test_networks_without_learned_strides_leave_it_aside(run):
    cli, _ = run("conv", "--model.exploration", "Sweep", "--model.network.downsample", "avg")
    assert cli.model.explorer is None


def test_a_run_with_exploration_is_read_back(run):
    cli, _ = run("run", "--model.exploration", "Sweep", "--model.exploration.depth", "0.5")
    loaded = load(cli.run_folder)
    assert loaded.config["model"]["exploration"]["init_args"] == {"depth": 0.5, "until": 0.5}
    images, _ = cli.datamodule.test_set
    assert torch.equal(loaded.network(images), cli.model.network.eval()(images))


class Own(LightningModule):
    """A module that knows nothing of this project's training."""

    def __init__(self):
        super().__init__()
        self.net = TinyCNN(width=4)
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(self.net.down.stride_scale)
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(ds.param_groups(self, 0.01))


@pytest.mark.filterwarnings("ignore")
def test_the_callback_serves_any_module_and_leaves_nothing_behind(tmp_path):
    module = Own()
    fit_own(module, tmp_path, ds.Jitter(0.2), accumulate_grad_batches=2)
    assert len(module.seen) == 16
    assert module.seen[::2] == module.seen[1::2]  # accumulated batches are one step
    assert len(set(module.seen)) == 5  # four steps of eight, then none
    twin = Own()
    ds.Jitter(0.2).set_strides(twin, 1, 8, seed=3)
    assert module.seen[2] == twin.net.down.stride_scale
    assert [layer.stride_scale for _, layer in learnable_layers(module)] == [None]


class FailsError(Exception):
    pass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("error", [FailsError, KeyboardInterrupt])
def test_an_interrupted_training_leaves_nothing_behind(tmp_path, error):
    class Fails(Own):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 3:
                raise error
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises((FailsError, SystemExit)):
        fit_own(module, tmp_path, ds.Sweep())
    assert module.seen[2] is not None
    assert module.net.down.stride_scale is None
    assert not module.net.down._forward_pre_hooks


@pytest.mark.filterwarnings("ignore")
def test_the_callback_needs_automatic_optimization(tmp_path):
    by_hand = Own()
    by_hand.automatic_optimization = False
    with pytest.raises(UsageError, match="needs automatic optimization"):
        fit_own(by_hand, tmp_path, ds.Sweep())


@pytest.mark.filterwarnings("ignore")
def test_with_plain_loaders_a_resumed_training_takes_the_same_samples(tmp_path):
    """No data module tells the sizes, and Lightning tries no validation on resuming."""

    class Notes(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            (explorer,) = (c for c in trainer.callbacks if isinstance(c, ExploreStrides))
            self.seen.append((pl_module.net.down.stride_scale, explorer.samples(16)))

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole, rest = Notes(), Notes()
    fit_own(Own(), tmp_path, ds.Sweep(until=0.9), whole)
    fit_own(Own(), tmp_path, ds.Sweep(until=0.9), rest, ckpt_path=tmp_path / "0.ckpt", seed=None)
    assert rest.seen == whole.seen[8:]
    # The least share while sizes are unknown; a map of 16 samples is whole at S = 2 and R = 4, open or not.
    assert [taken for _, taken in whole.seen[:2]] == [4, 16]


def fit_own(module, folder, exploration, *callbacks, seed=3, ckpt_path=None, **options):
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(32, 1, 16, 16), torch.randint(4, (32,))), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(
        max_epochs=2, callbacks=[ExploreStrides(exploration, seed), *callbacks], default_root_dir=folder,
        enable_model_summary=False, **quiet, **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=ckpt_path is not None)


TWO_PROCESSES = """
    import os, sys, torch, torch.distributed as dist
    from torch import nn
    import diffstride as ds
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=int(sys.argv[1]), world_size=2, init_method=f"file://{sys.argv[2]}")
    torch.manual_seed(0)
    first, second, third = ds.DiffStride2d((3.0, 2.0), 1.0), ds.DiffStride2d(2.0, 1.0), ds.DiffStride2d(2.0, 1.0)
    third.stride = second.stride  # two branches with one stride
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second, self.third = nn.Conv2d(1, 4, 3), first, second, third
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)
        def forward(self, x):
            x = self.first(self.norm(self.conv(x))).relu()
            self.sizes = tuple(self.second(x).shape), tuple(self.third(x).shape)
            return self.head((self.second(x) + self.third(x.square())).mean((-2, -1)))
    net = Net()
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(ds.param_groups(net, 0.05, stride_lr=0.1), momentum=0.9)
    torch.manual_seed(1 + dist.get_rank())  # each rank has data, and draws, of its own
    notes = []
    for step in range(12):
        explore = ds.Jitter(0.3) if step % 2 else ds.Sweep()
        explore.set_strides(net, step, 24, seed=7)
        x = torch.randn(4, 1, 26, 23)
        loss = nn.functional.cross_entropy(model(x), torch.randint(2, (4,)))
        optimizer.zero_grad(); loss.backward(); optimizer.step(); ds.clamp_strides_(net)
        strides = first.stride.tolist(), second.stride.tolist(), first.stride.grad.tolist()
        notes.append((first.stride_scale, second.stride_scale, third.stride_scale, net.sizes, *strides, loss.item()))
    torch.save(notes, sys.argv[3])
"""


def test_two_processes_have_the_same_strides_in_every_step(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    environment = os.environ | {"PYTHONHASHSEED": "random"}
    meeting = str(tmp_path / "meeting")
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, str(script), str(rank), meeting, str(out)], env=environment)
        for rank, out in enumerate(outs)
    ]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    one, two = (torch.load(out, weights_only=True) for out in outs)
    for a, b in zip(one, two, strict=True):
        assert a[:-1] == b[:-1]  # factors, sizes, strides and their gradients, to the bit
        assert a[-1] != b[-1]  # of other data
        assert a[1] == a[2]
    assert len({notes[0] for notes in one}) > 6
    assert len({notes[3] for notes in one}) > 3
    assert one[-1][4] != [3.0, 2.0]
