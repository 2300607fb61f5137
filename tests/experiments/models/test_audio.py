"""Networks for sounds, against plain convolutions and the naive formulas."""

import itertools
import math

import numpy as np
import pytest
import torch

import diffstride as ds
from diffstride.experiments.models import AudioCNN, SpectrogramBlock, WaveformCNN, make_downsample
from diffstride.export import to_onnx
from diffstride.nn import learnable_layers
from tests.helpers import reference
from tests.helpers.states import randomise

CHANNELS = [1, 64, 128, 256, 256, 512, 512]
STRIDES = [2, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("stride", [(2, 3), (1, 2), (3, 1)])
@pytest.mark.parametrize("size", [(12, 9), (7, 10)])
def test_a_strided_block_skips_samples_of_the_unstrided_one(stride, size):
    torch.manual_seed(1)
    strided = randomise(SpectrogramBlock(2, 4, stride, "conv"))
    plain = randomise(SpectrogramBlock(2, 4, 1, "conv"))
    plain.load_state_dict(strided.state_dict())
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(strided(x), plain(x)[..., :: stride[0], :: stride[1]])


@pytest.mark.parametrize("method", ["spectral", "diffstride"])
def test_a_block_filters_time_then_frequency_then_pools(method):
    torch.manual_seed(2)
    block = randomise(SpectrogramBlock(2, 3, (1.7, 2.3), method, {"smoothness": 1.5}))
    x = torch.randn(2, 2, 13, 10, dtype=torch.float64)

    def norm(y, layer):
        mean, variance, weight, bias = (
            t.detach().numpy().reshape(1, -1, 1, 1)
            for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        )
        return (y - mean) / np.sqrt(variance + layer.eps) * weight + bias

    time, frequency = block.time, block.frequency
    assert time.weight.shape == (3, 2, 3, 1)
    assert frequency.weight.shape == (3, 3, 1, 3)
    y = reference.convolve(x, time.weight.detach(), time.bias.detach(), (1, 0))
    y = norm(y.clip(0), block.norm)
    y = reference.convolve(y, frequency.weight.detach(), frequency.bias.detach(), (0, 1))
    pooled = {"diffstride": reference.diffstride, "spectral": reference.spectral_pool}[method]
    y = pooled(y, (1.7, 2.3), *([1.5] if method == "diffstride" else []))
    np.testing.assert_allclose(block(x).detach(), norm(y.clip(0), block.norm2), rtol=1e-6, atol=1e-8)


def test_the_papers_network_has_its_channels_and_strides():
    network = AudioCNN(num_classes=35)
    filters = sum(3 * i * o + o + 3 * o * o + o for i, o in itertools.pairwise(CHANNELS))
    normalisations = sum(2 * 2 * o for o in CHANNELS[1:])
    strides = 2 * len(STRIDES)
    assert sum(p.numel() for p in network.parameters()) == filters + normalisations + strides + 512 * 35 + 35
    assert [layer.strides for _, layer in learnable_layers(network)] == [(s, s) for s in STRIDES]


@pytest.mark.parametrize("size", [(100, 40), (33, 21)])
@pytest.mark.parametrize("method", ["conv", "spectral", "diffstride"])
def test_maps_shrink_as_the_strides_say(method, size):
    network = AudioCNN(width=1 / 32, downsample=method, downsample_options={"smoothness": 2})
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape[2:])))
    network(torch.randn(2, 1, *size))

    def new(n, stride):
        if method == "diffstride":
            return min(n, reference.output_size(n, reference.clamped(n, stride, 2.0), 2.0))
        return math.ceil(n / stride) if method == "conv" else n // stride

    expected = []
    for stride in STRIDES:
        size = tuple(new(n, stride) for n in size)
        expected.append(size)
    assert seen == expected


def test_the_logits_are_of_the_largest_value_of_each_channel():
    network = AudioCNN(width=1 / 32, num_classes=3).eval()
    x = torch.randn(2, 1, 40, 32)
    features = network.blocks(x).flatten(2).sort(-1).values[..., -1]
    torch.testing.assert_close(network(x), features @ network.classifier.weight.T + network.classifier.bias)


def test_the_ramps_of_a_waveform_network_are_a_part_of_each_axis():
    size, ramp = 4000, 1 / 20
    network = WaveformCNN(width=1 / 32, length=size, ramp=ramp, strides=(16, 4, 2, 2))
    layers = [layer for _, layer in learnable_layers(network)]
    for layer, stride in zip(layers, (16, 4, 2, 2), strict=True):
        assert layer.smoothness == pytest.approx(ramp * size)
        assert layer.strides == (stride,)
        size = math.floor(size / stride + 2 * ramp * size + 1e-5)
    seen = []
    layers[-1].register_forward_hook(lambda m, args, y: seen.append(y.shape[-1]))
    network(torch.randn(2, 1, 4000))
    assert seen == [size]
    network = WaveformCNN(width=1 / 32, length=500, downsample_options={"smoothness": 3.0})
    assert [layer.smoothness for _, layer in learnable_layers(network)] == [3.0] * 4


def test_a_fully_convolutional_network_of_time_series_averages_over_time():
    """Wang, Yan and Oates 2017: three convolutions with batch norms, the mean over time, a linear layer."""
    network = WaveformCNN(
        width=1 / 16, in_channels=2, channels=(128, 256, 128), kernels=(7, 5, 3), pooling="mean", strides=(1, 1, 1),
        num_classes=3, downsample_options={"window": "hard"}, placement="before",
    )  # fmt: skip
    randomise(network)
    x = torch.randn(2, 2, 31, dtype=torch.float64)
    y = x
    for block in network.blocks:
        y = torch.as_tensor(
            reference.convolve(y.detach(), block.conv.weight.detach(), None, (block.conv.kernel_size[0] // 2,))
        )
        y = block.norm(y).relu()
    torch.testing.assert_close(network(x), network.classifier(y.mean(-1)))
    assert [block.conv.out_channels for block in network.blocks] == [8, 16, 8]


@pytest.mark.parametrize("kernels", [(7, 4, 3), (7, 5)])
def test_kernels_of_a_waveform_network(kernels):
    with pytest.raises(ValueError, match="kernels must be 3 odd numbers"):
        WaveformCNN(channels=(8, 8, 8), kernels=kernels, strides=(1, 1, 1))


def test_a_stride_of_one_axis_is_realised_like_one_of_two():
    x = torch.randn(2, 3, 20)
    for method in ("avg", "max", "spectral", "diffstride"):
        _, one = make_downsample(method, 2, ndim=1, smoothness=2.0)
        _, two = make_downsample(method, (1, 2), smoothness=2.0)
        wide = x[:, :, None].expand(-1, -1, 8, -1)  # constant along the first axis, which passes through
        torch.testing.assert_close(two(wide)[:, :, 3], one(x), rtol=1e-5, atol=1e-5)


def test_networks_with_several_heads_are_frozen_and_exported(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = AudioCNN(width=1 / 32, num_classes={"digit": 10, "speaker": 6}).eval()
    x = torch.randn(2, 1, 30, 24)
    for task, logits in ds.freeze(network, x)(x).items():
        torch.testing.assert_close(logits, network(x)[task], rtol=1e-5, atol=1e-5)
    written = to_onnx(network, x, tmp_path / "sound.onnx")
    session = onnxruntime.InferenceSession(written.path)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for logits, own in zip(found, network(x).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(logits), own, rtol=1e-4, atol=1e-5)
