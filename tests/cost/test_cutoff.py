"""Cut-off frequencies against table 2's formula and spacings computed by hand."""

import itertools
import math

import numpy as np
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
    with torch.inference_mode():  # as in evaluation
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
        (0.0, {}, "spacing must be > 0 and finite, got 0"),
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


# Table 2 of the paper: stride along time and frequency, cut-off in Hz and in cycles per mel band, means and deviations
# of three runs. The last line's deviations divide by n, the others' by n - 1: (54, 55, 55) bins are 0.29 and 0.36 Hz.
TABLE_2 = {
    "Acoustic scenes": ((1.89, 0.05), (1.99, 0.03), (26.25, 0.63), (0.2448, 0.009), 1),
    "Birdsong detection": ((1.91, 0.02), (1.96, 0.01), (25.83, 0.36), (0.2500, 0.000), 1),
    "Music (Instrument)": ((1.29, 0.06), (2.12, 0.01), (38.33, 1.57), (0.2292, 0.009), 1),
    "Music (Pitch)": ((1.32, 0.10), (1.61, 0.07), (37.50, 2.72), (0.3021, 0.018), 1),
    "Speech commands": ((1.97, 0.00), (1.95, 0.01), (25.00, 0.00), (0.2500, 0.000), 1),
    "Multi-task model": ((1.46, 0.01), (1.79, 0.03), (34.17, 0.30), (0.2708, 0.0074), 0),
}


def _as_printed(values, mean, deviation, digits, ddof):
    """Return whether values have this printed mean and deviation, up to one in the last digit."""
    step = 10.0**-digits
    return abs(np.mean(values) - mean) <= 0.5001 * step and abs(np.std(values, ddof=ddof) - deviation) <= step


def _triples_of_strides(size, spacing, stride, cutoff, digits, ddof):
    """Triples of strides with a mean and deviation, whose cut-offs in whole bins (by definition) have theirs."""
    grid = np.arange(1.0, 2.6, 0.01)
    near = [s for s in grid if abs(s - stride[0]) <= 2 * stride[1] + 0.015]
    for triple in itertools.combinations_with_replacement(near, 3):
        if _as_printed(triple, *stride, 2, ddof):
            bins = [math.floor(size / (2 * s)) for s in triple]
            if _as_printed([b / (size * spacing) for b in bins], *cutoff, digits, ddof):
                yield triple


@pytest.mark.parametrize("task", TABLE_2)
def test_the_papers_cutoffs_are_whole_bins_of_160_frames_and_64_bands(task):
    """For each printed pair there are three strides whose whole bins give what is printed, as the library has it."""
    time, frequency, hz, per_mel, ddof = TABLE_2[task]
    times = next(_triples_of_strides(160, 0.01, time, hz, 2, ddof))
    digits = 4 if ddof == 0 else 3  # of the deviation, as printed
    mels = next(_triples_of_strides(64, 1.0, frequency, per_mel, digits, ddof))
    read, exact = [], []
    for strides in zip(times, mels, strict=True):
        model = nn.Sequential(nn.Conv2d(1, 1, (3, 1), padding=(1, 0)), ds.DiffStride2d(strides))
        x = torch.zeros(1, 1, 160, 64)
        read.append(ds.cutoff_frequencies(model, (0.01, 1.0), x, whole_bins=True)["1"])
        exact.append(ds.cutoff_frequencies(model, (0.01, 1.0), x)["1"])
    for axis, (mean, deviation), places in ((0, hz, 2), (1, per_mel, digits)):
        values = [cutoffs[axis] for cutoffs in read]
        assert _as_printed(values, mean, deviation, places, ddof)
        # The exact edges are never below, and less than a bin above.
        above = [e[axis] - r for e, r in zip(exact, values, strict=True)]
        assert min(above) > -1e-6
        assert max(above) < (0.625, 1 / 64)[axis]


def test_the_exact_edges_are_not_what_the_paper_prints():
    """In five lines of six no strides with the printed mean have edges `1/(2 S d)` with the printed mean.

    The mean of edges is at least the edge of the mean stride, for `1/S` is convex.
    """
    beyond = [
        task for task, (time, _, hz, _, _) in TABLE_2.items() if 1 / (2 * (time[0] + 0.005) * 0.01) > hz[0] + 0.005
    ]
    assert beyond == [task for task in TABLE_2 if task != "Multi-task model"]
