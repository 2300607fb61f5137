"""Results of studies: rows, statistics and tables, against values computed by hand or by numpy."""

import csv
import json
import math
import statistics

import numpy as np
import pytest
import scipy.stats
import yaml

from diffstride.errors import UsageError
from diffstride.experiments.studies.results import (
    Row,
    cutoffs,
    groups,
    pivot,
    read_study,
    striding_factor,
    tables,
    write_tables,
)
from tests.helpers.studies import METHODS, TASKS, accuracy, result_of, stride, task_rows

STRIDES = [[2, 2, 2], [3, 1, 3]]


def result(accuracy, strides=(), macs=1e6):
    layers = {f"layer{i}": pair for i, pair in enumerate(strides)}
    return {
        "accuracy": accuracy, "macs": macs, "resampling_macs": macs / 10, "step_time_ms": 5.0, "strides": layers,
        "strides_initial": layers, "loss": 1.0,
    }  # fmt: skip


def rows():
    accuracies = iter(np.random.default_rng(0).uniform(0.5, 0.9, 100))
    return [
        Row(f"{method}-{i}-seed{seed}", "done", {"method": method, "strides": strides, "seed": seed},
            result(next(accuracies), [(2.0, 3.0), (1.5, 1.0)] if method == "diffstride" else ()))
        for method in ("conv", "diffstride") for i, strides in enumerate(STRIDES) for seed in range(3)
    ]  # fmt: skip


def test_a_table_laid_out_as_the_papers():
    made = pivot(rows(), {"rows": "strides", "columns": "method", "paper": "table3"})
    assert made.columns == ("initial strides", "strided convolution", "paper", "DiffStride", "paper")
    assert [line[0] for line in made.rows] == ["(2,2,2)", "(3,1,3)", "mean"]
    means = {}
    for line, strides in zip(made.rows, STRIDES, strict=False):
        for place, method in (1, "conv"), (3, "diffstride"):
            values = [
                100 * r.result["accuracy"]
                for r in rows()
                if r.axes["method"] == method and r.axes["strides"] == strides
            ]
            assert line[place] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
            means.setdefault(method, []).append(np.mean(values))
    assert made.rows[0][2::2] == ("91.4 ± 0.2", "92.5 ± 0.1")  # Table 3 of the paper
    assert made.rows[1][2::2] == ("85.7 ± 0.1", "92.4 ± 0.1")
    for place, method in (1, "conv"), (3, "diffstride"):
        assert made.rows[2][place] == f"{np.mean(means[method]):.1f} ± {np.std(means[method], ddof=1):.1f}"
    assert made.rows[2][2] == f"{np.mean([91.4, 85.7]):.1f} ± {np.std([91.4, 85.7], ddof=1):.1f}"


def test_the_papers_own_mean_line_comes_out():
    """Its six lines of CIFAR-10 and of CIFAR-100 have the mean and the deviation over lines that it prints."""
    strides = [[2, 2, 2], [2, 2, 3], [1, 3, 1], [3, 1, 3], [3, 1, 2], [3, 2, 3]]
    for dataset, published in ("cifar10", ["87.7 ± 3.4", "92.4 ± 0.2"]), ("cifar100", ["59.1 ± 6.7", "73.5 ± 0.3"]):
        made = pivot(
            [
                Row("", "done", {"method": m, "strides": s, "seed": 0, "dataset": dataset}, result=result(0.5))
                for m in ("conv", "diffstride")
                for s in strides
            ],
            {"rows": "strides", "columns": "method", "paper": "table3", "where": {"dataset": dataset}},
        )
        for ours, theirs in zip(made.rows[-1][2::2], published, strict=True):
            (mean, sd), (its_mean, its_sd) = (map(float, text.split(" ± ")) for text in (ours, theirs))
            assert mean == pytest.approx(its_mean, abs=0.11)  # of rounded values
            assert sd == pytest.approx(its_sd, abs=0.4)  # whether theirs divides by n or by n - 1


