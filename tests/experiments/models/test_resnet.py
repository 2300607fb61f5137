"""Residual networks, against published sizes, formulas of a block and each other."""

import copy
import math
from functools import partial

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

import diffstride as ds
from diffstride.experiments.models import ResidualBlock, ResNet
from tests.helpers import reference
from tests.helpers.states import randomise

SMALL = {"width": 0.125, "num_classes": 5}


def network(method="conv", *, seed=0, **kwargs):
    if method == "blur":
        pytest.importorskip("kornia")
    torch.manual_seed(seed)
    return ResNet(downsample=method, **(SMALL | kwargs))


def parameters(**kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in ResNet(**kwargs).parameters())


def map_sizes(model, size):
    """Return the sizes after the stem and after each stage."""
    sizes = []
    sites = [model.stem, *model.stages]
    hooks = [site.register_forward_hook(lambda _m, _x, y: sizes.append(tuple(y.shape[2:]))) for site in sites]
    model.eval()(torch.randn(1, 3, *size))
    for hook in hooks:
        hook.remove()
    return sizes


@pytest.mark.parametrize(
    ("kwargs", "published"),
    [
        # torchvision's resnet18 and resnet50
        ({"depth": 18, "num_classes": 1000, "stem": "imagenet"}, 11_689_512),
        ({"depth": 50, "num_classes": 1000, "stem": "imagenet"}, 25_557_032),
        # kuangliu/pytorch-cifar's ResNet18
        ({"depth": 18, "num_classes": 10}, 11_173_962),
        # its PreActResNet18 (11,171,146) and the final normalisation of He et al. 2016, which it leaves out
        ({"depth": 18, "num_classes": 10, "preactivation": True}, 11_171_146 + 2 * 512),
        # akamaster/pytorch_resnet_cifar10's ResNet56 (853,018, shortcuts without weights) and two projections
        ({"depth": 56, "num_classes": 10}, 853_018 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)),
    ],
)
def test_parameters_of_the_standard_networks(kwargs, published):
    assert parameters(**kwargs) == published


def test_width_multiplies_every_channel():
    def channels(width):
        with torch.device("meta"):
            modules = ResNet(depth=50, width=width).named_modules()
        return {name: (m.in_channels, m.out_channels) for name, m in modules if isinstance(m, nn.Conv2d)}

    full, half = channels(1.0), channels(0.5)
    assert (full.pop("stem.conv"), half.pop("stem.conv")) == ((3, 64), (3, 32))
    assert full == {name: (2 * a, 2 * b) for name, (a, b) in half.items()}


