"""The suites of the benchmark: who is compared, and by what steps."""

import torch

import diffstride as ds
from diffstride.experiments.benchmark import suites
from diffstride.experiments.models import ResNet

SETTINGS = suites.Settings(("float32",), quick=True, full=False)


def test_gradients_are_those_of_input_weights_and_strides():
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), ds.DiffStride2d())
    x = torch.randn(2, 2, 12, 12, requires_grad=True)
    found = suites.layer_step(module, x).step()
    assert [g.shape for g in found] == [(2, 2, 12, 12), (3, 2, 3, 3), (3,), (2,)]
    assert all(g.abs().sum() > 0 for g in found)


def test_controls_are_the_same_network_with_maps_of_the_same_sizes(monkeypatch):
    monkeypatch.setattr(suites, "training_step", lambda network, *_: network)
    (case,) = suites.steps(SETTINGS)
    networks = case.make(case.facts, torch.device("cpu"))
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert suites.stage_sizes(networks["DiffStride, R=4"], images) == [(24, 24), (20, 20), (18, 18)]
    assert len(suites.CONTROLS) == 2
    for control, name in suites.CONTROLS.items():
        sizes = [suites.stage_sizes(networks[n], torch.zeros(case.facts["shape"])) for n in (control, name)]
        assert sizes[0] == sizes[1]
        assert not ds.strides(networks[control])
        assert len(ds.strides(networks[name])) == 3
        weights = [dict(networks[n].named_parameters()) for n in (control, name)]
        assert weights[0].keys() == {k for k in weights[1] if not k.endswith("stride")}
        assert case.comparisons[control] == [name]


def test_training_step_trains():
    network = ResNet(width=1 / 16, downsample="diffstride")
    before = [p.detach().clone() for p in network.parameters()]
    suites.training_step(network, torch.randn(2, 3, 16, 16), torch.float32).step()
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_the_crossover_is_the_last_length_at_which_half_the_ratios_are_at_most_one():
    def rows(dtype, length, *ratios):
        case = {"dtype": dtype, "shape": [1, 16, length]}
        return [{"case": case, "name": n, "ratio": r} for ratio in ratios for n, r in (("fft", 1.0), ("matmul", ratio))]

    measured = rows("float32", 64, 0.5, 0.6) + rows("float32", 128, 0.5, 1.5) + rows("float32", 256, 0.5, 1.6)
    found = suites.crossovers(measured + rows("bfloat16", 64, 1.1, 1.2))
    assert found == {"float32": 128, "bfloat16": 0}
