"""What the commands of this folder read their arguments with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from diffstride._check import UserError


class CommandParser(argparse.ArgumentParser):
    """Keeps the lines of the description; says in one line what is wrong, and where to read more."""

    def __init__(self, prog: str, description: str, **options: bool | str) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=form, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise the mistake."""
        raise UserError(f"{message} (see {self.prog} --help)")


def check_new_file(path: Path, force: bool) -> None:
    """A file can be written there, and what is there is replaced only where that is asked for."""
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}: make it, or give another path")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the path of a file")
    if path.exists() and not force:
        raise UserError(f"{path} is there already: give another path, or --force to replace it")


def by(size: Sequence[int]) -> str:
    """A size as people write it: 3×32×32."""
    return "×".join(map(str, size))
