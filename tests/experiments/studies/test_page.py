"""The page of a run or a study has the content of its folder, read by Python's parser of HTML."""

import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml

from diffstride.experiments.commands.main import main
from diffstride.experiments.studies.page import render
from tests.experiments.conftest import TINY

NAMES = ["conv-3x3-seed0", "conv-3x3-seed1", "diffstride-3x3-seed0", "diffstride-3x3-seed1"]
VOID = {"meta"}
EVIL = "</pre></svg><script>alert(1)</script>"


class Page(HTMLParser):
    """A page taken apart. Every element is closed, ids are unique, and nothing is loaded or executed."""

    def __init__(self, folder):
        super().__init__()
        self.tables = {}
        self.open, self.ids, self.links, self.pictures, self.texts, self.config = ([] for _ in range(6))
        self.feed(render(folder, lambda name: None))
        self.close()
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)
        assert {link[1:] for link in self.links} <= set(self.ids)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "iframe", "img")
        assert not {"src", "onload", "onerror"} & set(attributes)
        self.open += [] if tag in VOID else [tag]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-2:] == ["svg", "title"]:
            self.pictures.append(data)
        elif "caption" in self.open:
            self.table = self.tables.setdefault(data, [])
        elif "pre" in self.open:
            self.config.append(data)
        elif "style" not in self.open:
            self.texts.append(data)
            if "tr" in self.open and self.open[-1] != "tr":
                self.table[-1][-1] += data


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny study that is done, kept as it is: tests change copies."""
    folder = tmp_path_factory.mktemp("page")
    content = {**TINY, "question": "Is 1 < 2 & 3?", "notes": "Too small.", "latency": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["study", str(folder / "tiny.yaml"), "--runs", str(folder)]) == 0
    return folder / "tiny"


@pytest.fixture
def copy(study, tmp_path):
    return shutil.copytree(study, tmp_path / "tiny")


def read_csv(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_a_runs_page_has_what_its_folder_holds(copy):
    folder = copy / NAMES[2]
    page = Page(folder)
    result = json.loads((folder / "result.json").read_text())
    assert "with DiffStride, trained on PlantedBands." in page.text
    assert page.config == [(folder / "config.yaml").read_text()]
    shown = dict(page.tables["Result"])
    assert shown["accuracy on the test split"] == f"{100 * result['accuracy']:.2f} %"
    total = (result["macs"] + result["resampling_macs"]) / 1e6
    assert shown["MACs a sample, resampling included"] == f"{total:.4g} M"
    assert re.fullmatch(r"[\d.]+ M", shown["MACs a sample with the initial strides"])
    assert dict(page.tables["Provenance"])["torch"] == result["versions"]["torch"]
    assert [picture.split(",")[0] for picture in page.pictures] == [
        "Training", "Strides while training", "Windows", "Resolution",
    ]  # fmt: skip

    history = read_csv(folder / "strides.csv")
    lines = page.tables["Strides"]
    (strides,) = result["strides"].values()
    assert shown["cost of strides, Eq. 6"] == f"{1 / math.prod(strides):.4g}"
    for line, axis, stride in zip(lines[1:], ("height", "width"), strides, strict=True):
        sizes = [row["size"] for row in history if row["axis"] == axis]
        assert line[1:] == [axis, "3", f"{stride:.4g}", sizes[0], sizes[-1]]


def test_the_page_of_a_run_on_sounds_has_its_cutoffs(copy):
    file = copy / NAMES[2] / "result.json"
    result = json.loads(file.read_text())
    (layer,) = result["strides"]
    found = {"exact": {layer: [26.5, 0.25]}, "whole_bins": {layer: [25.0, 0.2]}}
    axes = {"time": "Hz", "frequency": "cycles per band"}
    file.write_text(json.dumps(result | {"cutoffs": found, "axes": axes}))
    lines = Page(copy / NAMES[2]).tables["Strides"]
    assert [line[-1] for line in lines] == ["cut-off (Hz, cycles per band)", "26.5", "0.25"]


def test_a_studys_page_has_its_tables_pictures_and_runs(copy):
    page = Page(copy)
    for text in "Is 1 < 2 & 3?", "4 runs: 4 done.", "Too small.":
        assert text in page.text
    in_markdown = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in (copy / "table.md").read_text().splitlines()
        if line.startswith("|") and "---" not in line
    ]
    titles = [title for title in page.tables if "Accuracy" in title or title == "All runs"]
    assert [line for title in titles for line in page.tables[title]] == in_markdown
    of_study = [picture.split(",")[0] for picture in page.pictures if picture.endswith(", tiny")]
    assert of_study == ["Trajectories", "Strides", "Factor", "Pareto", "Windows", "Resolution"]
    runs = {line[0]: dict(zip(page.tables["Runs"][0], line, strict=True)) for line in page.tables["Runs"][1:]}
    assert list(runs) == NAMES
    for name, line in runs.items():
        result = json.loads((copy / name / "result.json").read_text())
        strides = ["×".join(f"{s:.2f}" for s in layer) for layer in result["strides"].values()]
        assert line["accuracy in %"] == f"{100 * result['accuracy']:.2f}"
        assert (line["learned strides"], line["seed"]) == (strides[0] if strides else "–", name[-1])
    assert len(page.links) >= 4  # to the report of each run
    assert "This run has no learned strides: its downsampling is fixed." in page.text


def test_a_study_that_is_not_done_is_shown_as_far_as_it_has_come(copy):
    (copy / NAMES[0] / "result.json").unlink()
    (copy / NAMES[0] / "failed.json").write_text(json.dumps({"error": "step 3: the loss is lost"}))
    (copy / NAMES[2] / "result.json").unlink()
    shutil.rmtree(copy / NAMES[3])
    page = Page(copy)
    assert "4 runs: 1 done, 1 failed, 1 unfinished, 1 open." in page.text
    assert "This run failed: step 3: the loss is lost. The page shows what it left." in page.text
    assert "This run has not ended: it has logged up to step 6." in page.text
    states = {line[0]: (line[4], line[5]) for line in page.tables["Runs"][1:]}
    assert states[NAMES[3]] == ("open", "–")
    going = Page(copy / NAMES[2])
    assert [line[2] for line in going.tables["Strides"][1:]] == ["3", "3"]
    assert len(going.pictures) == 4


def test_a_run_without_its_checkpoint_has_the_pictures_that_need_none(copy):
    (copy / NAMES[2] / "checkpoints" / "last.ckpt").unlink()
    page = Page(copy / NAMES[2])
    assert re.search(r"Not drawn: Windows, Resolution \(there is no checkpoint .*last\.ckpt", page.text)
    assert len(page.pictures) == 2
    assert dict(page.tables["Result"])["MACs a sample with the initial strides"] == "–"


def test_numbers_that_are_not_finite_are_dashes(copy):
    file = copy / NAMES[2] / "result.json"
    lost = {"accuracy": None, "loss": math.nan, "step_time_ms": math.nan}
    file.write_text(json.dumps(json.loads(file.read_text()) | lost))
    metrics = read_csv(copy / NAMES[2] / "metrics.csv")
    with (copy / NAMES[2] / "metrics.csv").open("w", newline="") as metrics_file:
        writer = csv.DictWriter(metrics_file, list(metrics[0]))
        writer.writeheader()
        writer.writerows(row | {"val/loss": "nan"} for row in metrics)
    page = Page(copy / NAMES[2])
    assert not re.search(r"\b(nan|inf|None|null)\b", page.text, re.IGNORECASE)
    assert dict(page.tables["Result"])["accuracy on the test split"] == "–"


def test_text_from_outside_stays_text_without_control_characters(copy):
    """Names of runs, layers and studies, texts of a study and of a configuration may be anything."""
    run = (copy / NAMES[2]).rename(copy / "<b>$x$")
    definition = yaml.safe_load((copy / "study.yaml").read_text())
    definition["runs"] = {"<b>$x$" if name == NAMES[2] else name: axes for name, axes in definition["runs"].items()}
    (copy / "study.yaml").write_text(yaml.safe_dump({**definition, "question": EVIL, "notes": "a\x1b[2J\nb"}))
    with (run / "config.yaml").open("a") as file:
        file.write(f"# {EVIL}\n")
    history = (run / "strides.csv").read_text()
    (run / "strides.csv").write_text(re.sub(r"^(\d+),\w+", rf"\1,{EVIL}", history, flags=re.MULTILINE))
    page = Page(copy)
    assert page.text.count(EVIL) >= 3
    assert f"# {EVIL}\n" in "".join(page.config)
    assert "<b>$x$" in page.text
    assert "a\\x1b[2J b" in page.text
