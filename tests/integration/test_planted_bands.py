"""The claims of docs/results/planted-bands.md: which starts reach the right strides, and which do not."""

import json
from pathlib import Path

import pytest

from diffstride.experiments.training.fit import train

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
BAND, NUISANCE, SMOOTHNESS = (4, 8), (8, 12), 4


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Accuracy and learned strides by start."""
    return {start: end(tmp_path_factory.mktemp("runs"), start) for start in ((1, 1), (3, 3), (4, 6))}


def end(folder, start, *more):
    cli = train([
        "--config", str(CONFIG), "--runs", str(folder), "--model.network.strides", str([list(start)]),
        "--seed_everything", "7", "--trainer.enable_progress_bar", "false", *more,
    ])  # fmt: skip
    result = json.loads((cli.run_folder / "result.json").read_text())
    return result["accuracy"], result["strides"]["down"]


@pytest.mark.long
@pytest.mark.parametrize("start", [(1, 1), (3, 3)])
def test_the_window_holds_the_class_and_not_the_nuisance(ends, start):
    accuracy, strides = ends[start]
    assert accuracy > 0.99
    for stride, band, nuisance in zip(strides, BAND, NUISANCE, strict=True):
        support = 32 / (2 * stride) + SMOOTHNESS
        assert band < support < nuisance + 0.5


@pytest.mark.long
def test_both_starts_end_at_like_strides_that_differ_between_the_axes(ends):
    (_, one), (_, three) = ends[1, 1], ends[3, 3]
    assert one == pytest.approx(three, abs=0.4)
    assert one[0] > one[1] + 1


@pytest.mark.long
def test_a_start_that_does_not_see_the_band_is_a_trap(ends):
    accuracy, (_, width) = ends[4, 6]
    assert 0.4 < accuracy < 0.6
    assert 32 / (2 * width) + SMOOTHNESS < BAND[1]


@pytest.mark.long
def test_a_sweep_leaves_the_trap(ends, tmp_path):
    accuracy, (height, width) = end(tmp_path, (4, 6), "--model.exploration", "Sweep")
    assert accuracy > 0.99
    assert width == pytest.approx(ends[1, 1][1][1], abs=0.6)
    assert all(32 / (2 * s) + SMOOTHNESS > band for s, band in zip((height, width), BAND, strict=True))
