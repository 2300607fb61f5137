"""Upsampling that follows a skip connection: every pass has its own sizes, in whatever order and thread it runs."""

import copy
import pickle
import threading

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import diffstride as ds

SIZES = (48, 97, 64, 131)


class UNet(nn.Module):
    """An encoder and a decoder, each of which may be checkpointed."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.pool, self.middle = nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.decoder = nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1)
        self.checkpointed = {}

    def run(self, part, *args):
        call = {"encode": self.encoder, "decode": self.decode}[part]
        if part in self.checkpointed:
            return checkpoint(call, *args, use_reentrant=self.checkpointed[part])
        return call(*args)

    def decode(self, skip, x):
        return self.decoder(torch.cat([skip, self.up(x)], 1))

    def forward(self, x):
        skip = self.run("encode", x)
        return self.run("decode", skip, self.middle(self.pool(skip)))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = UNet()
    ds.convert(model, torch.randn(1, 3, 32, 32), upsample=True)
    with torch.no_grad():
        model.pool.diffstride.stride.fill_(1.7)
    return model


def inputs(requires_grad=False):
    torch.manual_seed(1)
    return [torch.randn(1, 3, n, n + 5, requires_grad=requires_grad) for n in SIZES]


def test_threads_with_maps_of_unlike_sizes_do_not_disturb_each_other(unet):
    xs = inputs()
    with torch.no_grad():
        expected = [unet(x) for x in xs]
    differing, ready = [], threading.Barrier(len(xs))

    def work(x, y):
        ready.wait()
        for _ in range(30):
            with torch.no_grad():
                if not torch.allclose(unet(x), y, atol=1e-5):
                    differing.append(x.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("parts", [("decode",), ("encode", "decode")], ids="+".join)
def test_passes_of_unlike_sizes_are_recomputed_each_at_its_own(unet, parts, reentrant):
    gradients = []
    for checkpointed in ({}, dict.fromkeys(parts, reentrant)):
        model, xs = copy.deepcopy(unet), inputs(requires_grad=True)
        model.checkpointed = checkpointed
        sum(model(x).square().mean() for x in xs).backward()
        gradients.append([p.grad for p in model.parameters()] + [x.grad for x in xs])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_a_converted_unet_goes_through_fx_and_pickle(unet):
    traced = fx.symbolic_trace(unet)
    for model in (traced, pickle.loads(pickle.dumps(unet)), copy.deepcopy(unet)):
        for x in inputs():
            torch.testing.assert_close(model(x), unet(x))


def test_a_resize_whose_source_has_not_run_is_refused():
    layer = ds.nn.resize.ResizeTo(2)
    layer.follow(nn.Identity())
    with pytest.raises(RuntimeError, match=r"the module that ResizeTo follows must run before it"):
        layer(torch.randn(1, 1, 4, 4))


class Nested(nn.Module):
    """A skip connection that is itself a sum with an upsampled map, as in UNet++."""

    def __init__(self, up):
        super().__init__()
        self.down, self.pool, self.again = nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, 2, 1)
        self.inner, self.outer = up(), up()

    def forward(self, x):
        first = self.down(x)
        skip = self.inner(self.pool(first)) + first
        return self.outer(self.again(skip)), skip


@pytest.mark.parametrize("up", [lambda: nn.Upsample(scale_factor=2), lambda: nn.ConvTranspose2d(4, 4, 2, 2)])
def test_upsampling_follows_a_map_that_is_upsampled_itself(up):
    class Sum(Nested):
        def forward(self, x):
            return torch.add(*super().forward(x))

    torch.manual_seed(0)
    model = Sum(up)
    plan = ds.convert(model, torch.randn(1, 3, 32, 32), upsample=True)
    assert [(resize.name, resize.source) for resize in plan.resizes] == [("inner", "down"), ("outer", "inner")]
    with torch.no_grad():
        model.down.stride.fill_(2.6)
        model.again.stride.fill_(1.8)
        x = torch.randn(1, 3, 40, 32)
        outer, skip = Nested.forward(model, x)
        torch.testing.assert_close(model(x), outer + skip)
    if isinstance(model.outer, ds.nn.resize.ResizeTo):
        with torch.no_grad():
            expected = ds.spectral_resize(model.again(skip), skip.shape[-2:])
        torch.testing.assert_close(outer, expected)
