"""Tables of the benchmark, in the terminal and in the pages of docs/."""

import json
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from diffstride.backends import DENSE_UP_TO
from diffstride.experiments.benchmark.measure import compare
from diffstride.experiments.benchmark.tables import sheets

ROOT = Path(__file__).parents[3]
PAGE = """# Speed

<!-- bench:facts -->
<!-- /bench -->
between
<!-- bench:layers -->
old
<!-- /bench -->
after
"""


def made_up(suite="layers"):
    """Return a report with one case in two dtypes; in the second, one candidate is missing."""
    seconds = {"avg_pool2d": [1.0, 1.0], "ours": [1.5, 2.5], "other": [3.0, 3.0]}
    rows = []
    for dtype, names in {"float32": ["ours", "other"], "bfloat16": ["ours"]}.items():
        case = {"shape": [2, 4, 8, 8], "stride": 2, "dtype": dtype, "memory_format": "channels_last"}
        peaks, counts = dict.fromkeys(seconds, 2**20) | {"ours": 2**21}, {"avg_pool2d": 2, "ours": 34, "other": 5}
        found = compare(seconds, peaks, counts, "avg_pool2d", names)
        rows += [{"suite": suite, "case": case, **row} for row in found]
    return {
        "commit": "0123abcd", "versions": {"torch": "2.13.0"}, "hardware": "a machine", "threads": 2,
        "allocator": {"MALLOC_TRIM_THRESHOLD_": "1"}, "repeats": 2, "seed": 0, "command": "diffstride bench layers",
        "rows": rows,
    }  # fmt: skip


def test_a_page_takes_its_tables_from_the_results(tmp_path, monkeypatch):
    script = str(ROOT / "benchmarks" / "write_performance.py")
    page, results = tmp_path / "page.md", tmp_path / "bench.json"
    page.write_text(PAGE)
    results.write_text(json.dumps(made_up()))
    monkeypatch.setattr("sys.argv", ["write_performance.py", str(results), str(page)])
    runpy.run_path(script, run_name="__main__")
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("# Speed\n\n<!-- bench:facts -->\n| | |")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert "<!-- /bench -->\nbetween\n<!-- bench:layers -->\n" in text
    times = "|  | 2×4×8×8, channels_last |\n| --- | ---: |\n| avg_pool2d | 1e+03 ms |\n| ours | 2.00 (1.75–2.25) |"
    assert times in text
    assert "| avg_pool2d | 1 MB |\n| ours | 2.00 |\n| other | 1.00 |" in text
    assert "| other | - |" in text
    assert "| commit | 0123abcd |" in text
    assert "| allocator | `MALLOC_TRIM_THRESHOLD_=1` |" in text
    tables = runpy.run_path(script)["tables"](json.loads(results.read_text()))
    assert set(tables) == {"facts", "layers"}
    assert all(f"<!-- bench:{name} -->\n{table}<!-- /bench -->" in text for name, table in tables.items())
    runpy.run_path(script, run_name="__main__")
    assert page.read_text() == text


def test_a_page_that_the_results_do_not_fill_stays(tmp_path, monkeypatch, capsys):
    page, results = tmp_path / "page.md", tmp_path / "bench.json"
    page.write_text(PAGE)
    results.write_text(json.dumps(made_up("calibrate")))
    monkeypatch.setattr("sys.argv", ["write_performance.py", str(results), str(page)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "benchmarks" / "write_performance.py"), run_name="__main__")
    assert "the page asks for layers; the results have calibrate, facts" in capsys.readouterr().err
    assert page.read_text() == PAGE


def test_the_longer_list_goes_down_the_page():
    rows = []
    for n in (4, 8, 12):
        row = made_up()["rows"][1]
        case = {**row["case"], "shape": [n]}
        rows += [{**row, "case": case, "name": name} for name in ("avg_pool2d", "ours")]
    (sheet, _) = sheets(rows, "layers")
    assert sheet.header == ["", "avg_pool2d", "ours"]
    assert [line[0] for line in sheet.sections["float32"]] == [f"{n}, channels_last" for n in (4, 8, 12)]
    assert all(a[2] == b[2] for a, b in pairwise(sheet.sections["float32"]))


def test_the_page_shows_what_was_measured():
    fill = runpy.run_path(str(ROOT / "benchmarks" / "write_performance.py"))["fill"]
    page = (ROOT / "docs" / "results" / "performance.md").read_text()
    assert fill(page, json.loads((ROOT / "results" / "bench-cpu.json").read_text())) == page
    calibration = json.loads((ROOT / "results" / "calibration-cpu.json").read_text())["crossover"]
    assert calibration == {name: DENSE_UP_TO[getattr(torch, name)] for name in ("float32", "bfloat16")}
    assert all(f"{length}" in page for length in calibration.values())
