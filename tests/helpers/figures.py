"""Checks of pictures."""

import numpy as np


def inside(figure):
    """Return whether everything in a figure is on its paper, and every value within the limits of its axes."""
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    box = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    on_paper = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
    return on_paper and all(map(_within_limits, figure.axes))


def _within_limits(axes):
    """Return whether no point of a line lies outside of the axes. Lines that span them have other coordinates."""
    limits = [sorted(axes.get_xlim()), sorted(axes.get_ylim())]
    return all(
        (low <= np.nanmin(values) and np.nanmax(values) <= high)
        for line in axes.get_lines()
        if line.get_transform() == axes.transData
        for values, (low, high) in zip((line.get_xdata(), line.get_ydata()), limits, strict=True)
        if len(values) and not np.isnan(np.asarray(values, float)).all()
    )
