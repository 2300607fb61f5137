"""What the commands of this folder read their arguments with."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from diffstride._files import may
from diffstride._text import did_you_mean
from diffstride.errors import UsageError


class CommandParser(argparse.ArgumentParser):
    """Keeps the lines of the description; says in one line what is wrong, and where to read more."""

    def __init__(self, prog: str, description: str, usage: str | None = None) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, usage, description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise the mistake; of an unknown option, the nearest right one is named."""
        unknown = re.search(r"unrecognized arguments:.* (--[^\s=]+)", message)
        near = self.nearest(unknown[1]) if unknown else ""
        raise UsageError(f"{message}{near} (see {self.prog} --help)")

    def nearest(self, option: str) -> str:
        """The end of a message about an unknown option: the one that it begins or is nearest to, if any."""
        options = [name for action in self._actions for name in action.option_strings]
        return did_you_mean(option, [name for name in options if name.startswith(option)] or options)


def check_new_file(path: Path, force: bool) -> None:
    """A file can be written there, and what is there is replaced only where that is asked for."""
    check_file(path)
    if path.exists() and not force:
        raise UsageError(f"{path} is there already: give another path, or --force to replace it")


def check_file(path: Path) -> None:
    """A file can be written there, as far as can be told before the work that it is to hold is done."""
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}: make it, or give another path")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the path of a file")
    if not may(os.W_OK, path.parent):
        raise UsageError(f"cannot write {path} (the folder is locked): give leave to write there, or another path")


def by(size: Sequence[int]) -> str:
    """A size as people write it: 3×32×32."""
    return "×".join(map(str, size))
