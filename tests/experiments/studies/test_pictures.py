"""Pictures of a study show what its runs have left, and name what cannot be drawn."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import yaml

from diffstride.experiments.history import StrideRow, append_rows, read_dicts, read_rows
from diffstride.experiments.studies import pictures
from diffstride.experiments.studies.pictures import (
    FIGURES,
    draw,
    run_resolutions,
    run_strides,
    run_training,
    run_windows,
)
from diffstride.experiments.studies.probes import input_windows, sample_inputs
from diffstride.experiments.studies.results import read_study
from diffstride.experiments.training.fit import train
from diffstride.experiments.training.runs import build_data, load
from diffstride.nn import learnable_layers
from tests.helpers.figures import inside
from tests.helpers.studies import AXES, TASKS, accuracy, task_rows

CONFIG = Path(__file__).parents[3] / "configs" / "demo.yaml"
OF_SOUNDS = {"accuracies", "spectrogram"}
STARTS = {"2-2": ([2, 2], 2.0), "3-1": ([3, 1], 3.0)}


def figure(folder, name):
    return FIGURES[name](folder, [row for row in read_study(folder)[1] if row.result is not None])


def learned(start, seed):
    return {"a": [start - 0.1 * seed, start + 0.5], "b": [1.0 + seed, 1.25]}


@pytest.fixture
def study(tmp_path):
    """Results of two methods from two starts and two seeds, one run failed; no networks."""
    runs = {
        f"{method}-{name}-seed{seed}": {"method": method, "strides": strides, "seed": seed}
        for method in ("conv", "diffstride") for name, (strides, _) in STARTS.items() for seed in (0, 1)
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"name": "s", "runs": runs}, sort_keys=False))
    for i, (name, axes) in enumerate(runs.items()):
        (tmp_path / name).mkdir()
        if name == "conv-3-1-seed1":
            (tmp_path / name / "failed.json").write_text('{"error": "lost"}')
            continue
        result = {"accuracy": 0.5 + i / 100, "macs": (1 + i) * 1e6, "resampling_macs": 5e5}
        result |= {"strides": {}, "strides_initial": {}}
        if axes["method"] == "diffstride":
            start = STARTS[name.removeprefix("diffstride-")[:3]][1]
            ends = learned(start, axes["seed"])
            result |= {"strides": ends, "strides_initial": {"a": [start, start], "b": [1.0, 1.0]}}
            rows = [StrideRow(s, layer, axis, 1.0 if s == 0 else ends[layer][k], 9)
                    for s in (0, 10) for layer in ends for k, axis in enumerate(("height", "width"))]  # fmt: skip
            append_rows(tmp_path / name / "strides.csv", rows)
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    return tmp_path


def labels(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_trajectories(study):
    made = figure(study, "trajectories")
    assert labels(made) == ["2-2", "3-1"]
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in made.axes[0].get_lines()]
    assert looks[0] == looks[1]
    assert all(a != b for a, b in zip(looks[0], looks[2], strict=True))
    assert inside(made)
    drawn = {panel.get_title(): [round(line.get_ydata()[-1], 6) for line in panel.get_lines()] for panel in made.axes}
    assert drawn == {
        "a, height": [2.0, 1.9, 3.0, 2.9], "a, width": [2.5, 2.5, 3.5, 3.5],
        "b, height": [1.0, 2.0, 1.0, 2.0], "b, width": [1.25] * 4,
    }  # fmt: skip


def test_strides(study):
    made = figure(study, "strides")
    height, width = made.axes
    moves = [sorted(tuple(line.get_ydata()) for line in panel.get_lines() if line.get_alpha() == 0.6) for panel in
             (height, width)]  # fmt: skip
    assert moves[0] == [(1.0, 1.0)] * 2 + [(1.0, 2.0)] * 2 + [(2.0, 1.9), (2.0, 2.0), (3.0, 2.9), (3.0, 3.0)]
    assert moves[1] == [(1.0, 1.25)] * 4 + [(2.0, 2.5)] * 2 + [(3.0, 3.5)] * 2
    assert labels(made) == ["2-2", "3-1"]


def test_pareto(study):
    (axes,) = figure(study, "pareto").axes
    conv, diffstride = axes.containers
    assert (conv.get_label(), diffstride.get_label()) == ("strided convolution", "DiffStride")
    # Runs 0 and 1, then 2 alone, for the fourth one failed; resampling counts.
    assert conv.lines[0].get_xydata().tolist() == [pytest.approx((2.0, 50.5)), pytest.approx((3.5, 52.0))]
    assert diffstride.lines[0].get_xydata().tolist() == [pytest.approx((6.0, 54.5)), pytest.approx((8.0, 56.5))]
    across, up = (bars.get_segments() for bars in conv.lines[2])
    assert across[0][:, 0].tolist() == pytest.approx([1.5, 2.5])
    deviation = 100 * statistics.stdev([0.50, 0.51])
    assert up[0][:, 1].tolist() == pytest.approx([50.5 - deviation, 50.5 + deviation])
    assert up[1][:, 1].tolist() == pytest.approx([52, 52])  # of one run there is none
    assert [text.get_text() for text in axes.texts] == ["2-2", "3-1"] * 2


def rewrite(folder, **changes):
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | changes))


def test_pareto_where_the_mean_of_equal_costs_is_rounded(study):
    """The mean of three floats that are all 417.319433 is smaller than they are."""
    runs = yaml.safe_load((study / "study.yaml").read_text())
    runs["runs"] = {f"seed{seed}": {"seed": seed} for seed in range(3)}
    (study / "study.yaml").write_text(yaml.safe_dump(runs))
    for seed in range(3):
        shutil.copytree(study / "conv-2-2-seed0", study / f"seed{seed}")
        rewrite(study / f"seed{seed}", macs=417319433, resampling_macs=0)
    assert statistics.fmean([417.319433] * 3) < 417.319433
    (series,) = figure(study, "pareto").axes[0].containers
    assert series.lines[0].get_xdata().tolist() == [417.319433]


def test_pareto_has_latency_where_it_was_measured(study):
    times = {"conv 2-2": {"ms": 3.0, "low": 2.0, "high": 5.0}, "diffstride 2-2": {"ms": 4.0, "low": 4.0, "high": 4.0}}
    (study / "latency.json").write_text(json.dumps({"batch": 64, "hardware": "an abacus", "latency": times}))
    _, axes = figure(study, "pareto").axes
    conv, diffstride = axes.containers
    assert conv.lines[0].get_xydata().tolist() == [pytest.approx((3.0, 50.5))]
    assert conv.lines[2][0].get_segments()[0][:, 0].tolist() == [2, 5]
    assert diffstride.lines[0].get_xydata().tolist() == [pytest.approx((4.0, 54.5))]
    assert "batch of 64 on an abacus" in axes.get_xlabel()


def test_points_are_labelled_by_what_varies_in_their_series(study):
    content = yaml.safe_load((study / "study.yaml").read_text())
    for i, (name, axes) in enumerate(content["runs"].items()):
        del axes["strides"]
        axes["width"] = 0.5 if name.startswith("diff") else [0.25, 0.5][i // 2 % 2]
        if name.startswith("diff"):
            axes[["budget", "cost_weight"][i // 2 % 2]] = 1.5
    (study / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (axes,) = figure(study, "pareto").axes
    assert [text.get_text() for text in axes.texts] == ["width 0.25", "width 0.5", "budget 1.5", "cost weight 1.5"]
    made = figure(study, "trajectories")
    assert labels(made) == ["budget 1.5", "cost weight 1.5"]
    assert made.legends[0].get_title().get_text() == "budget, cost weight"


def test_what_cannot_be_drawn_is_named_and_the_rest_drawn(study):
    missing = draw(study, list(FIGURES))
    assert missing.keys() == {"windows", "resolution", *OF_SOUNDS}
    assert "there is no checkpoint" in missing["windows"]
    assert {file.stem for file in study.glob("*.png")} == {"trajectories", "strides", "factor", "pareto"}


def test_a_study_without_learned_strides_has_the_pareto_curve_alone(study):
    for run in study.glob("diffstride*"):
        (run / "result.json").unlink()
    missing = draw(study, list(FIGURES))
    assert {missing[name] for name in missing.keys() - OF_SOUNDS} == {"no run with learned strides is done"}
    assert missing.keys() == FIGURES.keys() - {"pareto"}
    for run in study.glob("conv*"):
        (run / "result.json").unlink(missing_ok=True)
    assert draw(study, ["pareto"]) == {"pareto": "no run with an accuracy is done"}


# Of networks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps, whose strides have moved."""
    return train([
        "--config", str(CONFIG), "--runs", str(tmp_path_factory.mktemp("runs")), "--name", "mine",
        "--trainer.enable_progress_bar", "false", "--trainer.max_steps", "6", "--model.stride_lr", "20",
        "--data.train_samples", "96", "--data.test_samples", "32", "--data.batch_size", "32",
        "--model.network.width", "4",
    ]).run_folder  # fmt: skip


