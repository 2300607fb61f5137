"""What strides mean as frequencies, against table 2's formula and spacings computed by hand."""

import math

import pytest
import torch
from torch import nn

import diffstride as ds


def test_table_2():
    """A hop of 10 ms and S = 1.89 give 26.5 Hz; a mel axis gives cycles per band."""
    layer = ds.DiffStride2d((1.89, 2.5))
    assert ds.cutoff_frequencies(layer, (0.01, 1.0)) == {"": pytest.approx((26.455, 0.2), rel=1e-4)}
    model = nn.Sequential(layer, nn.ReLU())
    assert ds.cutoff_frequencies(model, 0.01)["0"] == pytest.approx((1 / (2 * 1.89 * 0.01), 1 / (2 * 2.5 * 0.01)))
    assert ds.cutoff_frequencies(model, 0.01, torch.randn(1, 3, 40, 30)) == {
        "0": pytest.approx((1 / (2 * 1.89 * 0.01), 1 / (2 * 2.5 * 0.01)))
    }


def test_whole_bins_are_the_last_inside_the_window():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), ds.DiffStride2d((1.89, 2.5)))
    x = torch.randn(1, 1, 100, 64)
    got = ds.cutoff_frequencies(model, (0.01, 1.0), x, whole_bins=True)
    assert got == {"1": pytest.approx((26 / (100 * 0.01), 12 / 64))}  # of 26.4 and 12.8


@pytest.mark.parametrize("window", ["inner", "outer"])
def test_spacings_follow_from_the_sizes_that_layers_give(window):
    options = {"window": window, "smoothness": 2.0}
    model = nn.Sequential(
        ds.DiffStride1d(1.7, **options),  # of N samples
        nn.Conv1d(2, 2, 5),  # takes 4 off, at the same spacing
        nn.Conv1d(2, 2, 3, stride=3),  # every third
        ds.DiffStrideConv1d(2, 2, 3, 2.4, padding=1, **options),
        nn.MaxPool1d(2),
        ds.DiffStride1d(1.3, **options),
    )
    size, d = 400, 0.5
    x = torch.randn(1, 2, size)
    got = ds.cutoff_frequencies(model, d, x)
    expected = {"0": (1 / (2 * 1.7 * d),)}
    new = math.ceil(size / 1.7) if window == "inner" else math.floor(size / 1.7 + 4)
    d, size = d * size / new * 3, (new - 4 - 3) // 3 + 1
    expected["3"] = (1 / (2 * 2.4 * d),)
    new = math.ceil(size / 2.4) if window == "inner" else math.floor(size / 2.4 + 4)
    d, size = d * size / new * 2, new // 2
    expected["5"] = (1 / (2 * 1.3 * d),)
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value)
    assert model[5].output_size(size) == tuple(model(x).shape[2:])  # the sizes by hand are those of the model


def test_strides_are_clamped_to_the_users_bounds():
    layer = ds.DiffStride1d(2.0, bounds=(1.5, 3.0))
    with torch.no_grad():
        layer.stride.fill_(10.0)
    assert ds.cutoff_frequencies(layer, 1.0)[""] == pytest.approx((1 / 6,))


class Spectrogram(nn.Module):
    """An axis of its own making."""

    def __init__(self):
        super().__init__()
        self.down = ds.DiffStride2d(2.0)

    def forward(self, x):
        return self.down(x[:, None].expand(-1, 12, -1)[:, None])


@pytest.mark.parametrize(
    ("spacing", "options", "message"),
    [
        (0.0, {}, "spacing must be > 0 and finite, got 0.0"),
        ((1.0, math.nan), {}, "spacing must be > 0 and finite"),
        ((1.0, 1.0, 1.0), {}, r"spacing must have 2 entries \(one per axis\), got 3"),
        (1.0, {"whole_bins": True}, "example_inputs must be given for whole_bins=True"),
    ],
)
def test_wrong_arguments_are_one_line(spacing, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        ds.cutoff_frequencies(ds.DiffStride2d(2.0), spacing, **options)
    assert "\n" not in str(caught.value)


def test_layers_that_do_not_see_the_input_need_example_inputs():
    model = nn.Sequential(ds.DiffStride2d(2.0), nn.Conv2d(3, 3, 3), ds.DiffStride2d(2.0))
    with pytest.raises(ValueError, match="example_inputs must be given for 2: it need not see its input, got None"):
        ds.cutoff_frequencies(model, 1.0)
    assert list(ds.cutoff_frequencies(model, 1.0, torch.randn(1, 3, 20, 20))) == ["0", "2"]
    with pytest.raises(ValueError, match="an axis of down must be one of the model's input"):
        ds.cutoff_frequencies(Spectrogram(), 1.0, torch.randn(2, 30))
