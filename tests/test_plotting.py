"""Pictures show the rows they are given."""

import pytest
import torch

from diffstride import plotting
from diffstride.tracking import StrideRow

ROWS = [
    StrideRow(step, layer, axis, stride + step / 100, 9)
    for step in (0, 10, 20)
    for layer, stride in (("a", 2.0), ("b", 3.0))
    for axis in ("height", "width")
]


@pytest.fixture
def figures(monkeypatch):
    kept = []
    save = plotting._save
    monkeypatch.setattr(plotting, "_save", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


def lines(axes):
    return {line.get_label(): [p.tolist() for p in map(torch.tensor, line.get_data())] for line in axes.get_lines()}


def test_stride_trajectories(figures, tmp_path):
    plotting.stride_trajectories(ROWS, tmp_path / "t")
    (axes,) = figures[0].axes
    drawn = lines(axes)
    assert set(drawn) == {"a, height", "a, width", "b, height", "b, width"}
    assert drawn["b, width"][0] == [0, 10, 20]
    assert drawn["b, width"][1] == pytest.approx([3.0, 3.1, 3.2])
    assert axes.get_xlabel() == "optimiser step"
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert (tmp_path / "t.svg").stat().st_size > 1000


def test_trajectories_to_bands(figures, tmp_path):
    one = [row for row in ROWS if row.layer == "a"]
    plotting.trajectories_to_bands({"run": one}, {"height": (4.0, float("inf")), "width": (2.0, 4.0)}, tmp_path / "t")
    height, width = figures[0].axes
    assert lines(height)["run"][1] == pytest.approx([2.0, 2.1, 2.2])
    assert width.get_title() == "along the width"
    bottom, top = sorted(patch.get_y() + patch.get_height() for patch in width.patches)
    assert (bottom, top) == pytest.approx((2.0, min(4.0, width.get_ylim()[1])))


def test_windows_over_spectrum(figures, tmp_path):
    spectrum, window = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 0.25])
    plotting.windows_over_spectrum({"width": spectrum}, {"width": {"run": window}}, {"width": 1}, tmp_path / "w")
    (axes,) = figures[0].axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1.0, 0.5, 0.25])
    assert lines(axes)["run"][1] == [1.0, 1.0, 0.25]
    assert lines(axes)["the class sits here"][0] == [1, 1]


def test_before_and_after(figures, tmp_path):
    plotting.before_and_after({"in": torch.eye(4), "out": torch.eye(2)}, tmp_path / "e")
    first, second = figures[0].axes
    assert first.get_title() == "in\n4 x 4"
    assert second.get_images()[0].get_array().tolist() == [[1, 0], [0, 1]]
