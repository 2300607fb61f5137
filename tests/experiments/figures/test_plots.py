"""Pictures show the rows they are given."""

import pytest
import torch
from matplotlib.text import Text

from diffstride.experiments.figures import plots
from diffstride.experiments.history import StrideRow

ROWS = [
    StrideRow(step, layer, axis, stride + step / 100, 9)
    for step in (0, 10, 20)
    for layer, stride in (("a", 2.0), ("b", 3.0))
    for axis in ("height", "width")
]


@pytest.fixture
def figures(monkeypatch):
    kept = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


@pytest.fixture
def sketches(monkeypatch):
    """Figures that are not written, which takes the longest."""
    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    return kept


def lines(axes):
    return {line.get_label(): [p.tolist() for p in map(torch.tensor, line.get_data())] for line in axes.get_lines()}


def test_stride_trajectories(figures, tmp_path):
    plots.stride_trajectories(ROWS, tmp_path / "t")
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
    plots.trajectories_to_bands({"run": one}, {"height": (4.0, float("inf")), "width": (2.0, 4.0)}, tmp_path / "t")
    height, width = figures[0].axes
    assert lines(height)["run"][1] == pytest.approx([2.0, 2.1, 2.2])
    assert width.get_title() == "along the width"
    bottom, top = sorted(patch.get_y() + patch.get_height() for patch in width.patches)
    assert (bottom, top) == pytest.approx((2.0, min(4.0, width.get_ylim()[1])))


def test_windows_over_spectrum(figures, tmp_path):
    spectrum, window = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 0.25])
    plots.windows_over_spectrum({"width": spectrum}, {"width": {"run": window}}, {"width": 1}, tmp_path / "w")
    (axes,) = figures[0].axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1.0, 0.5, 0.25])
    assert lines(axes)["run"][1] == [1.0, 1.0, 0.25]
    assert lines(axes)["the class sits here"][0] == [1, 1]


def test_before_and_after(figures, tmp_path):
    plots.before_and_after({"in": torch.eye(4), "out": torch.eye(2)}, tmp_path / "e")
    first, second = figures[0].axes
    assert first.get_title() == "in\n4 x 4"
    assert second.get_images()[0].get_array().tolist() == [[1, 0], [0, 1]]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def inside(figure):
    """Whether all that is written or drawn lies on the paper."""
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    box = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    return box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1


def test_layer_steps(sketches, tmp_path):
    image, output = torch.rand(3, 8, 6), torch.rand(3, 4, 5)
    spectrum, window, kept = torch.rand(8, 6) + 0.1, torch.rand(8, 6), torch.rand(4, 5) + 0.1
    plots.layer_steps(image, spectrum, window, kept, output, tmp_path / "l", title="T")
    panels = sketches[0].axes[:6]
    drawn = [torch.as_tensor(panel.images[0].get_array()) for panel in panels]
    expected = [image.movedim(0, -1), spectrum, window, spectrum * window, kept, output.movedim(0, -1)]
    for values, given in zip(drawn, expected, strict=True):
        assert torch.equal(values, given)
    assert [panel.get_title() for panel in panels] == [
        "1. image, 8 × 6", "2. spectrum, 8 × 6", "3. window, 8 × 6", "4. spectrum × window, 8 × 6", "5. cropped, 4 × 5",
        "6. output, 4 × 5",
    ]  # fmt: skip
    # Row 4 and column 3 are frequency 0; of 5 columns that is the one in the middle, of 4 rows the third.
    assert panels[1].images[0].get_extent() == [-3.5, 2.5, 3.5, -4.5]
    assert panels[4].images[0].get_extent() == [-2.5, 2.5, 1.5, -2.5]
    (box,) = panels[3].patches
    assert box.get_bbox().extents.tolist() == [-2.5, -2.5, 2.5, 1.5]
    assert panels[4].get_xlim() == panels[1].get_xlim()
    assert inside(sketches[0])