def test_a_run_shows_the_windows_and_sizes_of_its_network(run):
    loaded = load(run)
    network, config = loaded.network, loaded.config
    inputs = sample_inputs(build_data(config["data"]))
    assert any(layer.strides != layer.initial_strides for _, layer in learnable_layers(network))
    windows = run_windows(run)
    assert "mine" in windows.get_suptitle()
    for panel, expected in zip(windows.axes[:2], input_windows(network, inputs), strict=True):
        drawn = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
        assert drawn == expected.windows
        assert drawn["learned window"] != drawn["initial window"]
    (axes,) = run_resolutions({"": run}, "mine").axes
    ((_, layer),) = learnable_layers(network)
    learned = layer.output_size((32, 32))
    layer.reset_strides()
    stairs = {patch.get_label(): patch.get_data().values.tolist() for patch in axes.patches}
    for i, axis in enumerate(("height", "width")):
        assert stairs[f"initial {axis}"] == [32, layer.output_size((32, 32))[i]]
        assert stairs[f"learned {axis}"] == [32, learned[i]]


def test_a_validation_after_the_last_step_is_drawn_at_that_step(run, tmp_path):
    """Lightning logs it by the number of steps that are done, one more than it says of others."""
    copied = shutil.copytree(run, tmp_path / "run")
    with (copied / "metrics.csv").open("a+") as file:
        file.seek(0)
        names = file.readline().strip().split(",")
        late = {"step": "6", "val/accuracy": "0.5"}
        file.write(",".join(late.get(name, "") for name in names) + "\n")
    (accuracy,) = (p.get_lines()[0] for p in run_training(copied).axes if p.get_ylabel() == "accuracy (%)")
    assert list(accuracy.get_xdata()) == [3, 6, 6]


