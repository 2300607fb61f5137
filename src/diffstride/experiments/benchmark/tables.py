"""Tables of a benchmark's rows, for the terminal and for pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from diffstride.experiments.benchmark.measure import Row


class Sheet(NamedTuple):
    """A table with one section of rows for each dtype."""

    title: str
    header: list[str]
    sections: dict[str, list[list[str]]]


def sheets(rows: Iterable[Row], suite: str) -> list[Sheet]:
    """Return a table of times and one of peak memory: ratios, with quartiles for times, and values of the reference.

    For the host, the second table is one of operations.
    """
    rows = [row for row in rows if row["suite"] == suite]
    main = rows[0]["reference"]
    # Any other reference has its row in the comparison with the first one.
    rows = [row for row in rows if row["reference"] == main or row["name"] != row["reference"]]
    names, cases = list(dict.fromkeys(_name(row, main) for row in rows)), list(dict.fromkeys(map(case_name, rows)))
    found = []
    second = ("operations", _operations) if suite == "host" else ("peak memory", _memory)
    for quantity, cell in (("time", _time), second):
        header, sections = [""], {}
        for dtype in dict.fromkeys(row["case"]["dtype"] for row in rows):
            cells = {(_name(row, main), case_name(row)): cell(row) for row in rows if row["case"]["dtype"] == dtype}
            grid = [["", *cases], *([name, *(cells.get((name, case), "-") for case in cases)] for name in names)]
            if len(cases) > len(names):  # the longer list goes down the page
                grid = [list(column) for column in zip(*grid, strict=True)]
            header, *sections[dtype] = grid
        title = f"{suite}: {quantity}" if quantity == "operations" else f"{suite}: {quantity}, over that of {main}"
        found.append(Sheet(title, header, sections))
    return found


def _name(row: Row, main: str) -> str:
    return str(row["name"]) if row["reference"] == main else f"{row['name']}, over {row['reference']}"


def case_name(row: Row) -> str:
    """Return the name of a row's case within its suite."""
    case, shape = row["case"], row["case"]["shape"]
    text = "×".join(map(str, shape))
    if row["suite"] in ("host", "layers"):
        return text if case["memory_format"] == "contiguous" else f"{text}, {case['memory_format']}"
    if row["suite"] == "convolutions":
        cin, cout = case["channels"]
        window = "inner window" if case["window"] == "inner" else f"R={case['smoothness']}"
        return f"{cin}→{cout} at {shape[2]}×{shape[3]}, S={case['stride']}, {window}"
    if row["suite"] == "steps":
        return f"width {case['width']:g}, {text}"
    kind = f"signals of {shape[-1]}" if len(shape) == 3 else f"images of {shape[-2]}×{shape[-1]}"
    return f"{kind}, S={case['stride']}"


def _time(row: Row) -> str:
    if row["name"] == row["reference"]:
        return f"{row['ms']:.3g} ms"
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})"


def _operations(row: Row) -> str:
    return str(row["operations"])


def _memory(row: Row) -> str:
    return f"{row['peak_mb']:.3g} MB" if row["name"] == row["reference"] else f"{row['peak_ratio']:.2f}"
