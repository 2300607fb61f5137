"""Write the tables of `diffstride bench` into a page.

    python benchmarks/write_performance.py results/bench-cpu.json docs/results/performance.md

The text between `<!-- bench:NAME -->` and `<!-- /bench -->` is replaced. NAME is a suite or `facts`.
"""

import json
import re
from pathlib import Path
from typing import Any

from command_line import Parser

from diffstride.experiments.benchmark.tables import Sheet, sheets

BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", flags=re.S)


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Return the Markdown of every suite in the report, and of the facts."""
    suites = dict.fromkeys(row["suite"] for row in report["rows"])
    written = {suite: "\n".join(map(markdown, sheets(report["rows"], suite))) for suite in suites}
    return {**written, "facts": facts(report)}


def markdown(sheet: Sheet) -> str:
    parts = []
    for dtype, rows in sheet.sections.items():
        lines = [sheet.header, ["---", *["---:"] * (len(sheet.header) - 1)], *rows]
        parts += [f"*{sheet.title}, {dtype}*\n", *(f"| {' | '.join(line)} |" for line in lines), ""]
    return "\n".join(parts)


def facts(report: dict[str, Any]) -> str:
    allocator = report["allocator"]
    if isinstance(allocator, dict):
        allocator = ", ".join(f"`{name}={value}`" for name, value in allocator.items())
    entries = {
        "command": f"`{report['command']}`",
        "commit": report["commit"],
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "hardware": report["hardware"],
        "threads": report["threads"],
        "allocator": allocator,
        "rounds": f"{report['repeats']}, seed {report['seed']}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in entries.items()), ""])


def fill(page: str, report: dict[str, Any]) -> str:
    """Return the page with its blocks replaced."""
    found = tables(report)
    names = [match[2] for match in BLOCK.finditer(page)]
    if not names:
        raise ValueError("the page has no line <!-- bench:NAME --> with a <!-- /bench --> after it")
    if absent := [name for name in names if name not in found]:
        raise ValueError(f"the page asks for {', '.join(absent)}; the results have {', '.join(found)}")
    return BLOCK.sub(lambda match: f"{match[1]}{found[match[2]]}{match[3]}", page)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("results", type=Path, help="JSON file of `diffstride bench --out`")
    parser.add_argument("page", type=Path, help="Markdown file to change")
    options = parser.parse_args()
    with parser.mistakes():
        options.page.write_text(fill(options.page.read_text(), json.loads(options.results.read_text())))


if __name__ == "__main__":
    main()
