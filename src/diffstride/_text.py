"""Text from outside (names of files and classes, values, errors), made safe for a terminal and for a table."""

from __future__ import annotations


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
