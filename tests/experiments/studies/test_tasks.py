"""Tables and figures of several tasks: what a single run of all of them adds, and the paper's figures beside ours."""

import json
import statistics

import pytest
import torch
import yaml

from diffstride.errors import UsageError
from diffstride.experiments.figures import plots
from diffstride.experiments.studies.pictures import draw
from diffstride.experiments.studies.results import Row, by_task, cutoffs, pivot, read_study, tables, write_tables
from diffstride.experiments.studies.study import load_study
from diffstride.experiments.training.fit import train
from diffstride.experiments.training.runs import build_data, load_run
from diffstride.nn import learnable_layers

TASKS = ("Birdsong detection", "Music (pitch)")
METHODS = ("conv", "diffstride")
AXES = {"time": "Hz", "frequency": "cycles per mel band"}


def accuracy(setting, task, method, seed):
    return 0.5 + 0.2 * TASKS.index(task) + 0.1 * METHODS.index(method) + 0.01 * seed - 0.05 * (setting == "multi")


def stride(task, seed, axis):
    return 1.5 + 0.25 * (0 if task is None else 1 + TASKS.index(task)) + 0.1 * seed + axis


def result_of(setting, task, method, seed):
    each = {t: accuracy(setting, t, method, seed) for t in TASKS}
    result = {
        "accuracy": statistics.fmean(each.values()) if task is None else each[task],
        "accuracies": each if task is None else {},
        "axes": AXES, "strides": {}, "strides_initial": {}, "cutoffs": None, "macs": 1e6,
        "resampling_macs": 0.0, "step_time_ms": 1.0,
    }  # fmt: skip
    if method == "diffstride":
        first = [stride(task, seed, axis) for axis in (0, 1)]
        exact = [1 / (2 * first[0] * 0.01), 1 / (2 * first[1])]
        bins = [int(160 / (2 * first[0])) / 1.6, int(64 / (2 * first[1])) / 64]
        result["strides"] = result["strides_initial"] = {"a": first, "b": [9.0, 9.0]}
        result["cutoffs"] = {"exact": {"a": exact, "b": [0.0, 0.0]}, "whole_bins": {"a": bins, "b": [0.0, 0.0]}}
    return result


def rows():
    for setting in ("single", "multi"):
        for task in TASKS if setting == "single" else (None,):
            for method in METHODS:
                for seed in (0, 1, 2):
                    axes = {"setting": setting} | ({"task": task} if task else {}) | {"method": method, "seed": seed}
                    name = "-".join(map(str, axes.values()))
                    yield Row(name, "done", axes, result_of(setting, task, method, seed))


def test_a_run_of_all_tasks_is_one_of_each():
    expanded = by_task(rows())
    multi = [row for row in expanded if row.axes["setting"] == "multi"]
    assert len(expanded) == len(multi) * 2 == 24
    for row in multi:
        assert row.result["accuracy"] == accuracy("multi", row.axes["task"], row.axes["method"], row.axes["seed"])


@pytest.mark.parametrize("setting", ["single", "multi"])
def test_the_table_of_tasks_has_the_papers_figures_beside_ours(setting):
    table = {"rows": "task", "columns": "method", "paper": "table1", "where": {"setting": setting}}
    made = pivot(list(rows()), table)
    assert made.columns == ("task", "strided convolution", "paper", "DiffStride", "paper")
    printed = {  # read off the paper's Table 1
        "single": {"Birdsong detection": ("78.8 ± 0.3", "81.3 ± 0.1"), "Music (pitch)": ("91.8 ± 0.1", "92.2 ± 0.1")},
        "multi": {"Birdsong detection": ("77.3 ± 0.2", "78.6 ± 0.5"), "Music (pitch)": ("89.4 ± 0.3", "89.9 ± 0.3")},
    }[setting]
    for line, task in zip(made.rows, TASKS, strict=False):
        own = [f"{100 * accuracy(setting, task, method, 1):.1f} ± 1.0" for method in METHODS]
        assert line == (task, own[0], printed[task][0], own[1], printed[task][1])
    means = [statistics.fmean(accuracy(setting, task, method, 1) for task in TASKS) for method in METHODS]
    assert made.rows[-1][0] == "mean"
    assert [cell.split()[0] for cell in made.rows[-1][1::2]] == [f"{100 * mean:.1f}" for mean in means]


