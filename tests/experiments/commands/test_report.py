"""`diffstride report`: the page is written, mistakes are one line, and a real browser shows all of it."""

import os
import shutil
from pathlib import Path

import pytest

from diffstride.experiments.commands.main import main
from tests.helpers.runs import small

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small(tmp_path_factory.mktemp("runs"), "mine", steps=6)[0].run_folder


def test_the_page_is_in_the_folder_or_where_it_is_asked_for(run, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    assert f"{run / 'report.html'}: " in capsys.readouterr().out
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == (run / "report.html").read_text()


def test_the_name_of_a_folder_may_have_bytes_that_are_not_utf_8(run, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff<b>"))
    shutil.copytree(run, folder)
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "\\udcff&lt;b&gt;" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_mistakes_are_one_line(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.yaml").write_text("runs: [")
    for arguments, named in (
        ([tmp_path / "none"], str(tmp_path / "none")),
        ([tmp_path / "empty"], "not the folder of a run or of a study"),
        ([tmp_path / "study"], "study.yaml"),
        ([run, "--out", tmp_path / "page.txt"], ".html"),
        ([run, "--out", tmp_path / "none" / "page.html"], str(tmp_path / "none")),
        ([], "RUN_OR_STUDY"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_picture_and_nothing_sticks_out(run, tmp_path, scheme):
    sync_api = pytest.importorskip("playwright.sync_api")
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--headless", "--no-sandbox"])
        page = browser.new_context(offline=True, color_scheme=scheme).new_page()
        problems = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda it: problems.extend([it.url] if it.url.startswith("http") else []))
        page.goto((tmp_path / "page.html").as_uri())
        for width in (1600, 400):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert all(box["width"] > 300 for box in (svg.bounding_box() for svg in page.locator("svg").all()))
        assert page.locator("svg").count() == 4
        ink, paper = page.evaluate("[getComputedStyle(document.querySelector('svg text')).fill, "
                                   "getComputedStyle(document.body).backgroundColor]")  # fmt: skip
        brightness = [int(colour.split("(")[1].split(",")[0]) for colour in (ink, paper)]
        assert abs(brightness[0] - brightness[1]) > 150
        assert problems == []
        browser.close()
