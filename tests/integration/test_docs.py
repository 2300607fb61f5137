"""README and docs: their Python runs as printed, and the files, targets and links that they name exist."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from tools import architectures

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
all_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@all_pages
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block, shown in re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", page.read_text(), flags=re.S):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, page.name, "exec"), names)
        if shown:  # a text block shows the output of the block above it
            assert printed.getvalue() == shown


@all_pages
def test_files_and_targets_that_a_page_names_exist(page):
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.M):
        assert f"\n{target}:" in makefile, target
    folders = "benchmarks|configs|docs|examples|results|src|tests|tools"
    link = r"\]\((?!http)([^)#]+)"
    for path in re.findall(rf"\b((?:{folders})/[\w./-]+\.\w+)", re.sub(link, "", text)):
        assert (ROOT / path).exists() or "NAME" in path, path
    for path in re.findall(link, text):
        assert (page.parent / path).exists(), path


def test_modules_that_the_architecture_page_names_exist():
    source = ROOT / "src" / "diffstride"
    found = re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(found) > 20
    for path in found:
        assert any((place / path).exists() for place in (source, source / "experiments", ROOT)), path


def test_the_table_of_converted_networks_is_that_of_the_measurement():
    page = (ROOT / "docs" / "guides" / "your-own-model.md").read_text()
    rows = json.loads((ROOT / "results" / "convert.json").read_text())["rows"]
    assert all(row["sizes_kept"] for row in rows)
    ratios = [row["macs_after"] / row["macs_before"] for row in rows]
    for row, ratio in zip(rows, ratios, strict=True):
        assert re.search(rf"\| {re.escape(row['model'])} \| {row['sites']}\b.* {ratio:.3f} \|", page), row["model"]
    tried = json.loads((ROOT / "results" / "architectures.json").read_text())["architectures"].values()
    passed = [trials["convert"] for trials in tried if trials["convert"]["passed"]]
    ratios += [trial["macs"] + trial["resampling"] for trial in passed]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} of"
    assert spread in page
    assert spread in (ROOT / "README.md").read_text()


def test_the_page_of_architectures_is_that_of_the_results():
    results = json.loads((ROOT / "results" / "architectures.json").read_text())
    assert (ROOT / "docs" / "results" / "architectures.md").read_text() == architectures.page(results)