def test_the_table_of_cutoffs_is_laid_out_as_the_papers():
    made = cutoffs(list(rows()), {"rows": "task", "value": "cutoffs", "paper": "table2"})
    assert made.columns == (
        "task", "stride, time", "paper", "stride, frequency", "paper", "cut-off, time, Hz", "in whole bins", "paper",
        "cut-off, frequency, cycles per mel band", "in whole bins", "paper",
    )  # fmt: skip
    assert [line[0] for line in made.rows] == [*TASKS, "Multi-task model"]
    assert [line[4] for line in made.rows] == ["1.96 ± 0.01", "1.61 ± 0.07", "1.79 ± 0.03"]
    assert [line[7] for line in made.rows] == ["25.83 ± 0.36", "37.50 ± 2.72", "34.17 ± 0.30"]
    for line, task in zip(made.rows, (*TASKS, None), strict=True):
        first = [stride(task, seed, 0) for seed in (0, 1, 2)]
        assert line[1] == f"{statistics.fmean(first):.2f} ± {statistics.stdev(first):.2f}"
        hz = [50 / s for s in first]
        assert line[5].split(" ± ")[0] == f"{statistics.fmean(hz):.2f}"
        bins = [int(80 / s) / 1.6 for s in first]
        assert line[6].split(" ± ")[0] == f"{statistics.fmean(bins):.2f}"
        mel = [1 / (2 * stride(task, seed, 1)) for seed in (0, 1, 2)]
        assert line[8].split(" ± ")[0] == f"{statistics.fmean(mel):.4f}"


def test_one_task_alone_and_among_others_side_by_side():
    made = pivot(list(rows()), {"rows": "setting", "columns": "method", "where": {"task": TASKS[0]}})
    found = {line[0]: [float(cell.split()[0]) for cell in line[1:]] for line in made.rows[:2]}
    assert found == {
        setting: [pytest.approx(100 * accuracy(setting, TASKS[0], method, 1)) for method in METHODS]
        for setting in ("single", "multi")
    }


def test_runs_on_other_axes_are_not_in_the_table_of_cutoffs():
    waveform = Row("w", "done", {"task": "x", "seed": 0}, result_of("single", TASKS[0], "diffstride", 0))
    waveform.result["axes"] = {"time": "Hz"}
    made = cutoffs([*rows(), waveform], {"rows": "task", "value": "cutoffs"})
    assert [line[0] for line in made.rows] == [*TASKS, "Multi-task model"]


def test_runs_that_have_no_task_are_called_by_what_varies(tmp_path, monkeypatch):
    found = []
    for cost in (0, 1):
        result = result_of("single", TASKS[cost], "diffstride", 0)
        found.append(Row(f"c{cost}", "done", {"cost_weight": cost, "seed": 0}, result))
        (tmp_path / f"c{cost}").mkdir()
        (tmp_path / f"c{cost}" / "result.json").write_text(json.dumps(result))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"runs": {row.name: row.axes for row in found}}))
    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.update({path.name: figure}))
    assert draw(tmp_path, ["cutoffs"]) == {}
    time, _ = drawn["cutoffs"].axes
    assert [label.get_text() for label in time.get_yticklabels()] == ["cost0", "cost1"]
    assert len(time.containers[0].lines[0].get_xdata()) == 2


