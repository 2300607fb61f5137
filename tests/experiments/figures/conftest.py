"""Rows of two layers along two axes."""

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


@pytest.fixture
def inside():
    """Return whether everything in a figure is on its paper."""

    def check(figure):
        figure.draw_without_rendering()
        width, height = figure.get_size_inches() * figure.dpi
        box = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
        return box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1

    return check
