"""What the commands of this folder read their arguments with."""

from __future__ import annotations

import argparse
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
