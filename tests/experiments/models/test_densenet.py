"""DenseNet, against its formula, published sizes and costs counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffstride as ds
from diffstride.cost import count_macs
from diffstride.experiments.models import DenseNet
from diffstride.nn import DiffStrideConv2d
from tests.helpers.states import randomise

SMALL = {"depth": 16, "growth": 3, "num_classes": 5}


def network(method="avg", **kwargs):
    torch.manual_seed(0)
    return DenseNet(downsample=method, **(SMALL | kwargs))


def norm(x, prefix, state):
    keys = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (state[f"{prefix}.{key}"][:, None, None] for key in keys)
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def naive(x, state, layers):
    """Compute Huang et al. 2017, Figure 2 and Section 3, from the weights, with average pooling in the transitions."""
    x = F.conv2d(x, state["stem.conv.weight"], padding=1)
    for block in range(3):
        maps = [x]
        for layer in range(layers):
            name = f"blocks.{2 * block}.{layer}"
            y = norm(torch.cat(maps, 1), f"{name}.norm1", state).clamp(min=0)
            y = torch.einsum("bihw,oi->bohw", y, state[f"{name}.conv1.weight"][:, :, 0, 0])
            y = norm(y, f"{name}.norm2", state).clamp(min=0)
            maps.append(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1))
        x = torch.cat(maps, 1)
        if block < 2:
            name = f"blocks.{2 * block + 1}"
            y = norm(x, f"{name}.norm", state).clamp(min=0)
            y = torch.einsum("bihw,oi->bohw", y, state[f"{name}.conv.weight"][:, :, 0, 0])
            x = (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
    x = norm(x, "norm.0", state).clamp(min=0).mean((-2, -1))
    return x @ state["classifier.weight"].T + state["classifier.bias"]


def test_it_is_the_papers_network():
    model = randomise(network())
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    assert torch.allclose(model(x), naive(x, model.state_dict(), layers=2), atol=1e-10)


@pytest.mark.parametrize(
    ("kwargs", "published"),
    [
        ({"depth": 40, "growth": 12, "num_classes": 10}, 176_122),  # counted by hand; paper: 0.2M
        ({"depth": 100, "growth": 12, "num_classes": 10}, 769_162),  # gpleiss/efficient_densenet_pytorch; paper: 0.8M
        ({"depth": 250, "growth": 24, "num_classes": 10}, 15.3e6),  # the paper's Table 2, as rounded there
        ({"depth": 190, "growth": 40, "num_classes": 100}, 25.6e6 + 90 * 2190),  # 25.6M with 10 classes
    ],
)
def test_parameters_of_the_papers_networks(kwargs, published):
    with torch.device("meta"):
        model = DenseNet(**kwargs)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == published if isinstance(published, int) else counted == pytest.approx(published, rel=0.01)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == kwargs["depth"]


def by_hand(depth, growth, sizes):
    """Return MACs of stem, blocks and classifier on maps of these sizes, and the weights of the 1x1 transitions."""
    channels, transitions = 2 * growth, []
    macs = 27 * channels * sizes[0] ** 2
    for block, size in enumerate(sizes):
        for _ in range((depth - 4) // 6):
            macs += (channels * 4 * growth + 9 * 4 * growth * growth) * size**2
            channels += growth
        if block < 2:
            transitions.append(channels * (channels // 2))
            channels //= 2
    return macs + 10 * channels, transitions


@pytest.mark.parametrize(
    ("method", "options", "sizes"),
    [
        ("avg", {}, (32, 16, 8)),
        ("conv", {}, (32, 16, 8)),
        ("diffstride", {"window": "inner"}, (32, 16, 8)),
        ("diffstride", {"smoothness": 1.0}, (32, 18, 11)),  # floor(32/2 + 2), floor(18/2 + 2)
        ("diffstride", {"smoothness": 4.0}, (32, 24, 20)),
    ],
)
def test_cost_is_that_counted_by_hand(method, options, sizes):
    model = DenseNet(depth=40, downsample=method, downsample_options=options)
    rest, transitions = by_hand(40, 12, sizes)
    before, after = (rest + sum(t * s**2 for t, s in zip(transitions, at, strict=False)) for at in (sizes, sizes[1:]))
    counted, resampling = count_macs(model, torch.zeros(1, 3, 32, 32))
    if method == "diffstride":  # the order of convolution and layer is chosen by cost
        assert after <= counted <= before
        assert ds.CostModel(model, torch.zeros(1, 3, 32, 32)).exact() == counted + resampling
    else:
        assert counted == (after if method == "conv" else before)


def test_the_learned_transition_is_the_convolution_and_then_the_layer():
    model = randomise(network("diffstride", strides=(1.7, 2.4), downsample_options={"smoothness": 1}))
    for place, stride in (1, 1.7), (3, 2.4):
        transition = model.blocks[place]
        assert isinstance(transition.conv, DiffStrideConv2d)
        x = torch.randn(2, transition.norm.num_features, 13, 11, dtype=torch.float64)
        layer = ds.DiffStride2d(stride, smoothness=1).double()
        y = F.conv2d(norm(x, f"blocks.{place}.norm", model.state_dict()).clamp(min=0), transition.conv.weight)
        assert torch.allclose(transition(x), layer(y), atol=1e-10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 41}, "depth must be 6 n \\+ 4 .* got 41"),
        ({"compression": 1.5}, "compression must be > 0 and <= 1, got 1.5"),
    ],
)
def test_mistakes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DenseNet(**(SMALL | kwargs))
