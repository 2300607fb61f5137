"""Studies from file to table: each run is done once, however a study ends, and nothing else is changed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock

from diffstride.experiments.studies.results import read_study
from diffstride.experiments.studies.runner import _measure_latency, fraction_done
from diffstride.experiments.studies.study import load_study
from diffstride.experiments.training.fit import train
from tests.helpers.runs import small
from tests.helpers.studies import SLOWER, findings, study


def in_another_process(file, *arguments):
    command = [sys.executable, "-m", "diffstride.experiments.commands.main", "study", file]
    return subprocess.Popen(
        [*command, "--runs", file.parent / "runs", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_study_from_file_to_table(write, capsys):
    file = write(latency=2)
    assert study(file) == 0
    folder = file.parent / "runs" / "tiny"
    printed = capsys.readouterr().out
    assert "4 runs done, 0 left" in printed
    names = ["conv-3x3-seed0", "conv-3x3-seed1", "diffstride-3x3-seed0", "diffstride-3x3-seed1"]
    for name in names:
        assert f"{name}: accuracy 0." in printed
    left = {path.name for path in folder.iterdir()}
    assert left >= {*names, "study.yaml", "results.csv", "table.md", "provenance.json", "latency.json"}
    found = findings(folder)
    assert list(found) == names

    # `fit` alone gives the same numbers.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cli = train([
        *load_study(file).runs[3].request.arguments(), "--runs", str(file.parent), "--name", "alone",
        "--trainer.enable_progress_bar", "false",
    ])  # fmt: skip
    torch.set_num_threads(threads)
    alone = json.loads((cli.run_folder / "result.json").read_text())
    assert {key: alone[key] for key in found[names[3]]} == found[names[3]]
    with (folder / "results.csv").open() as lines:
        table = {line["run"]: line for line in csv.DictReader(lines)}
    assert float(table[names[3]]["accuracy"]) == alone["accuracy"]
    latency = json.loads((folder / "latency.json").read_text())
    assert latency["batch"] == 2
    assert set(latency["latency"]) == {"conv 3x3", "diffstride 3x3"}
    assert all(0 < v["low"] <= v["ms"] <= v["high"] for v in latency["latency"].values())

    # Only a missing run is done again.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    shutil.rmtree(folder / names[1])
    assert study(file) == 0
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    assert [path.parent.name for path in after if after[path] != before[path]] == [names[1]]
    assert findings(folder) == found
    assert "1 runs done" not in capsys.readouterr().out


def test_other_settings_for_a_run_that_is_done_are_refused(write, capsys):
    file = write(axes={"method": ["conv"], "seed": [0]})
    assert study(file) == 0
    folder = file.parent / "runs" / "tiny"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert study(file, "--model.network.width", "8") == 2
    error = capsys.readouterr().err
    assert "conv-seed0 was run with other settings (model.network.width 4, now 8): give another --name" in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert study(file, "--model.network.width=8", "--name", "other") == 0
    assert (file.parent / "runs" / "other" / "conv-seed0" / "result.json").exists()
    (folder / "conv-seed0" / "result.json").unlink()  # a checkpoint is kept, too
    (folder / "conv-seed0" / "failed.json").write_text(json.dumps({"error": "was killed"}))
    assert study(file, "--data.batch_size", "16") == 2
    assert "was run with other settings (data.batch_size 32, now 16)" in capsys.readouterr().err
    assert (folder / "conv-seed0" / "checkpoints" / "last.ckpt").read_bytes() == before[
        folder / "conv-seed0" / "checkpoints" / "last.ckpt"
    ]


def test_latency_is_measured_again_for_other_batches_and_runs(write):
    axes = {"method": "conv", "seed": 0}
    file = write(axes=axes, latency=2)
    assert study(file) == 0
    measured = file.parent / "runs" / "tiny" / "latency.json"
    before = measured.read_text()
    assert study(file) == 0
    assert measured.read_text() == before
    assert study(write(axes=axes, latency=3)) == 0
    assert json.loads(measured.read_text())["batch"] == 3
    before = measured.read_text()
    shutil.rmtree(measured.parent / "conv-seed0")
    assert study(write(axes=axes, latency=3)) == 0
    assert measured.read_text() != before


FICKLE = """
from pathlib import Path
from diffstride.experiments.models import TinyCNN

class Fickle(TinyCNN):
    def forward(self, x):
        if self.training and not Path({path!r}).exists():
            raise MemoryError("no room\\nat all")
        return super().forward(x)
