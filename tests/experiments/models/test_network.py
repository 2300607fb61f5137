"""Parts that all networks share."""

from functools import partial

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride.experiments.models import AudioCNN, DenseNet, Heads, ResNet, TinyCNN, WaveformCNN
from diffstride.experiments.models.network import widened
from diffstride.nn import learnable_layers
from tests.helpers import zoo

METHODS = ["conv", "avg", "max", "blur", "spectral", "diffstride"]
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
    if (name, method) == ("waveform", "blur"):
        pytest.skip("blur pooling is for images")
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


@networks
def test_each_task_has_a_head_of_its_own_on_one_trunk(name):
    model = PLACED[name][0](downsample="diffstride", num_classes={"digit": 10, "speaker": 6})
    logits = model(torch.randn(3, *PLACED[name][1]))
    assert {task: own.shape for task, own in logits.items()} == {"digit": (3, 10), "speaker": (3, 6)}
    logits["speaker"].sum().backward()
    assert model.classifier["digit"].weight.grad is None
    assert model.classifier["speaker"].weight.grad is not None
    for layer in layers_of(model):  # the trunk, strides included, learns from any task
        assert layer.stride.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("network", "strides", "message"),
    [
        (ResNet, [2] * 6, "1 to 5 entries .*4 stages"),
        (partial(ResNet, depth=56), [], "1 to 4 entries .*3 stages"),
        (DenseNet, (1, 2, 2, 2), r"1 to 3 entries .* got \[1, 2, 2, 2\]"),
        (AudioCNN, [2, 2], r"6 entries, got \[2, 2\]"),
        (WaveformCNN, [2, 2], r"4 entries, got \[2, 2\]"),
        (TinyCNN, [], r"1 entry, got \[\]"),
    ],
)
def test_no_stride_is_silently_left_out(network, strides, message):
    with pytest.raises(ValueError, match=f"strides must have {message}"):
        network(strides=strides)


@networks
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(name, method):
    model = placed(name, method, placement="after")
    model(torch.randn(3, *PLACED[name][1])).logsumexp(-1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@networks
def test_methods_and_placements_share_the_weights_and_their_names(name):
    def weights(method, placement="after"):
        state = placed(name, method, placement).state_dict()
        return {key: value for key, value in state.items() if key.split(".")[-1] != "stride"}

    expected = weights("conv")
    for method in METHODS:
        for placement in ("after", "before"):
            if (name, method) != ("waveform", "blur"):
                found = weights(method, placement)
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert len(ds.strides(placed(name))) == len(ds.strides(placed(name, placement="after")))


@networks
@pytest.mark.parametrize("method", ["avg", "max", "blur", "diffstride"])
def test_before_the_convolutions_every_map_has_the_size_of_a_strided_convolution(name, method):
    for shape in PLACED[name][1:]:
        sizes, strided = (convolution_sizes(placed(name, m), shape) for m in (method, "conv"))
        if name == "audio":  # the convolution along time is strided along time alone
            assert sizes[1::2] == sizes[::2] == strided[1::2]
        else:
            assert sizes == strided


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
