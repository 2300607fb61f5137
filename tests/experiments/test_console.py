"""Text from outside on the commands' console: as it is, in one line, never markup."""

import io

import pytest
from rich.table import Table

from diffstride.experiments.console import PlainConsole, plain

NAMES = ["runs/[bold]x[/bold]", "a[/]b", ":smile:", "\x1b[2J", "a\nb", "\udcff"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["line", "cell", "title", "status"])
def test_text_is_shown_as_it_is(name, where):
    console = PlainConsole(width=100)
    console.file = io.StringIO()
    if where == "line":
        console.say(name)
    elif where == "status":
        status = console.status(name)
        console.print(status.renderable)
        assert plain(name).plain in console.file.getvalue()
        status.update(plain(name))
        console.print(status.renderable)
    else:
        table = Table(title=name if where == "title" else None)
        table.add_column(name)
        table.add_row(name)
        console.print(table)
    shown = console.file.getvalue()
    assert name.replace("\x1b", "\\x1b").replace("\n", "\\n").replace("\udcff", "\\udcff") in shown
    assert "\x1b[2J" not in shown


def test_a_long_line_is_not_broken():
    console = PlainConsole()
    console.file = io.StringIO()
    console.say("x" * 500)
    assert console.file.getvalue() == "x" * 500 + "\n"
