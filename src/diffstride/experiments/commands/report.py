"""`diffstride report`: a run or a study as one page of HTML that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffstride._files import atomic_write_text
from diffstride.errors import UsageError
from diffstride.experiments.console import PlainConsole, plain
from diffstride.experiments.parser import CommandParser, check_file
from diffstride.experiments.studies.page import render
from diffstride.experiments.training.fit import quiet

DESCRIPTION = """Make one HTML page of a run or of a study, with tables and pictures. It opens without a network.

  diffstride report runs/NAME
  diffstride report runs/STUDY --out study.html

The page of a study includes reports of all its runs. A run that has not ended is shown as far as it has come."""


def report(arguments: Sequence[str]) -> None:
    """Write the page and print its path."""
    parser = CommandParser(prog="diffstride report", description=DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="RUN_OR_STUDY", help="folder of a run or of a study")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="the page (default: report.html in the folder); replaced if there"
    )
    options = parser.parse_args(arguments)
    target: Path = options.out or options.folder / "report.html"
    if target.suffix != ".html":
        raise UsageError(f"--out must end in .html, got {target}")
    if options.out:
        check_file(target)
    console = PlainConsole()
    with console.status("reading") as status, quiet():
        text = render(options.folder, lambda name: status.update(plain(name)))
    atomic_write_text(target, text)
    console.say(f"{target}: {target.stat().st_size / 1e6:.1f} MB; open it in a browser.")
