"""A slice of the random calls of fuzz.py, all kinds of them, and what they would find."""

import json
from collections import Counter

import pytest
import torch

from diffstride import DiffStride2d, backends, functional, geometry
from diffstride.backends import axes, resample
from diffstride.nn import _fused
from tools import fuzz

SEED, SLICE, SLICES = 0, 60, 10


@pytest.mark.parametrize("first", range(0, SLICE * SLICES, SLICE))
def test_random_calls_agree_with_the_naive_sums(first):
    report = fuzz.fuzz(SEED, range(first, first + SLICE))
    assert report["calls"] == SLICE
    assert report["disagreements"] == []


def test_the_slices_hold_every_kind_of_call():
    calls = [fuzz.draw(SEED, index) for index in range(SLICE * SLICES)]
    seen = {key: Counter(getattr(call, key) for call in calls) for key in fuzz.COUNTED}
    names = {f"{kind}{ndim}d" for kind in fuzz.LAYERS for ndim in (1, 2, 3)} | set(fuzz.FUNCTIONS)
    assert set(seen["name"]) == names
    assert min(seen["name"].values()) > 5
    assert set(seen["dtype"]) == set(fuzz.TOLERANCE)
    assert set(seen["layout"]) == set(fuzz.LAYOUTS)
    assert set(seen["mode"]) == set(fuzz.MODES)
    assert set(seen["autocast"]) == {None, *fuzz.NARROW}
    assert set(seen["compiled"]) == {None, "eager", "aot_eager"}
    options = {(key, str(value)) for call in calls for key, value in call.options.items()}
    for key, values in {
        "window": geometry.WINDOWS,
        "basis": geometry.BASES,
        "norm": geometry.NORM_EXPONENTS,
        "backend": backends.BACKENDS,
        "padding_mode": _fused.PADDING_MODES,
        "padding": ("same", "valid"),
        "shared": (True, False),
        "size_multiple": (1, 2, 3, 8),
        "groups": (1, 2, 3),
        "smoothness": (1e-3, 0.25, 4.0, 3e3),
    }.items():
        assert {(key, str(value)) for value in values} <= options
    for what in (
        lambda call: len(call.shape) == call.ndim + 1,
        lambda call: call.shape[0] == 0,
        lambda call: call.size_offset,
        lambda call: call.stride_scale,
        lambda call: "output_size" in call.options,
        lambda call: call.kind in fuzz.LEARNABLE and min(call.strides) < 1,
        lambda call: any(s == n / 2 for s, n in zip(call.strides, call.sizes, strict=True)),
        lambda call: any(s > n / 2 for s, n in zip(call.strides, call.sizes, strict=True)),
        lambda call: min(call.spatial) == 1,
        lambda call: max(call.spatial) > backends.DENSE_UP_TO[torch.float32],
    ):
        assert sum(bool(what(call)) for call in calls) >= 2


def one_bin_off(monkeypatch):
    mask = geometry.mask

    def off(*args):
        weights = mask(*args)
        return torch.cat([weights[:1], weights[1:2] * 1.001, weights[2:]])

    monkeypatch.setattr(geometry, "mask", off)


def one_size_off(monkeypatch):
    size = geometry.output_size
    monkeypatch.setattr(geometry, "output_size", lambda n, *args: size(n, *args) + (n == 17))


def one_slope_off(monkeypatch):
    slope = geometry.mask_slope
    monkeypatch.setattr(geometry, "mask_slope", lambda *args: slope(*args) * 1.001)


def a_clamp_that_lets_everything_through(monkeypatch):
    monkeypatch.setattr(resample, "_limited", lambda gradients, index, **limits: gradients)


def an_adjoint_that_forgets_the_gain(monkeypatch):
    adjoint = resample.DenseOperator.adjoint
    monkeypatch.setattr(resample.DenseOperator, "adjoint", lambda self, y, dim: adjoint(self, y, dim) / self.axis.gain)


def a_bias_that_is_lost(monkeypatch):
    convolver = _fused.convolver
    monkeypatch.setattr(_fused, "convolver", lambda arguments: lambda x, w, bias: convolver(arguments)(x, w, None))


def a_format_that_is_lost(monkeypatch):
    monkeypatch.setattr(axes, "is_channels_last", lambda x: False)


def a_dtype_that_follows_autocast(monkeypatch):
    downsample = functional.downsample
    monkeypatch.setattr(functional, "downsample", lambda x, *args: downsample(_fused.as_autocast(x), *args))


def a_forward_that_writes(monkeypatch):
    forward = DiffStride2d.forward

    def writing(self, x):
        y = forward(self, x)
        self.stride.data.mul_(1.0001)
        return y

    monkeypatch.setattr(DiffStride2d, "forward", writing)


@pytest.mark.parametrize(
    ("plant", "word"),
    [
        (one_bin_off, "value is off"),
        (one_size_off, "the shape is"),
        (one_slope_off, "gradient of stride is off"),
        (a_clamp_that_lets_everything_through, "gradient of stride is off"),
        (an_adjoint_that_forgets_the_gain, "gradient of input is off"),
        (a_bias_that_is_lost, "value is off"),
        (a_format_that_is_lost, "the result is not torch.channels_last"),
        (a_dtype_that_follows_autocast, "the dtype is"),
        (a_forward_that_writes, "stride was changed"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_planted_fault_is_found(plant, word, monkeypatch):
    calls = [fuzz.draw(SEED, index) for index in range(200)]
    plain = [call for call in calls if not call.compiled][:150]
    plant(monkeypatch)
    resample._cached_operator.cache_clear()
    found = []
    try:
        for call in plain:
            try:
                fuzz.check(call)
            except (AssertionError, RuntimeError) as error:
                found.append(str(error))
    finally:
        resample._cached_operator.cache_clear()  # what the fault made
    assert any(message.startswith(word) for message in found), found


def test_a_call_follows_from_seed_and_index():
    assert fuzz.draw(7, 5) == fuzz.draw(7, 5)
    assert len({str(fuzz.draw(seed, index)._replace(seed=0, index=0)) for seed in range(5) for index in range(5)}) == 25


def test_the_command_counts_reports_and_says_how_to_repeat(tmp_path, monkeypatch, capsys):
    out = tmp_path / "fuzz.json"
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--seed", "3", "--first", "10", "--calls", "5", "--out", str(out)])
    assert fuzz.main() == 0
    report = json.loads(out.read_text())
    assert (report["seed"], report["first"], report["calls"], report["disagreements"]) == (3, 10, 5, [])
    assert sum(report["counts"]["name"].values()) == 5
    assert {"commit", "versions", "hardware", "seconds", "tolerance", "worst"} <= report.keys()
    monkeypatch.setattr(fuzz, "check", lambda *_: 1 / 0)
    assert fuzz.main() == 1
    assert "python -m tools.fuzz --seed 3 --only 14  # ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--seed", "3", "--only", "14"])
    with pytest.raises(ZeroDivisionError):
        fuzz.main()
