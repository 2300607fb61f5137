"""Colours, panels and files that all pictures share.

The functions of this package take plain numbers and return a `matplotlib.figure.Figure`; `save` and `inline_svg` write
it. Colours are Okabe and Ito's, which colour-blind eyes tell apart. Lines also differ in style, points in shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from diffstride._files import atomic_path
from diffstride._text import printable

INK, FAINT, PAPER = "#000000", "#666666", "#ffffff"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
STYLES = {"height": "-", "width": "--", "depth": ":", "length": "-", "time": "-", "frequency": "--"}
# Their numbers have no common divisor with that of the colours: more runs than colours still differ.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)))
# Colours that a page of HTML replaces by its own, so that they can be read on a dark page too.
PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--faint)", PAPER: "var(--page)", COLOURS[0]: "var(--blue)"}


def panels(
    count: int, columns: int = 1, *, width: float | None = None, height: float = 2.6, title: str = "", **options: Any
) -> tuple[Figure, list[Any]]:
    """Return a figure and `count` panels in rows, each of some inches, with an inch more for the title and the legend.

    By default, a row is 8.4 inches wide. Places that are left over in the last row stay empty. `options` are arguments
    of `Figure.subplots`.
    """
    rows, width = math.ceil(count / columns), width or 8.4 / columns
    figure = Figure(figsize=(width * columns, height * rows + 1), layout="constrained")
    made = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for panel in made:
        panel.spines[["top", "right"]].set_visible(False)
    for panel in made[count:]:
        panel.set_axis_off()
    figure.suptitle(title)
    return figure, made[:count]


def look(i: int) -> dict[str, Any]:
    """Return colour and marker of the `i`-th series of points."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "ms": 6}


def line_look(i: int) -> dict[str, Any]:
    """Return colour and style of the `i`-th line."""
    return {"color": COLOURS[i % len(COLOURS)], "ls": LINES[i % len(LINES)]}


def spread(i: int, n: int) -> float:
    """Return the place of the `i`-th of `n` things between -1 and 1."""
    return 2 * i / (n - 1) - 1 if n > 1 else 0.0


def log_scale(panel: Any, axis: str, base: float = 10) -> None:
    """Give an axis a logarithmic scale with plain numbers in place of powers."""
    getattr(panel, f"set_{axis}scale")("log", base=base)
    scale = getattr(panel, f"{axis}axis")
    scale.set_major_locator(LogLocator(base, subs=(1, 2, 5) if base == 10 else (1,), numticks=20))
    scale.set_minor_locator(NullLocator())
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(figure: Figure, labelled: Iterable[Any], *, title: str | None = None) -> None:
    """Put a legend of what has a label in some panels below all panels; equal labels appear once."""
    by_label = {
        label: handle for panel in labelled for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if not by_label:
        return
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.07 * max(map(len, by_label)))))
    rows = math.ceil(len(by_label) / columns)
    figure.legend(
        by_label.values(), by_label, loc="outside lower center", ncols=math.ceil(len(by_label) / rows), title=title,
        frameon=False, fontsize="small", title_fontsize="small",
    )  # fmt: skip


def save(figure: Figure, path: str | Path) -> None:
    """Write a picture as `path` with the suffixes `.png` and `.svg`."""
    show_plain_text(figure)
    for suffix in (".png", ".svg"):
        with atomic_path(Path(path).with_suffix(suffix)) as unfinished:
            figure.savefig(unfinished, format=suffix[1:], dpi=150)


def inline_svg(figure: Figure, title: str, prefix: str) -> str:
    """Return a picture as an `svg` element for a page of HTML.

    Colours of text, axes and paper are those of the page. Coordinates are rounded to hundredths of a point. Screen
    readers read the title. Pictures of one page need different prefixes, which make their ids differ.
    """
    show_plain_text(figure)
    file = BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": printable(prefix)}):
        figure.savefig(file, format="svg", transparent=True)
    svg = ElementTree.fromstring(file.getvalue())
    for element in svg.iter():
        element[:] = [child for child in element if _local(child.tag) not in ("metadata", "style")]
        element.tag, element.tail = _local(element.tag), None
        if element.tag != "text":
            element.text = None
        if element.tag == "g":
            element.attrib.pop("id", None)  # other pictures have the same
        element.attrib = {_local(name): _tidy(value) for name, value in element.attrib.items()}
    svg.attrib = {"viewBox": svg.attrib["viewBox"], "width": svg.attrib["width"], "role": "img"}
    svg.insert(0, ElementTree.Element("title"))
    svg[0].text = title
    return ElementTree.tostring(svg, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _tidy(value: str) -> str:
    if value.startswith("data:"):
        return value
    value = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
    value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
    return re.sub("#[0-9a-f]{6}(?=;|$)", lambda colour: PAGE_COLOURS.get(colour[0], colour[0]), value.replace("\n", ""))


def show_plain_text(figure: Figure) -> None:
    """Show names as they are: dollar signs make no formulas, and characters that are not printable are escaped."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
