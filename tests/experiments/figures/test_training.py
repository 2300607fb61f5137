"""Pictures of single runs show the rows that they are given."""

import math

import pytest

from diffstride.experiments.figures import training
from diffstride.experiments.history import StrideRow
from tests.helpers.figures import inside


def lines(panel):
    return {line.get_label(): [list(values) for values in line.get_data()] for line in panel.get_lines()}


def test_strides_over_bands():
    panels = {axis: {"run": ([0, 10, 20], [2.0, 2.1, 2.2])} for axis in "hw"}
    figure = training.strides_over_bands(panels, {"h": (4.0, math.inf), "w": (2.0, 4.0)})
    height, width = figure.axes
    assert lines(height)["run"] == [[0, 10, 20], [2.0, 2.1, 2.2]]
    assert width.get_title() == "w"
    bottom, top = sorted(patch.get_y() + patch.get_height() for patch in width.patches)
    assert (bottom, top) == pytest.approx((2.0, min(4.0, width.get_ylim()[1])))
    assert inside(figure)


def test_a_stride_with_a_single_row_is_a_point():
    row = StrideRow(step=5, layer="a", axis="height", stride=2.0, size=8)
    for rows, marker in ([row], "."), ([row, row._replace(step=6)], "None"):
        figure = training.stride_trajectories(rows)
        assert [line.get_marker() for panel in figure.axes for line in panel.get_lines()] == [marker] * 2


def test_windows_over_spectrum():
    panels = [
        training.WindowPanel(f"{layer}, {axis}", [4.0, 2.0, n], {"initial": [1.0, 0.5, 0.0], "learned": [1, 1, n]}, 1)
        for layer, n in (("first", 0.0), ("second", 0.25)) for axis in ("height", "width")
    ]  # fmt: skip
    figure = training.windows_over_spectrum(panels, title="T")
    drawn, behind = figure.axes[:4], figure.axes[4:]
    for panel, spectra, given in zip(drawn, behind, panels, strict=True):
        assert panel.get_title() == given.title
        assert lines(panel) == {
            "the class is here": [[1, 1], [0, 1]], **{name: [[0, 1, 2], w] for name, w in given.windows.items()}
        }  # fmt: skip
        assert [bar.get_height() for bar in spectra.patches] == given.spectrum
        assert spectra.get_ylim()[0] > 0  # the scale is logarithmic, and an amplitude of 0 has no place on it
    assert inside(figure)


def test_a_long_axis_has_room_for_its_title_and_few_markers():
    title = "Windows over the mean spectrum that reaches them, diffstride-budget-1.5-seed-0"
    panel = training.WindowPanel("a", [0.5] * 500, {"learned": [0.5] * 500})
    figure = training.windows_over_spectrum([panel], title=title)
    line = figure.axes[0].get_lines()[0]
    assert len(line.get_xydata()[:: line.get_markevery()]) <= 40
    assert inside(figure)


def test_resolution_staircases():
    ends = {"one": ("a", (18, 18), (20, 12)), "two": ("a", (16, 10), (18, 18)), "other": ("b", (18, 18), (9, 9))}
    runs = {
        name: [StrideRow(0, "input", axis, 1.0, 32) for axis in ("height", "width")]
        + [StrideRow(step, layer, axis, 2.0, size) for step, sizes in ((0, start), (9, end))
           for axis, size in zip(("height", "width"), sizes, strict=True)]
        for name, (layer, start, end) in ends.items()
    }  # fmt: skip
    runs["other"].append(StrideRow(9, "c", "height", 2.0, 7))  # which has one axis
    figure = training.resolution_staircases(runs, title="T")
    one, two, other, empty = figure.axes
    stairs = [{p.get_label(): p.get_data().values.tolist() for p in panel.patches} for panel in (one, two, other)]
    assert stairs[0] == {
        "initial height": [32, 18], "learned height": [32, 20], "initial width": [32, 18], "learned width": [32, 12],
    }  # fmt: skip
    assert stairs[1]["initial width"] == [32, 10]
    assert [text.get_text() for text in one.texts] == ["32", "20", "12"]
    assert [text.get_text() for text in other.texts] == ["32", "9", "7"]  # equal sizes have one number
    assert [label.get_text() for label in other.get_xticklabels()] == ["input", "b", "c"]
    assert not empty.axison
    assert inside(figure)
