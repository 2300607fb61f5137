"""Tables of studies, against figures worked out by hand or by numpy."""

import csv
import json

import numpy as np
import pytest
import yaml

from diffstride.errors import UsageError
from diffstride.experiments.studies.results import (
    Row,
    groups,
    pivot,
    read_study,
    statistic,
    striding_factor,
    tables,
    write_tables,
)

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
                Row("", "done", {"method": m, "strides": s, "seed": 0, "dataset": dataset}, result(0.5))
                for m in ("conv", "diffstride")
                for s in strides
            ],
            {"rows": "strides", "columns": "method", "paper": "table3", "where": {"dataset": dataset}},
        )
        for ours, theirs in zip(made.rows[-1][2::2], published, strict=True):
            (mean, sd), (its_mean, its_sd) = (map(float, text.split(" ± ")) for text in (ours, theirs))
            assert mean == pytest.approx(its_mean, abs=0.11)  # of figures that are rounded themselves
            assert sd == pytest.approx(its_sd, abs=0.4)  # they printed the population's or the sample's: both are near


def test_missing_runs_are_dashes_and_do_not_count():
    some = [row for row in rows() if row.axes["method"] == "conv"]
    some += [Row("x", "failed", {"method": "diffstride", "strides": STRIDES[0], "seed": 0}, error="lost")]
    made = pivot(some, {"rows": "strides", "columns": "method"})
    assert [line[2] for line in made.rows] == ["–", "–", "–"]
    lines = {line[0]: line for line in tables({}, some)[0].rows}
    assert lines["diffstride 2-2-2"][1:3] == ("0/1", "–")
    assert lines["conv 2-2-2"][1] == "3/3"


def test_where_chooses_runs():
    both = [row._replace(axes={**row.axes, "dataset": d}) for row in rows() for d in ("cifar10", "cifar100")]
    both = [row._replace(result=result(0.25)) if row.axes["dataset"] == "cifar100" else row for row in both]
    table = {"rows": "strides", "columns": "method", "paper": "table3", "where": {"dataset": "cifar100"}}
    made = pivot(both, table)
    assert made.rows[0][1:4] == ("25.0 ± 0.0", "66.8 ± 0.2", "25.0 ± 0.0")


def test_one_seed_has_no_deviation():
    one = [row for row in rows() if row.axes["seed"] == 1]
    assert "±" not in pivot(one, {"rows": "strides", "columns": "method"}).rows[0][1]
    assert statistic(one[:1], lambda r: r["accuracy"]).sd is None


def test_groups_and_striding_factor():
    assert {label: len(group) for label, group in groups(rows()).items()} == {
        "conv 2-2-2": 3, "conv 3-1-3": 3, "diffstride 2-2-2": 3, "diffstride 3-1-3": 3,
    }  # fmt: skip
    assert striding_factor(rows()[-1].result) == pytest.approx(2 * 3 * 1.5 * 1)
    assert striding_factor(rows()[0].result) is None


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


def test_what_is_no_study_is_said(tmp_path):
    with pytest.raises(UsageError, match="is not the folder of a study"):
        read_study(tmp_path)
    (tmp_path / "study.yaml").write_text("runs: 3")
    with pytest.raises(UsageError, match="is not the folder of a study"):
        read_study(tmp_path)


def test_hostile_values_stay_in_their_cells(tmp_path):
    """Values of a study's axes and errors of libraries, in a table for spreadsheets and in one for Markdown."""
    values = ["=1+1", "a|b", "a\nb", "a\rb", "\x1b[2J", "<script>", -1]
    runs = {f"run{i}": {"method": "conv", "value": value} for i, value in enumerate(values)}
    notes = "one\n\ntwo \x1b[2J"
    study = {
        "name": "s",
        "question": "\x1b?",
        "notes": notes,
        "runs": runs,
        "tables": [{"rows": "value", "columns": "method"}],
    }
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
    assert text.startswith("\\x1b?\n\none\n\ntwo \\x1b[2J\n\n")
    assert all(line.isprintable() for line in text.split("\n"))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == (2 + len(values) + 1) + (2 + len(values))
    assert {len(line.replace("\\|", "").split("|")) for line in table[: 3 + len(values)]} == {4}
    assert not any("<script" in line for line in table)
