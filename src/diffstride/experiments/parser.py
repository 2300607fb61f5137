"""The argument parser of the commands."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from diffstride._files import check_output_path
from diffstride._text import did_you_mean
from diffstride.errors import UsageError


class CommandParser(argparse.ArgumentParser):
    """An argument parser that keeps the lines of the description and raises mistakes in one line."""

    def __init__(self, prog: str, description: str, usage: str | None = None) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, usage, description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise the mistake; name the nearest right option for an unknown one."""
        unknown = re.search(r"unrecognized arguments:.* (--[^\s=]+)", message)
        near = self.nearest(unknown[1]) if unknown else ""
        raise UsageError(f"{message}{near} (see {self.prog} --help)")

    def nearest(self, option: str) -> str:
        """Return the end of a message about an unknown option: the nearest one, if any."""
        options = [name for action in self._actions for name in action.option_strings]
        return did_you_mean(option, [name for name in options if name.startswith(option)] or options)


def at_least(least: int, *, or_zero: bool = False) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number with a lower bound."""

    def convert(text: str) -> int:
        if not text.isdecimal() or not (int(text) >= least or (or_zero and int(text) == 0)):
            zero = " or 0" if or_zero else ""
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}{zero}, got {text!r}")
        return int(text)

    return convert


def check_file(path: Path, *, force: bool = True) -> None:
    """Check that a file can be written, before the work for it begins; without `force`, that it is a new one."""
    check_output_path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the path of a file")
    if not os.access(path.parent, os.W_OK, effective_ids=True):
        raise UsageError(f"cannot write {path} (the folder is locked): change its permissions, or give another path")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already: give another path, or --force to replace it")


def by(size: Sequence[int]) -> str:
    """Return a size as in 3×32×32."""
    return "×".join(map(str, size))
