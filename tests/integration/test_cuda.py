"""Behaviour on a GPU: values there, no waiting for it, graphs, gradient scaling, one process of many."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import diffstride as ds
from diffstride.experiments.models import TinyCNN
from tools import fuzz

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def test_random_calls_agree_with_the_naive_sums():
    report = fuzz.fuzz(0, range(300), "cuda")
    assert report["disagreements"] == []


LAYERS = [
    lambda: ds.DiffStride2d((2.3, 1.7)),
    lambda: ds.DiffStride2d((2.3, 1.7), basis="dct", backend="fft"),
    lambda: ds.DiffStrideConv2d(3, 4, 3, stride=2.3),
    lambda: ds.SpectralPool2d(2.5),
]


@pytest.mark.parametrize("make", LAYERS)
def test_a_stride_that_has_not_changed_is_not_waited_for(make):
    layer, x = make().to(CUDA), torch.randn(2, 3, 30, 31, device=CUDA, requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_stride_that_has_changed_is_read_once(monkeypatch):
    layers = nn.ModuleList([ds.DiffStride2d(2.0), ds.DiffStride2d(3.0)]).to(CUDA)
    layers[1].stride = layers[0].stride  # shared
    optimizer = torch.optim.SGD(layers.parameters(), 0.01)
    x = torch.randn(2, 3, 30, 31, device=CUDA)
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    for _ in range(4):
        for layer in layers:
            layer(x).square().mean().backward()
        optimizer.step()
    assert len(reads) == 4


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_compiled_training_is_that_of_eager_mode(autocast):
    torch._dynamo.reset()
    eager = TinyCNN(width=8, strides=[(1.9, 2.2)]).to(CUDA)
    graph = copy.deepcopy(eager)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    networks = {eager: eager, graph: torch.compile(graph, backend=counter, fullgraph=True)}
    images, labels = torch.randn(16, 1, 32, 32, device=CUDA), torch.randint(4, (16,), device=CUDA)
    losses, sizes = {}, set()
    eager.down.register_forward_hook(lambda module, inputs, output: sizes.add(output.shape))
    for network, function in networks.items():
        optimizer = torch.optim.SGD(ds.param_groups(network, 0.02, stride_lr=0.5), momentum=0.9)
        losses[network] = []
        for _ in range(12):
            with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = nn.functional.cross_entropy(function(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ds.clamp_strides_(network)
            losses[network].append(loss.item())
    assert losses[graph] == pytest.approx(losses[eager], rel=1e-3 if autocast is None else 0.1)
    assert losses[eager][-1] < losses[eager][0]
    assert counter.frame_count <= len(sizes) + 1  # a second one may be for sizes that stay symbolic


def test_gradient_scaling_finds_and_skips_what_overflows():
    network = TinyCNN(width=8).to(CUDA)
    optimizer = torch.optim.SGD(ds.param_groups(network, 0.01), momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    images, labels = torch.randn(16, 1, 32, 32, device=CUDA), torch.randint(4, (16,), device=CUDA)
    before = ds.strides(network)
    scales = []
    for _ in range(40):
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(network(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        if len(scales) == 1:
            assert ds.strides(network) == before  # skipped
    assert scales[-1] < 2.0**40
    assert ds.strides(network) != before
    assert all(p.isfinite().all() for p in network.parameters())


@pytest.fixture
def group():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_process_of_many(group):
    """DistributedDataParallel and fully_shard train as the bare network does."""
    first = nn.Sequential(nn.Conv2d(1, 8, 3), ds.DiffStride2d(1.7), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(CUDA)
    whole, parallel, sharded = (copy.deepcopy(first) for _ in range(3))
    fully_shard(sharded, ignored_params=ds.replicate_strides(sharded))
    found = []
    for network, function in (
        (whole, whole), (parallel, nn.parallel.DistributedDataParallel(parallel)), (sharded, sharded),
    ):  # fmt: skip
        optimizer = torch.optim.SGD(ds.param_groups(network, 0.02, stride_lr=0.2), momentum=0.9)
        generator = torch.Generator(CUDA).manual_seed(3)
        for _ in range(20):
            x = torch.randn(4, 1, 26, 23, generator=generator, device=CUDA)
            function(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ds.clamp_strides_(network)
        found.append(ds.strides(network)["1"])
    assert found[0] != ds.strides(first)["1"]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_memory_stays_flat_while_sizes_change():
    layer, x = ds.DiffStride2d(2.0).to(CUDA), torch.randn(4, 8, 64, 64, device=CUDA)
    held = []
    for step in range(1500):
        with torch.no_grad():
            layer.stride.fill_(1 + 20 * ((step * 0.618034) % 1))
        layer(x).sum().backward()
        layer.stride.grad = None
        held.append(torch.cuda.memory_allocated())
    assert max(held[1000:]) <= 1.02 * max(held[200:400])
