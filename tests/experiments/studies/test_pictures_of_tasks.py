"""Figures of studies of several tasks."""

import json
import statistics

import pytest
import torch
import yaml

from diffstride.experiments.studies.pictures import FIGURES
from diffstride.experiments.studies.results import read_study
from diffstride.experiments.training.fit import train
from diffstride.experiments.training.runs import build_data, load_run
from diffstride.nn import learnable_layers
from tests.helpers.studies import AXES, TASKS, accuracy, task_rows


def figure(folder, name):
    return FIGURES[name](folder, [row for row in read_study(folder)[1] if row.result is not None])


@pytest.fixture
def study(tmp_path):
    """Make the folder of a study with these runs; three of a single task are not done."""
    found = list(task_rows())
    content = {"runs": {row.name: row.axes for row in found}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for row in found:
        (tmp_path / row.name).mkdir()
        if row.axes.get("task") != TASKS[0] or row.axes["method"] != "conv":
            (tmp_path / row.name / "result.json").write_text(json.dumps(row.result))
    return tmp_path


def test_bars_of_accuracy_are_by_setting_method_and_task(study):
    made = figure(study, "accuracies")
    single, multi = made.axes
    assert (single.get_title(), multi.get_title()) == ("single-task", "multi-task")
    bars = {c.get_label(): [bar.get_height() for bar in c] for c in multi.containers if hasattr(c, "patches")}
    for name, method in (("strided convolution", "conv"), ("DiffStride", "diffstride")):
        each = [100 * accuracy("multi", task, method, 1) for task in TASKS]
        assert bars[name] == pytest.approx([*each, statistics.fmean(each)])
    assert [label.get_text() for label in multi.get_xticklabels()] == [*TASKS, "mean"]
    assert [label.get_text() for label in single.get_xticklabels()] == [*TASKS, "mean"]
    # The scale begins below all bars, and the title says where.
    bottom = single.get_ylim()[0]
    assert bottom < min(min(heights) for heights in bars.values())
    assert f"begins at {bottom:.0f} %" in made.get_suptitle()


def test_what_these_figures_need_is_said_where_it_is_missing(study):
    for run in study.glob("*-*"):
        (run / "result.json").unlink(missing_ok=True)
    assert {name: figure(study, name) for name in ("accuracies", "spectrogram")} == {
        "accuracies": "no run with a task is done",
        "spectrogram": "no run with learned strides on spectrograms is done",
    }


def test_the_spectrogram_shows_what_the_first_layer_does(tmp_path):
    data = {"class_path": "SyntheticSounds", "init_args": {
        "train_samples": 64, "test_samples": 8, "batch_size": 16, "features": {"bands": 16}}}  # fmt: skip
    network = {"class_path": "AudioCNN", "init_args": {"num_classes": 5, "width": 1 / 32}}
    run = train([
        "--data", json.dumps(data), "--model.network", json.dumps(network), "--runs", str(tmp_path), "--name", "run",
        "--trainer.max_steps", "3", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu",
        "--model.stride_lr", "3",
    ]).run_folder  # fmt: skip
    kept = {"runs": {"run": {"seed": 0}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(kept))
    made = figure(tmp_path, "spectrogram")
    panels = made.axes
    images = [torch.as_tensor(panel.get_images()[0].get_array().data).T for panel in panels]
    net, config = load_run(run)
    built = build_data(config["data"])
    sound, _ = built.prepare_batch((built.test_set[0][:1], built.test_set[1][:1]))
    (_, layer), *_ = learnable_layers(net)
    torch.testing.assert_close(images[0], sound[0, 0])
    with torch.no_grad():
        torch.testing.assert_close(images[1], layer(sound)[0, 0])
        block = net.blocks[0]
        torch.testing.assert_close(images[3], layer(images[2][None, None])[0, 0], rtol=1e-4, atol=1e-5)
        before = block.frequency(block.norm(block.time(sound).relu()))
        assert any(torch.allclose(images[2], channel, atol=1e-5) for channel in before[0])
    assert [panel.get_xlabel() for panel in panels] == ["time (s)"] * 4
    assert panels[0].get_images()[0].get_extent() == [0, pytest.approx(0.25), 0, 16]
    result = json.loads((run / "result.json").read_text())
    assert result["axes"] == AXES
    rate = 1 / (2 * result["strides"]["blocks.0.down"][0] * 0.01)
    assert result["cutoffs"]["exact"]["blocks.0.down"][0] == pytest.approx(rate)