"""


def test_a_failed_run_is_recorded_listed_and_tried_again(write, tmp_path, monkeypatch, capsys):
    (tmp_path / "fickle_network.py").write_text(FICKLE.format(path=str(tmp_path / "room")))
    monkeypatch.syspath_prepend(tmp_path)
    networks = {"fickle": {"model.network.class_path": "fickle_network.Fickle"}, "firm": {"model.network.width": 5}}
    file = write(axes={"network": networks, "seed": 0})
    assert study(file) == 1
    printed = capsys.readouterr()
    assert "networkfickle-seed0: failed: MemoryError: no room at all" in printed.out
    assert "networkfirm-seed0: accuracy" in printed.out
    assert "1 of 2 runs failed (the same command tries them again)" in printed.err
    folder = file.parent / "runs" / "tiny"
    assert "Traceback" in json.loads((folder / "networkfickle-seed0" / "failed.json").read_text())["details"]
    _, rows = read_study(folder)
    assert [row.state for row in rows] == ["failed", "done"]

    done = (folder / "networkfirm-seed0" / "result.json").stat().st_mtime_ns
    (tmp_path / "room").touch()
    assert study(file) == 0
    assert "Trying again the runs that failed: networkfickle-seed0." in capsys.readouterr().out
    assert not (folder / "networkfickle-seed0" / "failed.json").exists()
    assert (folder / "networkfirm-seed0" / "result.json").stat().st_mtime_ns == done


def test_a_run_cut_off_after_its_last_checkpoint_is_only_evaluated(write):
    file = write(axes={"method": "diffstride", "seed": 0})
    assert study(file) == 0
    folder = file.parent / "runs" / "tiny"
    before = findings(folder)
    for name in "result.json", "strides.png":
        (folder / "diffstride-seed0" / name).unlink()
    history = (folder / "diffstride-seed0" / "strides.csv").read_text()
    assert read_study(folder)[1][0].state == "unfinished"
    assert study(file) == 0
    assert findings(folder) == before
    assert (folder / "diffstride-seed0" / "strides.csv").read_text() == history


@pytest.mark.parametrize("label", ["..", "../x", "/tmp/x", "\x1b[2J"])
def test_the_runs_of_others_stay_whatever_a_label_is(write, label):
    """The label of the only axis is the whole name of a run."""
    file = write(axes={"dataset": {label: {"model.network.width": 4}}})
    runs = file.parent / "runs"
    for other in (runs / "other", runs / "tiny" / "mine", runs.parent / "x"):
        other.mkdir(parents=True)
        (other / "result.json").write_text("mine")
    (runs / "tiny" / ".diffstride-study").touch()
    before = {path: path.read_bytes() for path in file.parent.rglob("*") if path.is_file()}
    assert study(file) == 0
    assert {path: path.read_bytes() for path in before} == before
    (run,) = load_study(file).runs
    assert (runs / "tiny" / run.name / "result.json").exists()
    assert {path.name for path in runs.iterdir()} == {"other", "tiny"}
    assert {path.name for path in runs.parent.iterdir()} == {"runs", "x", "tiny.yaml"}


@pytest.mark.parametrize("name", ["../x", "/tmp/x", ".."])
@pytest.mark.parametrize("where", ["file", "argument"])
def test_a_study_stays_in_its_folder(write, name, where, capsys):
    file = write()
    if where == "file":
        file.write_text(f"{file.read_text()}name: {name}\n")
    before = sorted(file.parent.rglob("*"))
    assert study(file, *([f"--name={name}"] if where == "argument" else [])) == 2
    assert "must be a plain file name" in capsys.readouterr().err
    assert sorted(file.parent.rglob("*")) == before


def test_a_folder_of_something_else_is_no_study(write, capsys):
    file = write(axes={"method": "conv", "seed": 0})
    folder = file.parent / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(file.read_text())
    (folder / "results.csv").write_text("mine")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert study(file) == 2
    assert "has files of something else" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_one_process_at_a_time(write, capsys):
    file = write()
    folder = file.parent / "runs" / "tiny"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        assert study(file) == 2
    assert "is being worked on by another process" in capsys.readouterr().err


def test_the_fraction_of_a_run_is_read_from_its_log(tmp_path):
    assert fraction_done(tmp_path) == 0
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: -1, max_epochs: 8}")
    assert fraction_done(tmp_path) == 0
    (tmp_path / "metrics.csv").write_text("epoch,step\n0,10\n6,210\n")
    assert fraction_done(tmp_path) == 6 / 8
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(",220\n")  # of the monitor of learning rates
    assert fraction_done(tmp_path) == 6 / 8
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 400, max_epochs: null}")
    assert fraction_done(tmp_path) == 220 / 400


# Epochs limit these runs: a run that only steps limit resumes with other batches.
@pytest.mark.long
@pytest.mark.parametrize(("how", "arguments"), [(signal.SIGINT, []), (signal.SIGKILL, ["--processes", "2"])])
def test_a_study_that_is_cut_off_resumes_to_the_same_results(write, how, arguments):
    whole, cut = (write(name, settings=SLOWER) for name in ("whole", "cut"))
    assert study(whole) == 0
    runs = whole.parent / "runs"
    process = in_another_process(cut, *arguments)
    folder = runs / "cut"
    begun = folder / ("diffstride-3x3-seed0" if arguments else "conv-3x3-seed1") / "checkpoints" / "last.ckpt"
    wait_for(begun.exists, process)
    os.killpg(process.pid, how) if how is signal.SIGINT else process.kill()
    printed, _ = process.communicate(timeout=60)
    if how is signal.SIGINT:
        assert process.returncode == 1
        assert "runs are done; the same command continues the study" in printed
        assert "Traceback" not in printed
    else:
        time.sleep(1.0)  # the runs end with their parent
        ps = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert str(folder) not in ps
    states = [row.state for row in read_study(folder)[1]]
    assert set(states) != {"done"}
    assert "unfinished" in states
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    assert study(cut, *arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert findings(folder) == findings(runs / "whole")


def test_a_network_with_inserted_strides_is_timed(tmp_path):
    """Its conversion does not work in `torch.inference_mode`, in which the timing is done."""
    arguments = {"depth": 18, "width": 0.02, "in_channels": 1, "num_classes": 4, "downsample": "conv"}
    network = {
        "class_path": "Built",
        "init_args": {
            "function": "diffstride.experiments.models.ResNet", "arguments": arguments | {"strides": [2, 2, 2]},
            "input_shape": [1, 32, 32],
        },
    }  # fmt: skip
    small(tmp_path, "built", "--model.network", json.dumps(network), steps=1)
    _measure_latency(tmp_path, {"built": tmp_path / "built"}, batch=2, cpus=1)
    assert json.loads((tmp_path / "latency.json").read_text())["latency"]["built"]["ms"] > 0
