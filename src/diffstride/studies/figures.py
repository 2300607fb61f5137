"""Placeholder until the figures land."""

from collections.abc import Sequence
from pathlib import Path

FIGURES = dict.fromkeys(["trajectories", "strides", "factor", "pareto", "windows", "resolution"])


def draw(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Nothing yet."""
    return dict.fromkeys(names, "not built yet")