def test_missing_runs_are_dashes_and_do_not_count():
    some = [row for row in rows() if row.axes["method"] == "conv"]
    some += [Row("x", "failed", {"method": "diffstride", "strides": STRIDES[0], "seed": 0}, error="lost")]
    made = pivot(some, {"rows": "strides", "columns": "method"})
    assert [line[2] for line in made.rows] == ["–", "–", "–"]
    one = pivot(some[:1], {"rows": "strides", "columns": "method"}).rows[0][1]
    assert one == f"{100 * some[0].result['accuracy']:.1f}"  # of one seed there is no deviation
    lines = {line[0]: line for line in tables({}, some, {})[0].rows}
    assert lines["diffstride 2-2-2"][1:3] == ("0/1", "–")
    assert lines["conv 2-2-2"][1] == "3/3"


def test_groups_and_striding_factor():
    assert {label: len(group) for label, group in groups(rows()).items()} == {
        "conv 2-2-2": 3, "conv 3-1-3": 3, "diffstride 2-2-2": 3, "diffstride 3-1-3": 3,
    }  # fmt: skip
    assert striding_factor(rows()[-1].result["strides"]) == pytest.approx(2 * 3 * 1.5 * 1)
    assert striding_factor(rows()[0].result["strides"]) is None


def test_files_of_a_study(tmp_path):
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({"name": "s", "question": "Why?", "runs": {row.name: row.axes for row in rows()}})
    )
    for row in rows()[:2]:
        (tmp_path / row.name).mkdir()
        (tmp_path / row.name / "result.json").write_text(json.dumps(row.result))
    third, fourth = rows()[2:4]
    (tmp_path / third.name).mkdir()
    (tmp_path / third.name / "failed.json").write_text(json.dumps({"error": "step 3: lost, badly"}))
    (tmp_path / fourth.name / "checkpoints").mkdir(parents=True)
    (tmp_path / fourth.name / "checkpoints" / "last.ckpt").touch()
    _, found = read_study(tmp_path)
    assert [row.state for row in found] == ["done", "done", "failed", "unfinished"] + ["open"] * 8
    write_tables(tmp_path)
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["run"] for line in lines] == [row.name for row in rows()]
    assert float(lines[1]["accuracy"]) == rows()[1].result["accuracy"]
    header = (tmp_path / "results.csv").read_text().splitlines()[0].split(",")
    assert len(set(header)) == len(header)
    assert json.loads(lines[1]["strides"]) == [2, 2, 2]  # the axis
    assert json.loads(lines[1]["strides_learned"]) == {}
    assert lines[2]["error"] == "step 3: lost, badly"
    assert lines[5]["accuracy"] == ""
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("Why?\n")
    assert "| conv 2-2-2 | 2/3 |" in text


@pytest.mark.parametrize(
    "content",
    ["runs: 3", "axes: {}", "runs: {../x: {seed: 0}}", "runs: {a: {seed: 0}}\ntables: [1]", "x"],
    ids=lambda c: c[:12],
)
def test_another_folder_is_not_a_study(tmp_path, content):
    with pytest.raises(UsageError, match="is not the folder of a run or of a study"):
        read_study(tmp_path)
    (tmp_path / "study.yaml").write_text(content)
    with pytest.raises(UsageError, match="is not the folder of a run or of a study"):
        read_study(tmp_path)


def test_hostile_values_stay_in_their_cells(tmp_path):
    """Values of axes and errors of libraries are escaped in the tables for spreadsheets and for Markdown."""
    values = ["=1+1", "a|b", "a\nb", "\x1b[2J", "<script>", -1]
    runs = {f"run{i}": {"method": "conv", "value": value} for i, value in enumerate(values)}
    study = {"notes": "one\n\ntwo \x1b[2J", "runs": runs, "tables": [{"rows": "value", "columns": "method"}]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    for name in runs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "failed.json").write_text(json.dumps({"error": "=bad\rline\nof | cells"}))
    write_tables(tmp_path)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    found = list(csv.reader(lines))
    assert len(lines) == len(found) == 1 + len(values)
    assert all(line.isprintable() for line in lines)
    assert {len(row) for row in found} == {len(found[0])}
    assert not any(cell.startswith(("=", "+", "@")) for row in found for cell in row)
    assert found[-1][3] == "-1"
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("one\n\ntwo \\x1b[2J\n\n")
    assert all(line.isprintable() for line in text.split("\n"))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == (2 + len(values) + 1) + (2 + len(values))
    assert {len(line.replace("\\|", "").split("|")) for line in table[: 3 + len(values)]} == {4}
    assert not any("<script" in line for line in table)