def test_layer_windows(sketches, tmp_path):
    rows = [
        (layer, axis, [4.0, 2.0, n], [1.0, 0.5, 0.0], [1.0, 1.0, n])
        for layer, n in (("first", 0.0), ("second", 0.25)) for axis in ("height", "width")
    ]  # fmt: skip
    plots.layer_windows(rows, tmp_path / "w", title="T")
    panels, behind = sketches[0].axes[:4], sketches[0].axes[4:]
    assert [panel.get_title() for panel in panels] == [f"{layer}, {axis}" for layer, axis, *_ in rows]
    for panel, spectra, (_, _, spectrum, initial, learned) in zip(panels, behind, rows, strict=True):
        assert lines(panel) == {"initial window": [[0, 1, 2], initial], "learned window": [[0, 1, 2], learned]}
        assert [bar.get_height() for bar in spectra.patches] == spectrum
        assert spectra.get_ylim()[0] > 0  # the scale is logarithmic, and an amplitude of 0 has no place on it
    styles = {line.get_label(): line.get_linestyle() for line in panels[0].get_lines()}
    assert styles == {"initial window": "--", "learned window": "-"}
    assert inside(sketches[0])


def test_resolution_staircases(sketches, tmp_path):
    runs = {
        "one": [("input", (32, 32), (32, 32)), ("a", (18, 18), (20, 12))],
        "two": [("input", (32, 32), (32, 32)), ("a", (16, 10), (18, 18))],
        "other": [("input", (32, 32), (32, 32)), ("b", (18, 18), (9, 9))],
    }
    plots.resolution_staircases(runs, ("height", "width"), tmp_path / "r", title="T")
    one, two, other, empty = sketches[0].axes
    stairs = [{p.get_label(): p.get_data().values.tolist() for p in panel.patches} for panel in (one, two, other)]
    assert stairs[0] == {"initial": [32, 18], "learned height": [32, 20], "learned width": [32, 12]}
    assert stairs[1] == {
        "initial height": [32, 16], "initial width": [32, 10], "learned height": [32, 18], "learned width": [32, 18],
    }  # fmt: skip
    assert texts(one) == ["32", "20", "12"]
    assert texts(other) == ["32", "9"]
    # What stands below "one" has other layers, so that it must name its own; "two" has nothing below.
    assert [[label.get_text() for label in panel.get_xticklabels()] for panel in (one, two, other)] == [
        ["input", "a"], ["input", "a"], ["input", "b"],
    ]  # fmt: skip
    assert not empty.axison
    assert inside(sketches[0])


