"""Text from outside (names of files and classes, values, errors), made safe for a terminal and for a table."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from torch import nn


def printable(text: object) -> str:
    r"""Return `text` in one line, with an escape such as `\x1b` or `\n` for each character that is not printable.

    Escape sequences of terminals, line breaks, bidirectional overrides and bytes that are not UTF-8 become visible.
    """
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def csv_cell(value: object) -> object:
    """Return a value for a cell of a CSV file: numbers and None as they are, everything else as safe text.

    Spreadsheets execute text that begins with `=`, `+`, `-` or `@`: an apostrophe stands before it. Numbers need none.
    """
    if value is None or isinstance(value, int | float):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def short_repr(value: object) -> str:
    """Return a value in one line of at most 100 characters, for messages."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, nn.Module):
        return f"the module {type(value).__name__}"
    if (shape := getattr(value, "shape", None)) is not None and shape != ():
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def one_line(error: BaseException | str) -> str:
    """Return an error's message in one line of at most 1,000 characters; the name of its class if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 1000 else f"{text[:997]}..."


def did_you_mean(given: object, names: Collection[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, or "" if none is near.

    If `names` is a mapping, the message has the value of the nearest name.
    """
    near = difflib.get_close_matches(str(given), list(names), 1)
    if not near:
        return ""
    return f": did you mean {names[near[0]] if isinstance(names, Mapping) else near[0]}?"