def test_convolutions_have_no_bias_and_the_variance_of_he():
    model = network(width=0.5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            n = module.weight.numel()
            ratio = module.weight.var().item() * fan_out / 2
            assert ratio == pytest.approx(1, abs=6 * math.sqrt(2 / n)), name


def bn(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def basic_post(x, b, down):
    y = F.relu(bn(down(x, b.convs[0].weight), b.norms[0]))
    y = bn(F.conv2d(y, b.convs[1].weight, padding=1), b.norms[1])
    return F.relu(y + bn(down(x, b.project[0].weight), b.project[1]))


def basic_pre(x, b, down, raw=False):
    a = F.relu(bn(x, b.norms[0]))
    y = down(a, b.convs[0].weight)
    y = F.conv2d(F.relu(bn(y, b.norms[1])), b.convs[1].weight, padding=1)
    return y + down(x if raw else a, b.project.weight)


def bottleneck_post(x, b, down):
    y = F.relu(bn(F.conv2d(x, b.convs[0].weight), b.norms[0]))
    y = F.relu(bn(down(y, b.convs[1].weight), b.norms[1]))
    y = bn(F.conv2d(y, b.convs[2].weight), b.norms[2])
    return F.relu(y + bn(down(x, b.project[0].weight), b.project[1]))


def bottleneck_pre(x, b, down):
    a = F.relu(bn(x, b.norms[0]))
    y = F.conv2d(a, b.convs[0].weight)
    y = down(F.relu(bn(y, b.norms[1])), b.convs[1].weight)
    y = F.conv2d(F.relu(bn(y, b.norms[2])), b.convs[2].weight)
    return y + down(a, b.project.weight)


def strided(stride):
    return lambda x, weight: F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def after(down):
    """Linear layers commute with a 1x1 convolution: here in the order of the paper's figure."""
    return lambda x, weight: down(F.conv2d(x, weight, padding=weight.shape[-1] // 2))


def before(down):
    return lambda x, weight: F.conv2d(down(x), weight, padding=weight.shape[-1] // 2)


def average(x):
    return F.avg_pool2d(x, 2, ceil_mode=True)


def learned(x):
    return torch.from_numpy(reference.diffstride(x, (2.3, 1.6), 1.5, "inner"))


@pytest.mark.parametrize(
    ("method", "stride", "placement", "step"),
    [
        ("conv", 1, "after", strided(1)),
        ("conv", (2, 3), "after", strided((2, 3))),
        ("avg", 2, "after", after(average)),
        ("avg", 2, "before", before(average)),
        ("diffstride", (2.3, 1.6), "after", after(learned)),
        ("diffstride", (2.3, 1.6), "before", before(learned)),
    ],
)
@pytest.mark.parametrize(
    ("formula", "channels", "kernels", "options"),
    [
        (basic_post, (6, 6), (3, 3), {}),
        (basic_pre, (6, 6), (3, 3), {"preactivation": True}),
        (partial(basic_pre, raw=True), (6, 6), (3, 3), {"preactivation": True, "raw_shortcut": True}),
        (bottleneck_post, (3, 3, 12), (1, 3, 1), {}),
        (bottleneck_pre, (3, 3, 12), (1, 3, 1), {"preactivation": True}),
    ],
)
def test_a_block_is_its_formula(formula, channels, kernels, options, method, stride, placement, step):
    torch.manual_seed(0)
    given = {"stride": stride, "downsample": method, "placement": placement, **options}
    block = randomise(ResidualBlock(4, channels, kernels, options={"smoothness": 1.5, "window": "inner"}, **given))
    x = torch.randn(2, 4, 9, 12, dtype=torch.float64)
    calls = []
    block.down.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(block(x), formula(x, block, step))
    if placement == "before":  # one map for both paths where they start at once
        assert len(calls) == (1 if kernels == (3, 3) and "raw_shortcut" not in options else 2)


@pytest.mark.parametrize("preactivation", [False, True])
def test_block_without_projection_adds_its_input(preactivation):
    block = ResidualBlock(4, (4, 4), (3, 3), preactivation=preactivation)
    assert block.project is None
    nn.init.zeros_(block.convs[1].weight)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block.eval()(x), x if preactivation else x.relu())


def test_network_ends_in_the_mean_of_the_activated_maps():
    for preactivation in (False, True):
        model = network(preactivation=preactivation).eval()
        x = torch.randn(2, 3, 16, 16)
        y = model.stages(model.stem(x))
        if preactivation:
            assert y.min() < 0
            y = F.relu(bn(y, model.norm[0]))
        assert y.min() == 0
        features = y.flatten(2).mean(-1)
        torch.testing.assert_close(model(x), features @ model.classifier.weight.T + model.classifier.bias)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("strides", [(2, 2, 2), (1, 3, 1, 2, 2), (2, (1, 2), (3, 1)), (3,)])
def test_integer_methods_have_the_same_maps_at_odd_sizes(strides, stem):
    size = (33, 50)
    pairs = [s if isinstance(s, tuple) else (s, s) for s in strides]
    stem_stride = 2 if stem == "imagenet" else 1
    pairs = [(stem_stride, stem_stride), *[(1, 1)] * 4][: 5 - len(pairs)] + pairs
    expected = []
    for i, pair in enumerate(pairs):
        size = tuple(-(-n // s) for n, s in zip(size, pair, strict=True))
        if i == 0 and stem == "imagenet":
            size = tuple(-(-n // 2) for n in size)  # the max pooling
        expected.append(size)
    for method in ("conv", "avg", "max", "blur"):
        assert map_sizes(network(method, strides=strides, stem=stem), (33, 50)) == expected, method


@pytest.mark.parametrize(
    ("depth", "count", "sites"),
    [
        (18, 3, ["stages.1.0", "stages.2.0", "stages.3.0"]),
        (18, 5, ["stem", "stages.0.0", "stages.1.0", "stages.2.0", "stages.3.0"]),
        (50, 1, ["stages.3.0"]),
        (50, 5, ["stem", "stages.0.0", "stages.1.0", "stages.2.0", "stages.3.0"]),
        (56, 3, ["stages.0.0", "stages.1.0", "stages.2.0"]),
        (56, 4, ["stem", "stages.0.0", "stages.1.0", "stages.2.0"]),
    ],
)
def test_entries_belong_to_the_last_sites(depth, count, sites):
    strides = [1.0 + i / 4 for i in range(count)]
    model = network("diffstride", depth=depth, strides=strides)
    names = [f"{site}.conv" if site == "stem" else f"{site}.down" for site in sites]
    assert ds.strides(model) == {name: (s, s) for name, s in zip(names, strides, strict=True)}


@pytest.mark.parametrize("method", ["conv", "diffstride"])
def test_a_listed_stage_starts_with_a_projection(method):
    for strides, first_projects in (((1, 1, 1), False), ((1, 1, 1, 1), True)):
        model = network(method, strides=strides)
        assert [stage[0].project is not None for stage in model.stages] == [first_projects, True, True, True]
        assert all(block.project is None for stage in model.stages for block in stage[1:])


def test_the_two_paths_of_a_block_share_one_stride():
    torch.manual_seed(0)
    block = ResidualBlock(4, (6, 6), (3, 3), stride=(2.0, 1.5), preactivation=True, downsample="diffstride")
    randomise(block)
    assert [n for n, _ in block.named_parameters() if n.endswith("stride")] == ["down.stride"]
    x, weight = torch.randn(2, 4, 24, 20, dtype=torch.float64), torch.randn(2, 6, 20, 20, dtype=torch.float64)
    gradients = {}
    for path in ("both", "main", "shortcut"):
        part = copy.deepcopy(block)
        if path == "main":
            nn.init.zeros_(part.project.weight)
        if path == "shortcut":
            nn.init.zeros_(part.convs[1].weight)
        y = part(x)
        assert y.shape == weight.shape
        (y * weight).sum().backward()
        gradients[path] = part.down.stride.grad
        assert gradients[path].all()
    # y is the sum of the paths, so is the gradient of their common stride
    torch.testing.assert_close(gradients["both"], gradients["main"] + gradients["shortcut"])


def test_a_stage_without_an_entry_has_no_layer_and_no_projection():
    model = network("diffstride", strides=[1, None, 2, 3, 2])
    assert set(ds.strides(model)) == {f"stages.{i}.0.down" for i in (1, 2, 3)} | {"stem.conv"}
    assert model.stages[0][0].project is None
    assert map_sizes(network("conv", strides=[1, None, 2, 3, 2]), (48, 36)) == [
        (48, 36), (48, 36), (24, 18), (8, 6), (4, 3),
    ]  # fmt: skip


def test_convolutions_are_drawn_as_keras_draws_them():
    """A normal distribution cut off at two deviations, whose own deviation is sqrt(2 / fan_in) (scipy)."""
    model = network(width=0.5, initialization="fan_in_truncated")
    for conv in [model.stem.conv, *(conv for stage in model.stages for block in stage for conv in block.convs)]:
        expected = math.sqrt(2 / (conv.in_channels * 9))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.1)
        widest = 2 * expected / scipy.stats.truncnorm(-2, 2).std()
        assert 0.9 * widest < conv.weight.abs().max().item() <= widest * (1 + 1e-6)
