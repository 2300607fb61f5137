"""The examples run, and what they claim is true."""

import json
import re
import runpy
import warnings
from pathlib import Path

import pytest

import diffstride as ds

EXAMPLES = Path(__file__).parents[2] / "examples"
long = pytest.mark.long


def main_of(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@long
def test_the_layer_learns_in_a_loop_of_its_own(capsys):
    accuracy = main_of("01_layer")()
    height, width = map(float, re.findall(r"strides \[\[([\d.]+), ([\d.]+)\]", capsys.readouterr().out)[-1])
    assert accuracy > 0.95
    assert height > width + 0.2  # nothing along the height matters


@long
def test_a_lightning_module_learns_its_strides():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice of Lightning's about workers and logging
        module = main_of("02_lightning")()
    ((height, width),) = ds.strides(module).values()
    assert height > 2.2
    assert width > 2.2


@long
def test_a_trainer_of_transformers_learns_saves_and_loads_strides():
    model = main_of("03_transformers")(steps=2)
    assert any(stride != 2.0 for strides in ds.strides(model).values() for stride in strides)


@long
def test_a_budget_holds_the_cost():
    assert main_of("04_budget")() == pytest.approx(0.7, abs=0.07)


@long
def test_an_exported_network_computes_the_same_in_onnxruntime():
    assert main_of("05_onnx")() < 1e-5


@long
def test_inserted_strides_make_a_trained_network_cheaper():
    before, inserted, after, kept = main_of("07_insert")()
    assert before > 0.9
    assert inserted == pytest.approx(before, abs=0.03)  # on other images
    assert after > before - 0.03
    assert kept == pytest.approx(0.4, abs=0.03)


@long
def test_a_stride_on_waveforms_stops_above_the_highest_tone():
    accuracy, cutoff = main_of("06_audio")()
    ramp = 4000 / 64  # in Hz, above the edge of the window
    assert accuracy > 0.95
    assert 500 < cutoff + ramp < 1000  # the tones are kept, the hiss is cut off


@long
def test_the_cells_of_the_notebook_run(monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", plt.close)
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "learned_strides.ipynb").read_text())["cells"]
    names = {}
    with plt.rc_context():
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), "learned_strides.ipynb", "exec"), names)
    assert names["accuracy"] > 0.95
    height, width = names["history"][-1]
    assert height > width + 1


def test_examples_are_short_and_tested():
    tested = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in tested
        assert len(path.read_text().splitlines()) <= 66
