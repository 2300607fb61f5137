"""The console of the commands, which shows text from outside as it is."""

from __future__ import annotations

from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from diffstride._text import printable


class PlainConsole(Console):
    """A console for text from outside: no markup, no emoji codes, no control characters.

    rich itself reads brackets in a file name as markup, and passes escape sequences on to the terminal.

    Args:
        width: at least this many columns, where a table needs them.
        stderr: print to standard error.
    """

    def __init__(self, width: int = 0, *, stderr: bool = False) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, stderr=stderr)
        if width > self.width:
            self.width = width

    def render_str(self, text: str, **options: Any) -> Text:
        """Return `text` without markup. rich calls this for lines and for the cells of tables."""
        return super().render_str(printable(text), **options)

    def say(self, line: str) -> None:
        """Print a line of any length without breaking it."""
        self.print(line, soft_wrap=True)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Show a spinner with a text."""
        return super().status(plain(status) if isinstance(status, str) else status, **options)

    def progress(self, **options: Any) -> Progress:
        """Return a bar with a text, the number of steps done, and the time."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        return Progress(*columns, console=self, **options)


def make_table(title: str, first: str, *headings: str) -> Table:
    """Return a table whose columns but the first are flush right."""
    table = Table(title=title)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def plain(text: str) -> Text:
    """Return text for the parts of rich that read markup whatever the console is: spinners and bars."""
    return Text(printable(text))
