"""Wrong input to the scripts under benchmarks/: one line that names the cure, status 2, nothing written."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from wrong import content, without_bars

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULT = {"accuracy": 1.0, "macs": 1, "resampling_macs": 0, "strides": {}, "strides_initial": {}, "step_time_ms": 1.0}


def study(name, axes, data="diffstride.data.PlantedBands", result=RESULT):
    """The folder of a study with one run."""
    run = Path(name, "run")
    run.mkdir(parents=True)
    Path(name, "study.yaml").write_text(yaml.safe_dump({"runs": {"run": axes}}))
    (run / "config.yaml").write_text(
        yaml.safe_dump({
            "data": {"class_path": data, "init_args": {}},
            "model": {"network": {"init_args": {"downsample_options": {"smoothness": 4.0}}}},
        })
    )  # fmt: skip
    if result:
        (run / "result.json").write_text(json.dumps(result))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with studies, pictures and files that are nothing."""
    monkeypatch.chdir(tmp_path)
    study("bands", {"strides": [[2, 2]]})
    study("images", {"strides": [[2, 2]]}, "diffstride.data.ImageData")
    study("open", {"strides": [[2, 2]]}, result=None)
    study("seeds", {"seed": 0})
    study("explored", {"strides": [[6, 6]], "band": "8x10", "exploration": "none"})
    for name, config in {"broken": ": [", "nothing": ""}.items():
        study(name, {"strides": [[2, 2]]})
        Path(name, "run", "config.yaml").write_text(config)
    study("damaged", {"strides": [[2, 2]]})
    Path("damaged/run/strides.csv").write_text("step,x\n1,2\n")
    study("torn", {"strides": [[2, 2]]}, result={"accuracy": 1.0})
    Image.new("RGB", (8, 8)).save("black.png")
    Image.new("RGB", (8, 8), "red").save("image.png")
    Path("taken.png").mkdir()
    for folder in "train/a", "train/b", "test/a", "test/b":
        Path("set", folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(f"set/{folder}/0.png")
    Path("folder").mkdir()
    Path("text").write_text("hello")
    Path("page.md").write_text("<!-- bench:layers -->\n<!-- /bench -->\n")
    Path("other.json").write_text("{}")
    Path("list.json").write_text("[]")
    return tmp_path


def of_report(script):
    """Cases of a script that writes a report to --out."""
    return [
        (script, r"the following arguments are required: --out"),
        (f"{script} --out", r"argument --out: expected one argument"),
        (f"{script} --out none/x.json", r"argument --out: there is no folder none: make it, or give another path"),
        (f"{script} --out text/x.json", r"argument --out: there is no folder text: make it, or give another path"),
        (f"{script} --out folder", r"argument --out: folder is a folder: give the path of a file"),
        (f"{script} --out ''", r"argument --out: path must be the name of a file, got ''"),
        (f"{script} --out x.json extra", r"unrecognized arguments: extra"),
        (f"{script} --out x.json --nothing 1", r"unrecognized arguments: --nothing 1"),
    ]


def of_device(script):
    return [
        (f"{script} --out x.json --device abacus", r"argument --device: device must be .* here, got 'abacus'"),
        (f"{script} --out x.json --device cuda:99", r"argument --device: device must be .* here, got 'cuda:99'"),
    ]


def of_count(script, option, least):
    return [
        (
            f"{script} --out x.json {option} {least - 1}",
            rf"{option}: must be a whole number >= {least}, got {least - 1}",
        ),
        (f"{script} --out x.json {option} 2.5", rf"{option}: must be a whole number >= {least}, got 2\.5"),
        (f"{script} --out x.json {option} many", rf"{option}: must be a whole number >= {least}, got many"),
    ]


def of_study(script, of):
    """Cases of a script that draws from a study of planted bands, with a run of the folder `of`."""
    return [
        (script, r"the following arguments are required: study, out"),
        (f"{script} nowhere it", r"nowhere is not the folder of a study: study\.yaml cannot be read"),
        (f"{script} folder it", r"folder is not the folder of a study: study\.yaml cannot be read"),
        (f"{script} text it", r"text is not the folder of a study: study\.yaml cannot be read"),
        (f"{script} open it", r"open must be a study with runs that are done, got none"),
        (f"{script} seeds it", r"seeds must be a study that varies .*strides, got none for "),
        (f"{script} torn it", r"torn/run/result\.json is not the result of a run \(it must have macs\)"),
        (f"{script} {of} none/it", r"argument out: there is no folder none: make it, or give another path"),
        (f"{script} {of} it it", r"unrecognized arguments: it"),
        (f"{script} {of} taken", r"argument out: taken\.png is a folder: give the path of a file"),
    ]


CASES = [
    *of_report("convert_models"),
    *of_report("time_compile"), *of_device("time_compile"), *of_count("time_compile", "--repeats", 2),
    *of_report("time_exploration"), *of_count("time_exploration", "--rounds", 1),
    *of_report("time_steps"), *of_device("time_steps"), *of_count("time_steps", "--repeats", 2),
    ("time_steps --out x.json --cases cifar", r"argument --cases: invalid choice: 'cifar' \(choose from .*imagenet"),
    *of_report("train_precisions"), *of_device("train_precisions"), *of_count("train_precisions", "--seeds", 2),
    *of_study("draw_planted_bands", "bands"),
    ("draw_planted_bands images it", r"images/run/config\.yaml must .* on PlantedBands: its data are .*ImageData"),
    ("draw_planted_bands bands it", r"bands must have runs with a strides\.csv, got none"),
    ("draw_planted_bands broken it", r"broken/run/config\.yaml must describe a run on PlantedBands: while parsing"),
    ("draw_planted_bands nothing it", r"nothing/run/config\.yaml must describe a run on PlantedBands: 'NoneType'"),
    ("draw_planted_bands damaged it", r"damaged/run/strides\.csv is damaged"),
    *of_study("draw_exploration", "explored"),
    ("draw_exploration bands it", r"bands must be a study that varies exploration, band, strides, got none for "),
    ("draw_exploration explored it", r"explored must have runs with the exploration Jitter 0\.15, got none that is done"),
    ("draw_layer", r"the following arguments are required: image, out"),
    ("draw_layer none.png it", r"No such file or directory: 'none\.png'"),
    ("draw_layer text it", r"cannot identify image file"),
    ("draw_layer black.png it", r"spectrum must have amplitudes above 0"),
    ("draw_layer image.png none/it", r"argument out: there is no folder none: make it"),
    ("draw_layer image.png it --strides 0.5 2", r"stride must be >= 1, got 0\.5, 2"),
    ("draw_layer image.png it --strides 2", r"argument --strides: expected 2 arguments"),
    ("draw_layer image.png it --strides two 2", r"argument --strides: invalid float value: 'two'"),
    ("draw_layer image.png it --smoothness 0", r"smoothness must be > 0 and finite"),
    ("draw_layer set it --index 7", r"--index must be < 2, the test images of set, got 7"),
    ("draw_layer set it --index -1", r"argument --index: must be a whole number >= 0, got -1"),
    ("draw_layer folder it", r"folder has no images"),
    ("write_performance", r"the following arguments are required: results, page"),
    ("write_performance none.json page.md", r"No such file or directory: 'none\.json'"),
    ("write_performance other.json none.md", r"No such file or directory: 'none\.md'"),
    ("write_performance text page.md", r"text is not what `diffstride bench --out` writes: Expecting value"),
    ("write_performance other.json page.md", r"other\.json is not what `diffstride bench --out` writes: it has no rows"),
    ("write_performance list.json page.md", r"list\.json is not what `diffstride bench --out` writes: it has no rows"),
    ("write_performance folder page.md", r"Is a directory: 'folder'"),
]  # fmt: skip


def test_every_script_has_cases():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"command_line"}
    for script in scripts:
        assert len({answer for line, answer in CASES if line.split()[0] == script}) >= 5, f"{script} needs cases"
    assert {line.split()[0] for line, _ in CASES} == scripts


@pytest.mark.parametrize(("line", "answer"), CASES, ids=[line for line, _ in CASES])
def test_one_line_names_the_cure_and_nothing_is_written(line, answer, here, monkeypatch, capsys):
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(here.parent / "cache"))
    before = content(here)
    script, *arguments = shlex.split(line)
    path = str(BENCHMARKS / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(path, run_name="__main__")
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    error = without_bars(said.err)
    assert error.count("\n") == 1
    assert error.startswith(f"{script}.py: error: ")
    assert re.search(answer, error), error
    assert content(here) == before
