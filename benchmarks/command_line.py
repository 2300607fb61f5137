"""What all scripts have in common: arguments that are looked at before any work, a mistake that is told in one line."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from diffstride import _validation
from diffstride._text import one_line
from diffstride.errors import UsageError
from diffstride.experiments.data import PlantedBands
from diffstride.experiments.parser import CommandParser, check_file
from diffstride.experiments.studies.results import Row, read_study


class Parser(CommandParser):
    """The commands' own, for a script, whose docstring is given: a mistake ends it with status 2."""

    def __init__(self, doc: str) -> None:
        super().__init__(Path(sys.argv[0]).name, doc)

    def error(self, message: str) -> NoReturn:
        with self.mistakes():
            super().error(message)

    @contextlib.contextmanager
    def mistakes(self) -> Iterator[None]:
        """Answer what is wrong with files and values that are given in the same way."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.exit(2, f"{self.prog}: error: {one_line(error)}\n")


def _argument(check: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of arguments; argparse drops what a ValueError says."""

    def convert(text: str) -> Any:
        try:
            return check(text)
        except (ValueError, RuntimeError) as error:
            raise argparse.ArgumentTypeError(one_line(error)) from error

    return convert


@_argument
def output(text: str) -> Path:
    """A file that can be written."""
    path = _validation.a_path(text)
    check_file(path)
    return path


@_argument
def torch_device(text: str) -> torch.device:
    """A device that torch has here."""
    _validation.a_device(text)
    return torch.device(text)


@_argument
def pictures(text: str) -> Path:
    """Pictures that can be written: a path without suffix."""
    path = _validation.a_path(text)
    for suffix in (".png", ".svg"):
        check_file(path.with_suffix(suffix))
    return path


def at_least(least: int) -> Callable[[str], int]:
    """Whole numbers from `least` on."""

    @_argument
    def convert(text: str) -> int:
        if not text.lstrip("+-").isdigit() or int(text) < least:
            raise ValueError(f"must be a whole number >= {least}, got {text}")
        return int(text)

    return convert


def runs_of(folder: Path, *axes: str) -> list[Row]:
    """The runs that are done of a study that varies these axes.

    Raises:
        UsageError: another folder.
    """
    rows = [row for row in read_study(folder)[1] if row.result is not None]
    if not rows:
        raise UsageError(f"{folder} must be a study with runs that are done, got none")
    if missing := [axis for axis in axes if any(axis not in row.axes for row in rows)]:
        raise UsageError(f"{folder} must be a study that varies {', '.join(axes)}, got none for {missing[0]}")
    return rows


def planted_bands(run: Path) -> tuple[dict[str, Any], Mapping[str, tuple[float, float]]]:
    """The configuration of a run on planted bands, and the limits of the strides there (see `stride_limits`).

    Raises:
        UsageError: another run, or none.
    """
    file = run / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text())
        kind, data = config["data"]["class_path"], config["data"]["init_args"]
        smoothness = config["model"]["network"]["init_args"]["downsample_options"]["smoothness"]
        if not kind.endswith("PlantedBands"):
            raise ValueError(f"its data are {kind}")
        return config, PlantedBands(**data).stride_limits(smoothness)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} must describe a run on PlantedBands: {one_line(error)}") from error
