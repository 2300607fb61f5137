"""Rows of two layers along two axes."""

import numpy as np
import pytest

from diffstride.experiments.history import StrideRow


@pytest.fixture
def rows():
    return [
        StrideRow(step, layer, axis, stride + step / 100, 9)
        for step in (0, 10, 20)
        for layer, stride in (("a", 2.0), ("b", 3.0))
        for axis in ("height", "width")
    ]


def within_limits(axes):
    """Return whether no point of a line lies outside of the axes. Lines that span them have other coordinates."""
    limits = [sorted(axes.get_xlim()), sorted(axes.get_ylim())]
    return all(
        (low <= np.nanmin(values) and np.nanmax(values) <= high)
        for line in axes.get_lines()
        if line.get_transform() == axes.transData
        for values, (low, high) in zip((line.get_xdata(), line.get_ydata()), limits, strict=True)
        if len(values) and not np.isnan(np.asarray(values, float)).all()
    )


@pytest.fixture
def inside():
    """Return whether everything in a figure is on its paper, and every value within the limits of its axes."""

    def check(figure):
        figure.draw_without_rendering()
        width, height = figure.get_size_inches() * figure.dpi
        box = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
        on_paper = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        return on_paper and all(map(within_limits, figure.axes))

    return check
