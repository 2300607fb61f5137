"""Parts that all networks share."""

from functools import partial

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride.experiments.models import AudioCNN, DenseNet, Heads, ResidualBlock, ResNet, TinyCNN, WaveformCNN
from diffstride.experiments.models.network import widened
from diffstride.nn import learnable_layers
from tests.helpers import reference, zoo
from tests.helpers.states import randomise

# Networks that can have their layers before the convolutions, and two inputs of odd sizes.
PLACED = {
    "resnet-18": (partial(ResNet, width=1 / 16, strides=[2, (1, 2), 3]), (3, 33, 50), (3, 64, 47)),
    "resnet-50": (partial(ResNet, depth=50, width=1 / 16, stem="imagenet", strides=[2] * 5), (3, 75, 98), (3, 80, 91)),
    "preactivation": (partial(ResNet, width=1 / 16, preactivation=True), (3, 33, 50), (3, 40, 31)),
    "densenet": (partial(DenseNet, depth=16, growth=3, strides=[2, 2, 3]), (3, 33, 50), (3, 61, 40)),
    "tiny": (TinyCNN, (1, 17, 20), (1, 31, 24)),
    "audio": (partial(AudioCNN, width=1 / 32), (1, 101, 64), (1, 77, 50)),
    "waveform": (partial(WaveformCNN, width=1 / 32), (1, 1001), (1, 777)),
}
networks = pytest.mark.parametrize("name", list(PLACED))


def placed(name, method="diffstride", placement="before", window="inner", **options):
    torch.manual_seed(0)
    options = {"smoothness": 2.0, "window": window} | options
    return PLACED[name][0](downsample=method, placement=placement, downsample_options=options)


def layers_of(model):
    return [layer for _, layer in learnable_layers(model)]


def convolution_sizes(model, shape):
    """Return the sizes of the maps behind each convolution."""
    sizes = []
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            module.register_forward_hook(lambda _m, _x, y: sizes.append(tuple(y.shape[2:])))
    model.eval()(torch.randn(2, *shape))
    return sizes


def test_heads_are_one_linear_layer_for_each_task():
    heads = Heads(4, {"digit": 3, "speaker": 2})
    x = torch.randn(5, 4)
    found = heads(x)
    assert {task: logits.shape for task, logits in found.items()} == {"digit": (5, 3), "speaker": (5, 2)}
    torch.testing.assert_close(found["speaker"], x @ heads["speaker"].weight.T + heads["speaker"].bias)


def test_widths_round_and_leave_one_channel():
    assert widened((64, 100), 1 / 32) == [2, 3]
    assert widened((16,), 0.01) == [1]


@pytest.mark.parametrize("network", [TinyCNN, ResNet, partial(DenseNet, depth=10)])
def test_networks_of_images_have_heads_for_several_tasks(network):
    logits = network(num_classes={"a": 3, "b": 2}, in_channels=3)(torch.randn(2, 3, 16, 16))
    assert {task: own.shape for task, own in logits.items()} == {"a": (2, 3), "b": (2, 2)}


@networks
@pytest.mark.parametrize("method", ["avg", "max", "blur", "diffstride"])
def test_before_the_convolutions_every_map_has_the_size_of_a_strided_convolution(name, method):
    if method == "blur":
        pytest.importorskip("kornia")
        if name == "waveform":
            pytest.skip("blur pooling is for images")
    for shape in PLACED[name][1:]:
        sizes, strided = (convolution_sizes(placed(name, m), shape) for m in (method, "conv"))
        if name == "audio":  # the convolution along time is strided along time alone
            assert sizes[1::2] == sizes[::2] == strided[1::2]
        else:
            assert sizes == strided


@networks
def test_placement_changes_neither_weights_nor_their_names(name):
    before, after = (placed(name, placement=p).state_dict() for p in ("before", "after"))
    weights = [{k: v for k, v in state.items() if k.split(".")[-1] != "stride"} for state in (before, after)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
    assert len(ds.strides(placed(name))) == len(ds.strides(placed(name, placement="after")))


@networks
@pytest.mark.parametrize("window", ["inner", "outer"])
def test_before_the_convolutions_the_cost_is_that_of_plain_convolutions(name, window):
    model, x = placed(name, window=window), torch.randn(2, *PLACED[name][1])
    products, resampling = zoo.products(model, x)
    cost = ds.CostModel(model, x)
    assert cost.exact() == products[""]
    assert any(resampling.values())
    if window == "inner" and name != "audio":
        convolutions = cost.exact() - sum(resampling.values())
        assert convolutions == cost.baseline() == zoo.products(placed(name, "conv"), x)[0][""]
    with torch.no_grad():  # the relaxed cost has no jumps: halves of a small step are alike
        values = []
        for step in range(3):
            for layer in layers_of(model):
                layer.write_strides([(1.3 + 1e-3 * step) * s for s in layer.initial_strides])
            values.append(cost().item())
    assert values[0] - values[1] == pytest.approx(values[1] - values[2], rel=0.02)
    assert values[0] > values[2]


@networks
def test_before_the_convolutions_strides_train_and_freeze(name):
    model, x = placed(name), torch.randn(3, *PLACED[name][1])
    for layer in layers_of(model):
        layer.write_strides([1.2 * s for s in layer.initial_strides])  # off the bounds, where some gradients end
    model(x).logsumexp(-1).sum().backward()
    assert all(layer.stride.grad.isfinite().all() and layer.stride.grad.any() for layer in layers_of(model))
    torch.testing.assert_close(ds.freeze(model, x)(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_placements_other_than_two_are_refused():
    with pytest.raises(ValueError, match="placement must be one of 'after', 'before', got 'behind'"):
        TinyCNN(placement="behind")


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("kernels", [(3, 3), (1, 3, 1)])
def test_a_block_with_its_layer_before_is_the_naive_formula(kernels, preactivation):
    torch.manual_seed(0)
    channels = (6,) * len(kernels)
    block = ResidualBlock(
        4, channels, kernels, stride=(2.3, 1.6), preactivation=preactivation, downsample="diffstride",
        placement="before", options={"smoothness": 1.5, "window": "inner"},
    )  # fmt: skip
    randomise(block)
    x = torch.randn(2, 4, 13, 16, dtype=torch.float64)

    def down(y):
        return torch.from_numpy(reference.diffstride(y, (2.3, 1.6), 1.5, "inner"))

    def conv(y, layer):
        return torch.from_numpy(reference.convolve(y, layer.weight.detach(), padding=layer.kernel_size[0] // 2))

    with torch.no_grad():
        norms = list(block.norms)
        a = norms[0](x).relu() if preactivation else x
        shortcut, y = down(a), a
        shortcut = (
            conv(shortcut, block.project) if preactivation else block.project[1](conv(shortcut, block.project[0]))
        )
        for i, layer in enumerate(block.convs):
            if preactivation:
                y = norms[i](y).relu() if i else y
            y = conv(down(y) if kernels.index(3) == i else y, layer)
            if not preactivation:
                y = norms[i](y)
                y = y.relu() if i < len(kernels) - 1 else y
        expected = y + shortcut if preactivation else (y + shortcut).relu()
        calls = []
        block.down.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(block(x), expected)
        assert len(calls) == (1 if kernels == (3, 3) else 2)  # one map for both paths where they start at once
