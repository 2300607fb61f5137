"""Text from outside, in one line for a terminal and without formulas for a spreadsheet."""

import csv
import io

import pytest

from diffstride._text import csv_cell, printable

HOSTILE = [
    "\x1b[2J\x1b[Hcleared", "a\nrow: dog 1.000", "a\tb", "\x9b2J", "a\u2028b", "a\u202egpj.exe", "\udcff.png",
    "=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", '"quoted", a',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_one_printable_line_in_any_encoding(text):
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode()  # surrogates have no encoding
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_is_one_cell_and_no_formula(text):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow([csv_cell(text), "next"])
    assert len(file.getvalue().splitlines()) == 1
    ((cell, following),) = csv.reader(file.getvalue().splitlines())
    assert following == "next"
    assert cell[0] not in "=+-@\t\r"


@pytest.mark.parametrize(
    "value", ["größe", "日本.png", "a b", "C:\\x", "-1.5", "+2", "-inf", "1e-3", "", -2, 0.5, None]
)
def test_names_and_numbers_stay_as_they_are(value):
    assert csv_cell(value) == value
    if isinstance(value, str):
        assert printable(value) == value
