"""`diffstride report`: what is on the page, read by Python's parser and seen by a real browser."""

import csv
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from diffstride.experiments.commands.main import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
VOID = {"meta", "line", "br"}  # of those that the template has
STUDY = {
    "question": "Is 1 < 2 & 3?",
    "notes": "Too small.",
    "base": str(Path(__file__).parents[3] / "configs" / "demo.yaml"),
    "settings": {
        "data.train_samples": 96, "data.test_samples": 32, "data.batch_size": 32, "model.network.width": 4,
        "model.milestones": [3, 4, 5], "trainer.max_steps": 6,
    },
    "axes": {"method": ["conv", "diffstride"], "strides": [[[3, 3]]], "seed": [0, 1]},
    "tables": [{"rows": "strides", "columns": "method"}],
    "latency": 2,
}  # fmt: skip
NAMES = ["conv-3x3-seed0", "conv-3x3-seed1", "diffstride-3x3-seed0", "diffstride-3x3-seed1"]


class Page(HTMLParser):
    """A page taken apart: its tables, its figures, what it says, what it would load, what is not closed."""

    def __init__(self, file):
        super().__init__()
        self.open, self.ids, self.resources, self.links = [], [], [], []
        self.tables, self.figures, self.texts, self.configurations = {}, [], [], []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.row = []
        if tag in ("td", "th"):
            self.row.append("")
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if tag == "a" else []
        self.resources += [attributes[name] for name in ("src", "srcset", "data", "action") if name in attributes]
        self.resources += [attributes["href"]] if tag != "a" and "href" in attributes else []

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr":
            self.table.append(self.row)

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            if data.lstrip().startswith("{"):
                self.figures.append(json.loads(data, parse_constant=pytest.fail))
        elif inside == "pre":
            self.configurations.append(data)
        elif inside != "style":
            self.texts.append(data)
        if "caption" in self.open:
            self.table = self.tables.setdefault(data, [])
        elif "tr" in self.open and self.open[-1] != "tr":
            self.row[-1] += data

    def traces(self, y):
        """The lines of the figures that have this along their upright axis, by name."""
        return {
            trace["name"]: trace
            for figure in self.figures
            if figure["layout"]["yaxis"].get("title", {}).get("text") == y
            for trace in figure["data"]
        }


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A little study that has been done, kept as it is: tests change copies."""
    folder = tmp_path_factory.mktemp("report")
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    assert main(["study", str(file), "--runs", str(folder)]) == 0
    return folder / "tiny"


@pytest.fixture
def copy(study, tmp_path):
    return shutil.copytree(study, tmp_path / "tiny")


def page_of(folder, *arguments):
    assert main(["report", str(folder), *map(str, arguments)]) == 0
    return Page(arguments[-1] if arguments else folder / "report.html")


def read_csv(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_a_runs_page_says_what_its_folder_holds(copy, capsys):
    folder = copy / NAMES[2]
    page = page_of(folder)
    assert f"{folder / 'report.html'}: " in capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    assert page.resources == []
    assert "Is 1 < 2 & 3?" in page.text
    assert "with DiffStride, trained on PlantedBands for 6 steps (2 epochs)." in page.text
    assert f"Accuracy {100 * result['accuracy']:.2f} % on the test split" in page.text
    assert f"Parameters {result['parameters']:,}" in page.text
    assert f"MACs an image {(result['macs'] + result['resampling_macs']) / 1e6:.3g} M" in page.text

    history = read_csv(folder / "strides.csv")
    lines = page.tables["Strides"]
    assert lines[0][-1] == "cut-off, cycles per pixel"
    (strides,) = result["strides"].values()
    for line, axis, stride in zip(lines[1:], ("height", "width"), strides, strict=True):
        sizes = [row["size"] for row in history if row["axis"] == axis]
        # The layer sees maps sampled as the input is: what it keeps ends at 1 / (2 S).
        assert line[1:] == [axis, "3", f"{stride:.4g}", sizes[0], sizes[-1], f"{1 / (2 * stride):.3g}"]

    cost = {line[0]: line[1:] for line in page.tables["Cost"]}
    assert cost["cost of strides, Eq. 6"] == [f"{1 / 9:.4g}", f"{1 / math.prod(strides):.4g}"]
    assert cost["million MACs an image, resampling"][1] == f"{result['resampling_macs'] / 1e6:.4g}"
    provenance = dict(page.tables["Provenance"])
    assert provenance["data fingerprint"] == result["data_fingerprint"]
    assert provenance["torch"] == result["versions"]["torch"]
    assert page.configurations == [(folder / "config.yaml").read_text()]


def test_the_figures_of_a_run_are_drawn_from_its_files(copy):
    folder = copy / NAMES[2]
    page = page_of(folder)
    history = read_csv(folder / "strides.csv")
    for axis in ("height", "width"):
        drawn = page.traces("stride")[f"{history[0]['layer']}, {axis}"]
        expected = {int(r["step"]): float(r["stride"]) for r in history if r["axis"] == axis}
        assert dict(zip(drawn["x"], drawn["y"], strict=True)) == pytest.approx(expected, rel=1e-4)
    logged = {int(r["step"]) + 1: r["val/accuracy"] for r in read_csv(folder / "metrics.csv")}
    expected = {step: 100 * float(accuracy) for step, accuracy in logged.items() if accuracy}
    drawn = page.traces("accuracy in %")["test"]
    assert dict(zip(drawn["x"], drawn["y"], strict=True)) == pytest.approx(expected, rel=1e-4)
    windows = page.traces("relative amplitude")
    for name in ("initial window", "learned window"):
        assert windows[name]["y"][0] == 1
        assert windows[name]["y"] == sorted(windows[name]["y"], reverse=True)
    assert max(windows["spectrum"]["y"][1:]) == 1
    sizes = {name: trace["y"] for name, trace in page.traces("samples").items() if "strides" in name}
    of_width = [int(r["size"]) for r in history if r["axis"] == "width"]
    assert sizes == {"initial strides": [32, of_width[0]], "learned strides": [32, of_width[-1]]}


def test_a_studys_page_has_its_tables_and_its_runs(copy):
    page = page_of(copy)
    assert page.resources == []
    assert "4 runs: 4 done." in page.text
    assert "Too small." in page.text
    in_markdown = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in (copy / "table.md").read_text().splitlines()
        if line.startswith("|") and "---" not in line
    ]
    titles = [title for title in page.tables if "Accuracy" in title or title == "All runs"]
    assert [line for title in titles for line in page.tables[title]] == in_markdown

    runs = {line[0]: dict(zip(page.tables["Runs"][0], line, strict=True)) for line in page.tables["Runs"][1:]}
    assert list(runs) == NAMES
    for name, line in runs.items():
        result = json.loads((copy / name / "result.json").read_text())
        strides = ["×".join(f"{s:.2f}" for s in layer) for layer in result["strides"].values()]
        assert line["accuracy in %"] == f"{100 * result['accuracy']:.2f}"
        assert (line["learned strides"], line["seed"]) == (strides[0] if strides else "–", name[-1])
    assert page.links == [f"#{place}" for place in page.ids]
    assert len(page.ids) == 4

    accuracies = [json.loads((copy / name / "result.json").read_text())["accuracy"] for name in NAMES[2:]]
    frozen = json.loads((copy / "latency.json").read_text())["latency"]["diffstride 3x3"]["ms"]
    against_macs, against_time = (figure["data"][1] for figure in page.figures[:2])
    assert against_macs["y"] == pytest.approx([50 * sum(accuracies)])
    assert against_time["x"] == [frozen]
    for words in ("diffstride 3x3", f"{50 * sum(accuracies):.1f} ± ", "2 seeds", f"{frozen:.3g} ms a batch"):
        assert words in against_macs["text"][0]
    factors = next(f["data"] for f in page.figures if f["layout"]["yaxis"].get("autorange") == "reversed")
    strides = [json.loads((copy / name / "result.json").read_text())["strides"] for name in NAMES[2:]]
    assert factors[0]["x"] == [9, 9]
    assert factors[2]["x"] == pytest.approx([math.prod(*s.values()) for s in strides])


def test_a_study_that_is_not_done(copy):
    (copy / NAMES[0] / "result.json").rename(copy / NAMES[0] / "failed.json")
    (copy / NAMES[0] / "failed.json").write_text(json.dumps({"error": "step 3: the loss is lost"}))
    (copy / NAMES[2] / "result.json").unlink()
    shutil.rmtree(copy / NAMES[3])
    page = page_of(copy)
    assert "4 runs: 1 done, 1 failed, 1 unfinished, 1 open." in page.text
    assert f"{NAMES[0]} failed: step 3: the loss is lost." in page.text
    assert "This run failed: step 3: the loss is lost. The page shows what it left." in page.text
    assert "This run has not ended: it has logged up to step 6. The page shows what there is." in page.text
    states = {line[0]: (line[4], line[5]) for line in page.tables["Runs"][1:]}
    assert states[NAMES[3]] == ("open", "–")
    assert len(page.ids) == 3
    going = page_of(copy / NAMES[2])
    assert [line[2] for line in going.tables["Strides"][1:]] == ["3", "3"]
    assert {"stride", "samples", "relative amplitude"} <= {f["layout"]["yaxis"]["title"]["text"] for f in going.figures}


def test_a_run_that_learns_no_strides_says_so(copy):
    page = page_of(copy / NAMES[0])
    assert "This run has no learned strides: its downsampling is fixed." in page.text
    assert "Strides" not in page.tables
    assert page.traces("loss")
    assert not page.traces("stride")


def test_what_is_lost_is_left_out_with_a_word(copy):
    (copy / NAMES[2] / "checkpoints" / "last.ckpt").unlink()
    page = page_of(copy / NAMES[2])
    assert re.search(r"The learned windows, .* are left out: there is no checkpoint .*last\.ckpt", page.text)
    assert page.traces("stride")
    assert not page.traces("relative amplitude")
    assert [line[-1] for line in page.tables["Strides"][1:]] == ["–", "–"]

    config = copy / NAMES[3] / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["data"] = {"class_path": "diffstride.experiments.data.ImageData", "init_args": {"path": "/nowhere/photos"}}
    config.write_text(yaml.safe_dump(content))
    page = page_of(copy / NAMES[3])
    assert re.search(r"are left out: the run's data cannot be loaded \(.*/nowhere/photos", page.text)
    assert "trained on photos" in page.text


def test_what_is_no_number_is_a_dash(copy):
    result = json.loads((copy / NAMES[2] / "result.json").read_text())
    lost = {"accuracy": None, "loss": math.nan, "step_time_ms": math.nan, "macs": math.inf}
    (copy / NAMES[2] / "result.json").write_text(json.dumps(result | lost))
    metrics = read_csv(copy / NAMES[2] / "metrics.csv")
    for row in metrics:
        row["train/loss"] = "nan"
    with (copy / NAMES[2] / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(metrics[0]))
        writer.writeheader()
        writer.writerows(metrics)
    with (copy / NAMES[2] / "strides.csv").open("a") as file:
        file.write("7,down,height,nan,11\n")
    for page in page_of(copy / NAMES[2]), page_of(copy):
        assert not re.search(r"\b(nan|inf|None|null)\b", page.text, re.IGNORECASE)
        assert "Accuracy – on the test split" in page.text
        assert "Time of a step – median" in page.text


def test_hostile_names_stay_text(copy):
    evil = "<img src=x onerror=alert(1)>"
    run = (copy / NAMES[2]).rename(copy / evil)
    definition = yaml.safe_load((copy / "study.yaml").read_text())
    definition["runs"][evil] = definition["runs"].pop(NAMES[2])
    definition["question"] = "</p><script>alert(2)</script>"
    (copy / "study.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "# </pre></script><script>alert(3)</script>\n")
    history = (run / "strides.csv").read_text()
    (run / "strides.csv").write_text(re.sub(r"^(\d+),\w+", r"\1,</script><b>layer</b>", history, flags=re.MULTILINE))
    page = page_of(copy)
    assert page.resources == []
    assert evil in page.text
    assert "</p><script>alert(2)</script>" in page.text
    assert any("# </pre></script><script>alert(3)</script>" in text for text in page.configurations)
    assert "</script><b>layer</b>, height" in page.text
    names = {trace["name"] for figure in page.figures for trace in figure["data"]}
    assert "&lt;/script&gt;&lt;b&gt;layer&lt;/b&gt;, height" in names  # plotly reads some tags as markup


def test_mistakes_are_one_line(copy, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([tmp_path / "none"], f"there is no folder {tmp_path / 'none'}: give one that"),
        ([tmp_path / "empty"], "is not the folder of a run or of a study: give one that `diffstride fit` or"),
        ([copy, "--out", tmp_path / "page.txt"], "--out must end in .html, got"),
        ([copy, "--out", tmp_path / "none" / "page.html"], f"there is no folder {tmp_path / 'none'}: make it, or"),
        ([], "required: RUN_OR_STUDY"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    (copy / "study.yaml").write_text("runs: [")
    assert main(["report", str(copy)]) == 2
    assert "study.yaml cannot be read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def opened(study, tmp_path_factory):
    """Opens a page of the study, or of a run of it, in a browser without a network."""
    if BROWSER is None:
        pytest.skip("no browser is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    folder = tmp_path_factory.mktemp("pages")
    files = {name: folder / f"{name or 'study'}.html" for name in ("", NAMES[2])}
    for name, file in files.items():
        assert main(["report", str(study / name), "--out", str(file)]) == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=SWITCHES)

        def load(name, **options):
            page = browser.new_context(offline=True, **options).new_page()
            page.problems = []
            page.on("console", lambda message: page.problems.append(message.text))
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            page.on("request", lambda it: page.problems.extend([it.url] if it.url.startswith("http") else []))
            page.goto(files[name].as_uri())
            return page

        yield load
        browser.close()


@pytest.mark.parametrize("name", ["", NAMES[2]])
def test_every_figure_is_drawn_and_nothing_sticks_out(opened, name):
    page = opened(name, viewport={"width": 1600, "height": 900})
    if not name:
        page.click(f"text={NAMES[2]} >> nth=0")  # in the table: leads to the run's report, and unfolds it
        assert page.locator("details.run[open] > summary").inner_text() == NAMES[2]
    plots = page.locator(".plot:visible")
    count = plots.count()
    assert count == page.locator("main" if name else "main > figure, details[open]").locator(".plot").count() >= 8
    for i in range(count):
        plots.nth(i).locator(".trace path").first.wait_for(state="attached")
    for width in (1600, 400):
        page.set_viewport_size({"width": width, "height": 900})
        for i in range(count):
            fits = "([plot, width]) => plot.querySelector('.main-svg').getBoundingClientRect().right <= width"
            page.wait_for_function(fits, arg=[plots.nth(i).element_handle(), width])
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.problems == []


def test_a_hover_shows_values_and_the_legend_hides_lines(opened):
    page = opened("", viewport={"width": 1600, "height": 900}, color_scheme="dark")
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    plot.locator(".trace .point").last.hover(force=True)
    label = plot.locator(".hoverlayer text").first
    label.wait_for()
    assert re.search(r"diffstride 3x3.*accuracy \d+\.\d.*million MACs.*2 seeds", label.text_content())
    fills = [part.evaluate("part => getComputedStyle(part).fill") for part in (label, plot.locator(".hoverlayer path"))]
    ink, card = (list(map(int, re.findall(r"\d+", fill))) for fill in fills)
    assert min(ink) > 200 > 100 > max(card)  # light on dark
    points = plot.locator(".trace .point")
    before = points.count()
    page.locator(".legend button", has_text="DiffStride").first.click()
    assert points.count() == before - 1
    buttons = plot.locator(".modebar-btn").evaluate_all("buttons => buttons.map(button => button.dataset.title)")
    assert "Zoom" in buttons
    assert not [title for title in buttons if re.search("share|cloud|edit", title, re.IGNORECASE)]
    assert page.problems == []


TORN = {
    "between the rows of a step": lambda lines: lines[:-1],
    "within a row": lambda lines: [*lines[:-1], lines[-1][:-3]],
    "in the first step": lambda lines: lines[:2],
    "in the header": lambda lines: [lines[0][:4]],
    "a step of other axes": lambda lines: [*lines, "7,down,depth,2,3\r\n"],
    "more axes than there are": lambda lines: [*lines[:3], "0,down,a,2,3\r\n", "0,down,b,2,3\r\n", *lines[3:]],
    "no step": lambda lines: [*lines, "²,down,width,2,3\r\n", f"{'9' * 5000},,,,\r\n"],
    "no size": lambda lines: [*lines, "7,down,height,2,3\r\n", f"7,down,width,2,{'9' * 400}\r\n"],
}  # fmt: skip


@pytest.mark.parametrize("result", [True, False], ids=["done", "going on"])
@pytest.mark.parametrize("cut", TORN.values(), ids=TORN)
def test_strides_that_are_just_being_written(cut, result, copy):
    """Steps are shown where they are complete."""
    folder = copy / NAMES[2]
    file = folder / "strides.csv"
    lines = file.read_bytes().decode().splitlines(keepends=True)
    file.write_bytes("".join(cut(lines)).encode())
    if not result:
        (folder / "result.json").unlink()
    shown = [trace["x"] for trace in page_of(folder).traces("stride").values()]
    assert len({tuple(steps) for steps in shown}) <= 1
    assert all(steps[0] == 0 and steps[-1] <= 6 for steps in shown)
    page_of(copy)


@pytest.mark.parametrize("ndim", [1, 3])
def test_a_result_of_another_network(ndim, copy):
    file = copy / NAMES[2] / "result.json"
    result = json.loads(file.read_text())
    strides = {"down": [2.0] * ndim}
    file.write_text(json.dumps(result | {"strides": strides, "strides_initial": strides, "cutoffs": None}))
    page = page_of(copy / NAMES[2])
    assert [line[3] for line in page.tables["Strides"][1:]] == ["2"] * ndim
    page_of(copy)


def test_text_of_a_study_is_shown_without_control_characters(copy):
    study = yaml.safe_load((copy / "study.yaml").read_text())
    text = {"question": "\x1b[2J<b>?", "notes": "one\ntwo \u202e\x07", "name": "\x9b"}
    (copy / "study.yaml").write_text(yaml.safe_dump(study | text))
    page = page_of(copy)
    assert "\\x1b[2J<b>?" in page.text
    assert all(text.replace("\n", "").isprintable() for text in page.texts)


def test_the_name_of_a_folder_may_have_bytes_that_are_not_utf_8(copy, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff<b>"))
    shutil.copytree(copy / NAMES[2], folder)
    page = page_of(folder, "--out", tmp_path / "page.html")
    assert "\\udcff<b>" in page.text
