"""The work of two processes of a training; imported by these processes, too."""

import hashlib
import os
import socket
import sys

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import diffstride as ds
from diffstride.experiments.commands.main import main
from diffstride.experiments.models import TinyCNN
from tests.helpers.processes import PROCESSES

WORLD = 2
CLASSES = 4


def run(task, folder, *arguments):
    """Return the results of `task(rank, *arguments)` in the processes of a group."""
    return _together(_grouped, folder, task, *arguments)


def run_fit(folder, arguments):
    """Return the notes of `Record` in each process of `diffstride fit`, started like torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return _together(_fit, folder, port, arguments)


def _together(target, folder, *arguments):
    processes = [PROCESSES.Process(target=target, args=(rank, folder, *arguments)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * WORLD
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def _grouped(rank, folder, task, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=f"file://{folder}/group")
    torch.save(task(rank, *arguments), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _fit(rank, folder, port, arguments):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD),
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "here",
    }  # fmt: skip
    status = main(["fit", *arguments, "--trainer.callbacks+=tests.helpers.distributed.Record"])
    torch.save((Record.notes, Record.samples), folder / f"{rank}.pt")
    sys.exit(status)


class Branches(nn.Module):
    """Two branches whose layers share a stride, and a convolution with one inside."""

    def __init__(self):
        super().__init__()
        self.stem = ds.DiffStrideConv2d(1, 4, 3, padding=1, stride=1.3, smoothness=2.0)
        self.left, self.right = ds.DiffStride2d((1.6, 2.0), 2.0), ds.DiffStride2d((1.6, 2.0), 2.0)
        self.right.stride = self.left.stride
        self.conv, self.last = nn.Conv2d(4, 4, 3, padding=1), ds.DiffStride2d(1.5, shared=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.left(self.conv(x)) + self.right(x)
        return self.head(self.last(x.relu()).square().mean((-2, -1)))


class Residual(nn.Module):
    """A strided block whose two paths meet."""

    def __init__(self, channels, norm):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.shortcut = nn.Conv2d(channels, channels, 1, stride=2)

    def forward(self, x):
        return (self.norm(self.conv(x)) + self.shortcut(x)).relu()


def converted(norm):
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), Residual(6, norm), Residual(6, norm), nn.MaxPool2d(2), nn.Flatten(2),
        Mean(), nn.Linear(6, CLASSES),
    )  # fmt: skip
    ds.convert(model, torch.zeros(2, 1, 24, 20))
    return model


class Mean(nn.Module):
    def forward(self, x):
        return x.square().mean(-1)  # depends on the strides before it


MODELS = {
    "tiny": lambda: TinyCNN(width=4, num_classes=CLASSES, in_channels=1, strides=[(1.5, 2.0)]),
    "branches": Branches,
    "converted": lambda: converted(norm=True),
    "converted, no norm": lambda: converted(norm=False),
}


def batch(seed, samples=8):
    """Return waves whose frequency along one axis is the class, which a stride must keep."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    turns = torch.linspace(0, 3.1, 24)[None] * (labels[:, None] + 1) * 2
    waves = turns.cos()[:, None, :, None] * torch.ones(20)
    return waves + 0.3 * torch.randn(waves.shape, generator=generator), labels


def train(rank, name, steps):
    """Return strides and sizes at each step, from different weights and data in each process."""
    torch.manual_seed(rank)
    model = MODELS[name]()
    with torch.no_grad():
        for _, layer in ds.nn.learnable_layers(model):
            layer.stride.add_(0.01 * rank)
    sizes = []
    for _, module in model.named_modules():
        if isinstance(module, ds.nn.DiffStride2d | ds.nn.DiffStrideConv2d):
            module.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ds.param_groups(model, 0.02, stride_lr=0.05), momentum=0.9)
    notes = []
    for step in range(steps):
        sizes.clear()
        x, labels = batch(WORLD * step + rank)
        loss = nn.functional.cross_entropy(parallel(x), labels) + 0.02 * ds.stride_cost(model)
        optimizer.zero_grad()
        loss.backward()
        for _, layer in ds.nn.learnable_layers(model):
            nn.utils.clip_grad_norm_(layer.stride, 1.0)
        optimizer.step()
        ds.clamp_strides_(model)
        notes.append((ds.strides(model), tuple(sizes), loss.item()))
    return notes


def gradients(rank, name):
    """Return the gradients of the strides, from this process's half of a batch."""
    torch.manual_seed(0)
    model = DistributedDataParallel(MODELS[name]().double())
    x, labels = batch(seed=5)
    mine = slice(rank * 4, rank * 4 + 4)
    nn.functional.cross_entropy(model(x[mine].double()), labels[mine]).backward()
    return of_strides(model.module)


def of_strides(model):
    return {name: layer.stride.grad for name, layer in ds.nn.learnable_layers(model)}


def sharded(rank, name, steps):
    """Train with all parameters sharded but the strides. Return strides, their gradients, and the weights."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for _, layer in ds.nn.learnable_layers(model):
            layer.stride.add_(0.01 * rank)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), ignored_params=ds.replicate_strides(model))
    learn(model, lambda seed: [part[rank * 4 : rank * 4 + 4] for part in batch(seed)], steps)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return ds.strides(model), of_strides(model), weights


def learn(model, data, steps):
    optimizer = torch.optim.SGD(ds.param_groups(model, 0.02, stride_lr=0.05), momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        for seed in range(2 * step, 2 * step + 2):
            x, labels = data(seed)
            (nn.functional.cross_entropy(model(x), labels) / 2).backward()
        optimizer.step()
        ds.clamp_strides_(model)


def mistakes(rank):
    """Return the messages about a sharded stride."""
    model = MODELS["tiny"]()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    messages = []
    for call in ds.strides, ds.replicate_strides, repr:
        try:
            call(model)
        except ValueError as error:
            messages.append(str(error))
    return messages


class Record(Callback):
    """A callback that notes strides and sizes after each step, and by epoch the samples of each process."""

    notes, samples = [], []

    def on_train_start(self, trainer, pl_module):
        self.sizes = []
        for _, layer in ds.nn.learnable_layers(pl_module):
            layer.register_forward_hook(lambda module, inputs, output: self.sizes.append(tuple(output.shape[2:])))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.notes.append((ds.strides(pl_module), tuple(self.sizes)))
        self.sizes.clear()
        ids = [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in batch[0]]
        self.samples.append((trainer.current_epoch, ids))