@pytest.mark.parametrize("setting", ["single", "multi"])
def test_the_table_of_tasks_has_the_papers_figures_beside_ours(setting):
    table = {"rows": "task", "columns": "method", "paper": "table1", "where": {"setting": setting}}
    made = pivot(list(task_rows()), table)
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
    waveform = Row("w", "done", {"task": "x", "seed": 0}, result_of("single", TASKS[0], "diffstride", 0))
    waveform.result["axes"] = {"time": "Hz"}  # it has no line: its axes are others
    made = cutoffs([*task_rows(), waveform], {"rows": "task", "value": "cutoffs", "paper": "table2"})
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


def test_differences_to_a_column_pair_runs_that_agree_in_all_else():
    made = pivot(rows(), {"rows": "strides", "columns": "method", "over": "conv"})
    assert made.title == "Points over conv: mean differences and their standard errors"
    accuracies = np.array([100 * row.result["accuracy"] for row in rows()]).reshape(2, 2, 3)  # method, strides, seed
    differences = accuracies[1] - accuracies[0]
    expected = [*differences, differences.mean(1)]
    assert [line[0] for line in made.rows] == ["(2,2,2)", "(3,1,3)", "mean"]
    for line, own in zip(made.rows, expected, strict=True):
        assert line[1:] == ("–", f"{own.mean():+.1f} ± {scipy.stats.sem(own):.1f}")
    shuffled = pivot(rows()[::-1], {"rows": "strides", "columns": "method", "over": "conv"})
    assert shuffled.rows[-1][1:] == made.rows[-1][:0:-1]


def test_multiply_accumulates_include_resampling():
    made = pivot(rows(), {"rows": "strides", "columns": "method", "value": "macs"})
    assert made.title == "Million MACs, resampling included: mean and deviation over 3 seeds"
    assert {cell for line in made.rows for cell in line[1:]} == {"1.1"}


def test_the_title_names_all_that_a_mean_is_over():
    made = pivot(rows(), {"rows": "strides", "columns": "seed"})
    assert made.title == "Accuracy in %: mean and deviation over 2 values of method"
    one = [row for row in rows() if row.axes["method"] == "conv" or row.axes["strides"] == STRIDES[0]]
    assert pivot(one, {"rows": "strides", "columns": "method"}).title.endswith("over 3 seeds")
    assert pivot(one, {"rows": "method", "columns": "method"}).title.endswith("over 3 seeds and 2 values of strides")


def test_runs_are_compared_at_equal_seeds():
    made = tables({"compare": "conv 2-2-2"}, rows(), {})[-1]
    assert made.columns[3] == "points over conv 2-2-2"

    def accuracies(method, strides):
        return [
            100 * row.result["accuracy"]
            for row in rows()
            if row.axes["method"] == method and row.axes["strides"] == strides
        ]

    own = np.array(accuracies("conv", STRIDES[0]))
    for line, method, strides in zip(made.rows, ("conv", "conv", "diffstride", "diffstride"), STRIDES * 2, strict=True):
        differences = np.array(accuracies(method, strides)) - own
        expected = f"{differences.mean():+.1f} ± {scipy.stats.sem(differences):.1f}"
        assert line[3] == (expected if differences.any() else "–")
    fewer = [row for row in rows() if row.axes != {"method": "conv", "strides": STRIDES[0], "seed": 2}]
    fewer[0].result["accuracy"] = math.nan  # a network whose outputs are not finite
    assert tables({"compare": "conv 2-2-2"}, fewer, {})[-1].rows[1][3].endswith(" (1 of 3)")
    one = tables({"compare": "conv 2-2-2"}, [row for row in rows() if row.axes["seed"] == 0], {})[-1]
    assert one.rows[1][3] == f"{accuracies('conv', STRIDES[1])[0] - own[0]:+.1f}"
