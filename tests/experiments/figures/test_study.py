"""Pictures of many runs show the numbers that they are given."""

import pytest
import torch
from matplotlib.text import Text

from diffstride.experiments.figures import study
from diffstride.experiments.figures.style import PAPER
from tests.helpers.figures import inside


def labels(texts):
    return [text.get_text() for text in texts]


def test_learned_strides():
    start = {"a": [2.0, 2.0], "b": [3.0, 1.0]}
    runs = {
        "x": [(start, {"a": [1.5, 2.5], "b": [4.0, 1.0]}), (start, {"a": [1.7, 2.5], "b": [5.0, 9.0]})],
        "a label that is so long that few have room in a line": [({"a": [3.0, 3.0]}, {"a": [1.6, 2.0]})],
    }
    runs |= {f"another label that is rather long, number {i}": [({"c": [1.0]}, {"c": [2.0]})] for i in range(8)}
    figure = study.learned_strides(runs, ("height", "width"), varied="initial strides")
    height, width = figure.axes
    paths = {tuple(line.get_ydata()) for line in height.get_lines() if line.get_alpha() == 0.6}
    assert paths == {(2.0, 1.5), (2.0, 1.7), (3.0, 1.6), (3.0, 4.0), (3.0, 5.0), (1.0, 2.0)}
    medians = {tuple(line.get_ydata()) for line in width.get_lines() if line.get_color() == "black"}
    assert (2.5, 2.5) in medians  # of 2.5, 2.5 and 2
    hollow = [line.get_ydata()[0] for line in height.get_lines() if line.get_markerfacecolor() == PAPER]
    assert sorted(hollow) == [1] * 8 + [2, 2, 3, 3, 3]  # a layer with one axis is in one panel
    assert inside(figure)


def ends(initial, *learned):
    """Strides of two layers whose products are these."""
    return [({"a": [initial, 1.0], "b": [1.0]}, {"a": [end / 2, 1.0], "b": [2.0]}) for end in learned]


def test_striding_factors():
    figure = study.striding_factors({"2-2": ends(16.0, 8.0, 32.0), "3-1": ends(9.0, 4.0, 10.0, 12.0)}, varied="")
    (panel,) = figure.axes
    assert labels(panel.get_yticklabels()) == ["2-2", "3-1", "all learned"]
    drawn = [list(line.get_xdata()) for line in panel.get_lines() if line.get_linestyle() == "None"]
    assert drawn == [[16.0], [8.0, 32.0], [9.0], [4.0, 10.0, 12.0], [10.0]]  # at last the median of all
    spans = [list(line.get_xdata()) for line in panel.get_lines() if set(line.get_ydata()) == {2}][:2]
    assert spans == [[4.0, 32.0], [8.0, 12.0]]  # the range, the second and the fourth of five
    assert inside(figure)


@pytest.mark.parametrize("learned", [[8.0], [8.1, 8.4]])
def test_the_scale_of_near_factors_has_two_numbers(learned):
    (panel,) = study.striding_factors({"one": ends(8.0, *learned)}, varied="").axes
    low, high = panel.get_xlim()
    assert low < 8.0 <= max(learned) < high
    assert sum(low <= tick <= high for tick in panel.get_xticks()) >= 2


def test_the_frontier_has_no_point_that_another_beats():
    costs, accuracies = torch.rand(2, 40).mul(10).round().div(10).tolist()
    points = [study.Point(str(i), c, c, c, a, 0) for i, (c, a) in enumerate(zip(costs, accuracies, strict=True))]
    best = study.frontier(points)
    assert {(p.cost, p.accuracy) for p in best} == {
        (p.cost, p.accuracy) for p in points
        if not any(q.cost <= p.cost and q.accuracy >= p.accuracy and q[1:] != p[1:] for q in points)
    }  # fmt: skip
    assert [p.cost for p in best] == sorted({p.cost for p in best})


def test_pareto():
    points = [study.Point(f"width {c:g}", c, 0.9 * c, 1.2 * c, a, 0.01) for c, a in ((1, 0.5), (2, 0.7), (8, 0.6))]
    series = {"conv": points, "DiffStride": [points[1]._replace(label="budget 1", accuracy=0.65)]}
    figure = study.pareto({"million MACs": series, "ms": {"conv": points[:2]}}, title="T")
    macs, ms = figure.axes
    assert (macs.get_xscale(), ms.get_xscale()) == ("log", "linear")
    assert (macs.get_xlabel(), ms.get_xlabel()) == ("million MACs, log scale", "ms")
    best = next(line for line in macs.get_lines() if line.get_marker() == "None")
    assert best.get_xydata().ravel().tolist() == pytest.approx([1, 50, 2, 70, 8, 70])
    assert best.get_drawstyle() == "steps-post"
    assert sorted(labels(macs.texts)) == ["budget 1", "width 1", "width 2", "width 8"]
    assert inside(figure)


def test_labels_of_near_points_do_not_overlap():
    points = [study.Point(f"label {i}", 5 + 0.02 * i, 5, 5.2, 0.5 + 0.001 * (i % 3), 0) for i in range(8)]
    points.append(study.Point("far", 10, 10, 10, 0.6, 0))
    figure = study.pareto({"cost": {"all": points}}, title="T")
    (panel,) = figure.axes
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in panel.texts]
    assert {"label 0", "far"} <= set(labels(panel.texts))
    for i, a in enumerate(boxes):
        assert panel.bbox.containsx(a.x0)
        assert panel.bbox.containsx(a.x1)
        assert not any(a.overlaps(b) for b in boxes[:i])
