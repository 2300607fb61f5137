"""Numbers behind pictures of a network, against the naive formulas and against what its layers really do."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from diffstride.experiments.data import ClassificationData
from diffstride.experiments.data.base import InMemory
from diffstride.experiments.studies.probes import executed, input_windows, mean_amplitude, sample_inputs
from diffstride.nn import DiffStride1d, DiffStride2d, DiffStrideConv2d
from tests.helpers import reference


def set_strides(layer, *values):
    with torch.no_grad():
        layer.stride.copy_(torch.tensor(values))
    return layer


def wave(size, cycles, amplitude):
    return amplitude * torch.cos(2 * torch.pi * cycles * torch.arange(size) / size)


def test_the_spectrum_of_a_wave_is_half_its_amplitude_at_its_frequency():
    along_width = wave(16, 3, 2.0) + 0.5
    found = mean_amplitude(along_width.expand(4, 2, 12, 16), -1)
    assert found.tolist() == pytest.approx([0.5, 0, 0, 1.0, 0, 0, 0, 0, 0], abs=1e-6)
    along_height = mean_amplitude(along_width.expand(4, 2, 12, 16), -2)
    assert along_height[1:].tolist() == pytest.approx([0] * 6, abs=1e-6)
    assert along_height[0].item() == pytest.approx(along_width.abs().mean().item())


@pytest.mark.parametrize(("basis", "sizes"), [("dft", (15, 12)), ("dct", (15, 13))])
@pytest.mark.parametrize("window", ["outer", "inner", "hard"])
def test_windows_are_those_of_the_formula_at_clamped_strides(window, basis, sizes):
    layer = set_strides(DiffStride2d((2.0, 3.0), 2.0, window=window, basis=basis), 1.0, 1.7)
    x = torch.randn(3, 2, *sizes)
    height, width = input_windows(layer, x)
    assert (height.title, width.title) == (", height", ", width")
    for found, size, dim, initial, learned in (height, sizes[0], 2, 2.0, 1.0), (width, sizes[1], 3, 3.0, 1.7):
        spectrum = np.abs(np.fft.rfft(x.double().numpy(), axis=dim)) / size
        assert found.spectrum == pytest.approx(spectrum.mean(axis=(0, 1, 5 - dim)), rel=1e-5)
        for values, stride in zip(found.windows.values(), (learned, initial), strict=True):
            used = reference.clamped(size, stride, 2.0, window, basis)
            whole_cycles = slice(None, None, 1 if basis == "dft" else 2)
            expected = reference.mask(size, used, 2.0, window, basis)[whole_cycles]
            if window == "hard":
                new = reference.output_size(size, used, 2.0, "hard")
                expected = [float(f <= (new // 2 if basis == "dft" else (new - 1) / 2)) for f in range(len(expected))]
            assert values == pytest.approx(expected, abs=1e-6)


def test_the_window_of_a_convolution_sees_what_it_convolves():
    conv, layer = nn.Conv2d(3, 5, 3, padding=2), DiffStride2d((2.0, 1.5))
    x = torch.randn(2, 3, 9, 12)
    apart = input_windows(nn.Sequential(conv, layer), x)
    together = input_windows(DiffStrideConv2d.fuse(conv, layer), x)
    for a, b in zip(apart, together, strict=True):
        assert len(a.spectrum) == (11 if "height" in a.title else 14) // 2 + 1
        assert b.spectrum == pytest.approx(a.spectrum, rel=1e-4)
        assert b.windows == a.windows


class Crossed(nn.Module):
    """Runs its layers in another order than it registers them; one shares its stride, one runs twice."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.twin = (DiffStride1d(s, 1.0) for s in (3.0, 2.0, 2.0))
        self.twin.stride = self.first.stride

    def forward(self, x):
        return self.last(self.first(self.first(x)) + self.twin(self.first(x)))


def test_layers_come_in_order_of_execution_as_they_run_first():
    # 64/2 + 2 = 34, 34/2 + 2 = 19
    sizes = {name: x.shape[2] for name, (_, x, _) in executed(Crossed(), torch.randn(2, 1, 64)).items()}
    assert list(sizes.items()) == [("first", 64), ("last", 19)]


def test_looking_leaves_the_network_as_it_was():
    network = nn.Sequential(DiffStrideConv2d(3, 4, 3, 2.0), nn.BatchNorm2d(4), nn.Dropout())
    set_strides(network[0], 1.5, 2.5)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    input_windows(network, torch.randn(4, 3, 12, 12))
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not _has_any_global_hook()  # of which torch.compile warns


@pytest.mark.parametrize("wrap", [tuple, lambda pair: InMemory(*pair)])
@pytest.mark.parametrize(("count", "expected"), [(3, [0, 4, 8]), (10, list(range(10))), (99, list(range(10)))])
def test_samples_are_spread_over_the_test_split_and_prepared(wrap, count, expected):
    class Numbers(ClassificationData):
        num_classes = 2

        def load(self):
            inputs = torch.arange(10.0).view(10, 1, 1)
            self.train_set = self.test_set = wrap((inputs, torch.zeros(10, dtype=torch.int64)))
            self.mean, self.std = torch.tensor([1.0]), torch.tensor([2.0])

    data = Numbers()
    data.setup()
    assert (sample_inputs(data, count).flatten() * 2 + 1).tolist() == expected