def test_trajectories_of_runs(sketches, tmp_path):
    runs = {f"start {i}": [ROWS, [row._replace(stride=row.stride + i) for row in ROWS]] for i in (1, 2)}
    runs["fewer"] = [[row for row in ROWS if row.layer == "a"], []]
    plots.trajectories_of_runs(runs, tmp_path / "t", title="T", legend="initial strides")
    panels = sketches[0].axes
    assert [panel.get_title() for panel in panels] == ["a, height", "a, width", "b, height", "b, width"]
    drawn = [[line.get_ydata()[0] for line in panel.get_lines() if len(line.get_ydata())] for panel in panels]
    assert drawn == [[2, 3, 2, 4, 2]] * 2 + [[3, 4, 3, 5]] * 2
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in panels[0].get_lines()]
    assert looks[0] == looks[1]
    assert all(a != b for a, b in zip(looks[0], looks[2], strict=True))
    (legend,) = sketches[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["start 1", "start 2", "fewer"]
    assert inside(sketches[0])


def test_learned_strides(sketches, tmp_path):
    start = {"a": [2.0, 2.0], "b": [3.0, 1.0]}
    runs = {"x": [(start, {"a": [1.5, 2.5], "b": [4.0, 1.0]}), (start, {"a": [1.7, 2.5], "b": [5.0, 1.2]})],
            "a label that is so long that only few like it have room in a line": [({"a": [3.0, 3.0]},
                                                                                   {"a": [1.6, 2.0]})]}  # fmt: skip
    for i in range(8):
        runs[f"another label that is rather long, number {i}"] = [({}, {})]
    plots.learned_strides(runs, ("height", "width"), tmp_path / "s", title="T", legend="initial strides")
    height, width = sketches[0].axes
    paths = [tuple(line.get_ydata()) for line in height.get_lines() if line.get_linestyle() == "-"]
    assert {(2.0, 1.5), (2.0, 1.7), (3.0, 1.6), (3.0, 4.0), (3.0, 5.0)} <= set(paths)
    medians = {tuple(line.get_ydata()) for line in width.get_lines() if line.get_color() == "black"}
    assert (2.5, 2.5) in medians  # of 2.5, 2.5 and 2
    assert (1.1, 1.1) in {tuple(round(v, 6) for v in pair) for pair in medians}
    hollow = [line.get_ydata()[0] for line in height.get_lines() if line.get_markerfacecolor() == "white"]
    assert sorted(hollow) == [2, 2, 3, 3, 3]
    assert inside(sketches[0])


def test_striding_factors(sketches, tmp_path):
    factors = {"2-2": (16.0, [8.0, 32.0]), "3-1": (9.0, [4.0, 10.0, 12.0])}
    plots.striding_factors(factors, tmp_path / "f", title="T", legend="initial strides")
    (axes,) = sketches[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2-2", "3-1", "all learned"]
    drawn = [line.get_xdata().tolist() for line in axes.get_lines() if line.get_linestyle() == "None"]
    assert drawn == [[16.0], [8.0, 32.0], [9.0], [4.0, 10.0, 12.0]]
    (box,) = axes.patches
    assert (box.get_x(), box.get_width()) == (8.0, 4.0)  # between the second and the fourth of 4, 8, 10, 12, 32
    assert axes.get_xscale() == "log"
    assert inside(sketches[0])


@pytest.mark.parametrize("learned", [[8.0], [8.1, 8.4]])
def test_the_scale_of_near_factors_can_be_read(sketches, tmp_path, learned):
    plots.striding_factors({"one": (8.0, learned)}, tmp_path / "f", title="T", legend="")
    (axes,) = sketches[0].axes
    low, high = axes.get_xlim()
    assert low < 8.0 <= max(learned) < high
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 2


def test_one_axis_has_room_for_a_long_title_and_many_frequencies(sketches, tmp_path):
    title = "Windows over the mean spectrum that reaches them, diffstride-budget-1.5-seed-0"
    plots.layer_windows([("a", "length", *[[0.5] * 500] * 3)], tmp_path / "w", title=title)
    line = sketches[0].axes[0].get_lines()[0]
    assert len(line.get_xydata()[:: line.get_markevery()]) <= 40
    rows = [StrideRow(step, "a", "length", 2.0, 9) for step in (0, 10)]
    plots.trajectories_of_runs({"one": [rows]}, tmp_path / "t", title=title, legend="")
    assert all(inside(figure) for figure in sketches)


def test_the_frontier_has_no_point_that_another_beats():
    costs, accuracies = torch.rand(2, 40).mul(10).round().div(10).tolist()
    points = [plots.Point(str(i), c, c, c, a, 0) for i, (c, a) in enumerate(zip(costs, accuracies, strict=True))]
    best = plots.frontier(points)
    assert {(p.cost, p.accuracy) for p in best} == {
        (p.cost, p.accuracy) for p in points
        if not any(q.cost <= p.cost and q.accuracy >= p.accuracy and q[1:] != p[1:] for q in points)
    }  # fmt: skip
    assert [p.cost for p in best] == sorted({p.cost for p in best})


def test_pareto(sketches, tmp_path):
    points = [plots.Point(f"width {c:g}", c, 0.9 * c, 1.2 * c, a, 0.01) for c, a in ((1, 0.5), (2, 0.7), (8, 0.6))]
    series = {"conv": points, "DiffStride": [points[1]._replace(label="budget 1", accuracy=0.65)]}
    plots.pareto({"million MACs": series, "ms": {"conv": points[:2]}}, tmp_path / "p", title="T")
    macs, ms = sketches[0].axes
    assert (macs.get_xscale(), ms.get_xscale()) == ("log", "linear")
    assert (macs.get_xlabel(), ms.get_xlabel()) == ("million MACs, log scale", "ms")
    conv, other = macs.containers
    assert conv.lines[0].get_xydata().tolist() == [
        pytest.approx((c, 100 * a)) for c, a in ((1, 0.5), (2, 0.7), (8, 0.6))
    ]
    across, up = (bars.get_segments() for bars in conv.lines[2])
    assert across[2][:, 0].tolist() == pytest.approx([7.2, 9.6])
    assert up[2][:, 1].tolist() == pytest.approx([59, 61])
    assert conv.lines[0].get_marker() != other.lines[0].get_marker()
    steps = [line.get_xydata().ravel().tolist() for line in macs.get_lines() if line.get_marker() == "None"]
    assert steps[0] == pytest.approx([1, 50, 2, 50, 2, 70, 8, 70])
    assert sorted(texts(macs)) == ["budget 1", "width 1", "width 2", "width 8"]
    assert inside(sketches[0])


def test_labels_of_near_points_do_not_overlap(sketches, tmp_path):
    points = [plots.Point(f"label {i}", 5 + 0.02 * i, 5, 5.2, 0.5 + 0.001 * (i % 3), 0) for i in range(8)]
    points.append(plots.Point("far", 10, 10, 10, 0.6, 0))
    plots.pareto({"cost": {"all": points}}, tmp_path / "p", title="T")
    (axes,) = sketches[0].axes
    sketches[0].draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's own has its line in it
    frame = axes.get_window_extent()
    assert len(boxes) == 9
    for i, a in enumerate(boxes):
        assert frame.containsx(a.x0)
        assert frame.containsx(a.x1)
        assert frame.containsy(a.y0)
        assert frame.containsy(a.y1)
        assert not any(a.overlaps(b) for b in boxes[:i])


def test_a_label_stands_nearest_to_its_own_point(sketches, tmp_path):
    places = [(37.8, 0.569, 0.009, 2), (35.0, 0.591, 0.001, 5.5), (34.3, 0.575, 0.019, 2), (37.3, 0.579, 0.001, 24)]
    points = [plots.Point(f"{c}", c, c - r, c + r, a, d) for c, a, d, r in [*places, (36.0, 0.566, 0.003, 12)]]
    points += [plots.Point("", c, c, c, 0.55, 0) for c in (5, 60)]
    plots.pareto({"cost": {"all": points}}, tmp_path / "p", title="T")
    (axes,) = sketches[0].axes
    sketches[0].draw_without_rendering()
    pixels = axes.transData.transform([(p.cost, 100 * p.accuracy) for p in points])
    for text in axes.texts:
        (left, bottom), (right, top) = Text.get_window_extent(text).get_points()
        nearest = pixels.clip((left, bottom), (right, top))
        distances = ((pixels - nearest) ** 2).sum(1).tolist()
        assert points[distances.index(min(distances))].label == text.get_text()


def test_explored_strides(sketches, tmp_path):
    steps = [0, 10, 20]
    panels = {
        "none": plots.Explored([(steps, [6.0, 6.1, 6.2])], (steps, [6.0, 6.1, 6.2])),
        "sweep": plots.Explored([(steps, [6.0, 4.0, 2.0]), (steps, [6.0, 5.0, 3.0])], (steps, [1.5, 2.0, 2.0])),
    }
    plots.explored_strides(panels, 3.2, tmp_path / "t", axis="width")
    none, sweep = sketches[0].axes
    assert [none.get_title(), sweep.get_title()] == ["none", "sweep"]
    assert lines(none)["used in training, first run"][1] == pytest.approx([6.0, 6.1, 6.2])
    drawn = [line.get_ydata().tolist() for line in sweep.get_lines()]
    assert drawn == [[1.5, 2.0, 2.0], [6.0, 4.0, 2.0], [6.0, 5.0, 3.0]]
    (band,) = sweep.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((1.0, 3.2))
    assert "width" in none.get_ylabel()