def test_a_run_shows_what_it_has_logged(run):
    training, strides = run_training(run), run_strides(run)
    assert inside(training)
    assert inside(strides)
    panels = {panel.get_ylabel(): panel.get_lines() for panel in training.axes}
    logged = [row for row in read_dicts(run / "metrics.csv") if row["val/accuracy"]]
    (accuracy,) = panels["accuracy (%)"]
    # Lightning logs a step by the number of those before it.
    assert list(accuracy.get_xdata()) == [int(row["step"]) + 1 for row in logged] == [3, 6]
    assert accuracy.get_ydata() == pytest.approx([100 * float(row["val/accuracy"]) for row in logged])
    rows = [row for row in read_rows(run / "strides.csv") if row.axis == "width"]
    for panel, name in zip(strides.axes, ("stride", "size"), strict=True):
        _, line = panel.get_lines()
        assert line.get_xydata().tolist() == [[row.step, getattr(row, name)] for row in rows]


def test_a_run_whose_data_cannot_be_read_names_the_reason(run, tmp_path, monkeypatch):
    def gone(_):
        raise ConnectionError("the hub\nis away")

    monkeypatch.setattr(pictures, "build_data", gone)
    pictures._data.cache_clear()
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"runs": {"mine": {}}}))
    (tmp_path / "mine").symlink_to(run)
    assert draw(tmp_path, ["windows"]) == {"windows": "the hub is away"}
    pictures._data.cache_clear()


def test_a_study_shows_a_run_of_each_start(run, tmp_path):
    runs = {f"{start}-{seed}": {"strides": [[start, start]], "seed": seed} for start in (2, 3) for seed in (0, 1)}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"name": "s", "runs": runs}, sort_keys=False))
    for name in runs:
        (tmp_path / name).symlink_to(run)
    assert [axes.get_title() for axes in figure(tmp_path, "resolution").axes] == ["2x2", "3x3"]
    assert "2-0" in figure(tmp_path, "windows").get_suptitle()


# Several tasks


@pytest.fixture
def tasks(tmp_path):
    """Make the folder of a study with these runs; three of a single task are not done."""
    found = list(task_rows())
    content = {"runs": {row.name: row.axes for row in found}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for row in found:
        (tmp_path / row.name).mkdir()
        if row.axes.get("task") != TASKS[0] or row.axes["method"] != "conv":
            (tmp_path / row.name / "result.json").write_text(json.dumps(row.result))
    return tmp_path


def test_bars_of_accuracy_are_by_setting_method_and_task(tasks):
    made = figure(tasks, "accuracies")
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
    loaded = load(run)
    net, built = loaded.network, build_data(loaded.config["data"])
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
