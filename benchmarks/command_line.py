"""The command line of the scripts: checks before any work, mistakes in one line, folders of studies."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from diffstride._text import one_line
from diffstride.errors import UsageError
from diffstride.experiments.data import PlantedBands
from diffstride.experiments.parser import CommandParser, check_file
from diffstride.experiments.studies.results import Row, read_study
from diffstride.experiments.training.documents import read_yaml


class Parser(CommandParser):
    """A parser for a script, from its docstring: a mistake ends the script with status 2."""

    def __init__(self, doc: str) -> None:
        super().__init__(Path(sys.argv[0]).name, doc)

    def error(self, message: str) -> NoReturn:
        with self.mistakes():
            super().error(message)

    @contextlib.contextmanager
    def mistakes(self) -> Iterator[None]:
        """Report wrong files and values in the same way."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.exit(2, f"{self.prog}: error: {one_line(error)}\n")


def output(text: str, suffixes: tuple[str, ...] = ()) -> Path:
    """Return the path of a file that can be written."""
    path = Path(text)
    try:
        for file in [path.with_suffix(suffix) for suffix in suffixes] or [path]:
            check_file(file)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def pictures(text: str) -> Path:
    """Return a path without suffix at which pictures can be written."""
    return output(text, (".png", ".svg"))


def at_least(least: int) -> Callable[[str], int]:
    """Return a conversion to integers from `least` on."""

    def convert(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer >= {least}, got {text}")
        return int(text)

    return convert


def runs_of(folder: Path, *axes: str) -> list[Row]:
    """Return the finished runs of a study that varies these axes.

    Raises:
        UsageError: The folder has no such runs.
    """
    rows = [row for row in read_study(folder)[1] if row.result is not None]
    if not rows or any(axis not in row.axes for axis in axes for row in rows):
        raise UsageError(f"{folder} must be a study of {', '.join(axes)} with finished runs, got none")
    return rows


def planted_bands(run: Path) -> tuple[dict[str, Any], Mapping[str, tuple[float, float]]]:
    """Return the configuration of a run on planted bands, and the limits of its strides (see `stride_limits`)."""
    config = read_yaml(run / "config.yaml")
    smoothness = config["model"]["network"]["init_args"]["downsample_options"]["smoothness"]
    return config, PlantedBands(**config["data"]["init_args"]).stride_limits(smoothness)