@pytest.fixture
def study(tmp_path):
    """The folder of a study with these runs; three of a single task are not done."""
    found = list(rows())
    tables = [
        {"rows": "task", "columns": "method", "where": {"setting": "multi"}},
        {"rows": "task", "value": "cutoffs"},
    ]
    content = {"question": "?", "tables": tables, "runs": {row.name: row.axes for row in found}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for row in found:
        (tmp_path / row.name).mkdir()
        if row.axes.get("task") != TASKS[0] or row.axes["method"] != "conv":
            (tmp_path / row.name / "result.json").write_text(json.dumps(row.result))
    return tmp_path


def test_a_study_makes_both_kinds_of_tables(study):
    definition, found = read_study(study)
    first, second, overview = tables(definition, found)
    assert first.rows[0][0] == TASKS[0]
    assert second.columns[1] == "stride, time"
    assert len(overview.rows) == 6
    write_tables(study)
    assert "cut-off, time, Hz" in (study / "table.md").read_text()


def test_bars_of_accuracy_are_by_setting_method_and_task(study, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.update({path.name: figure}))
    assert draw(study, ["accuracies"]) == {}
    single, multi = drawn["accuracies"].axes
    assert (single.get_title(), multi.get_title()) == ("single-task", "multi-task")
    bars = {c.get_label(): [bar.get_height() for bar in c] for c in multi.containers if hasattr(c, "patches")}
    for name, method in (("strided convolution", "conv"), ("DiffStride", "diffstride")):
        each = [100 * accuracy("multi", task, method, 1) for task in TASKS]
        assert bars[name] == pytest.approx([*each, statistics.fmean(each)])
    assert [label.get_text() for label in multi.get_xticklabels()] == [*TASKS, "mean"]
    assert [label.get_text() for label in single.get_xticklabels()] == [*TASKS, "mean"]
    # Whatever is drawn, the scale begins below it and is told.
    bottom = single.get_ylim()[0]
    assert bottom < min(min(heights) for heights in bars.values())
    assert f"begins at {bottom:.0f} %" in drawn["accuracies"].get_suptitle()


def test_cutoffs_are_drawn_exact_and_in_whole_bins(study, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.update({path.name: figure}))
    assert draw(study, ["cutoffs"]) == {}
    time, frequency = drawn["cutoffs"].axes
    assert time.get_xlabel() == "cut-off along time (Hz)"
    assert frequency.get_xlabel() == "cut-off along frequency (cycles per mel band)"
    exact, whole = (container.lines[0].get_xdata().tolist() for container in time.containers)
    tasks = (*TASKS, None)
    assert exact == pytest.approx([statistics.fmean(50 / stride(t, s, 0) for s in (0, 1, 2)) for t in tasks])
    assert whole == pytest.approx([statistics.fmean(int(80 / stride(t, s, 0)) / 1.6 for s in (0, 1, 2)) for t in tasks])
    assert [label.get_text() for label in time.get_yticklabels()] == [*TASKS, "Multi-task model"]


def test_what_these_figures_need_is_said_where_it_is_missing(study):
    for run in study.glob("*-*"):
        (run / "result.json").unlink(missing_ok=True)
    missing = draw(study, ["accuracies", "cutoffs", "spectrogram"])
    assert missing == {
        "accuracies": "no run with a task is done",
        "cutoffs": "no run with cut-off frequencies is done",
        "spectrogram": "no run with learned strides on spectrograms is done",
    }


def test_the_spectrogram_shows_what_the_first_layer_does(tmp_path, monkeypatch):
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
    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.update({path.name: figure}))
    assert draw(tmp_path, ["spectrogram"]) == {}
    panels = drawn["spectrogram"].axes
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


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"rows": "seed", "value": "cutoffs", "paper": "table1"}, "paper must be one of table2, got 'table1'"),
        ({"rows": "seed", "columns": "seed", "paper": "table2"}, "paper must be one of release, table1, table3"),
        ({"rows": "seed", "columns": "seed", "value": "cutoffs"}, "columns cannot be given for the value cutoffs"),
        ({"value": "cutoffs"}, "tables: rows must be one of seed, got None"),
        ({"rows": "seed"}, "tables: columns must be one of seed, got None"),
    ],
)
def test_tables_that_cannot_be_made_are_refused(table, match, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"data": {"class_path": "SyntheticSounds"}}))
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"base": "base.yaml", "axes": {"seed": [0]}, "tables": [table]}))
    with pytest.raises(UsageError, match=match):
        load_study(file)


def test_a_table_of_cutoffs_may_be_of_some_runs_and_have_the_papers_beside(tmp_path):
    base = {"data": {"class_path": "SyntheticSounds"}, "model": {"network": {"class_path": "AudioCNN"}}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    table = {"rows": "seed", "value": "cutoffs", "paper": "table2", "where": {"seed": 0}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"base": "base.yaml", "axes": {"seed": [0, 1]}, "tables": [table]}))
    assert load_study(file).tables[0]["where"] == {"seed": 0}
