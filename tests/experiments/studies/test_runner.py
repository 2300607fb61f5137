"""`diffstride study`: what is done, what is done again and what is not, whoever does it and however it ends."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from diffstride.experiments.commands.main import main
from diffstride.experiments.studies import runner
from diffstride.experiments.studies.executors import _remote_work
from diffstride.experiments.studies.results import read_study
from diffstride.experiments.studies.study import load_study
from diffstride.experiments.studies.worker import write_request
from diffstride.experiments.training.fit import train
from tests.helpers.studies import SLOWER, findings, study


def in_another_process(file, *arguments):
    command = [
        sys.executable,
        "-m",
        "diffstride.experiments.commands.main",
        "study",
        str(file),
        "--runs",
        str(file.parent / "runs"),
    ]
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


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
    assert "4 runs done, 0 running, 0 left" in printed
    names = ["conv-3x3-seed0", "conv-3x3-seed1", "diffstride-3x3-seed0", "diffstride-3x3-seed1"]
    for name in names:
        assert f"{name}: accuracy 0." in printed
    left = {path.name for path in folder.iterdir()}
    assert left >= {*names, "study.yaml", "results.csv", "table.md", "provenance.json", "latency.json"}
    found = findings(folder)
    assert list(found) == names

    # The same figures as `fit` gives by itself.
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

    # What is done is not done again, but for what is missing.
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
    said = capsys.readouterr()
    assert "networkfickle-seed0: failed: MemoryError: no room at all" in said.out
    assert "networkfirm-seed0: accuracy" in said.out
    assert "1 of 2 runs failed (the same command tries them again)" in said.err
    folder = file.parent / "runs" / "tiny"
    assert "Traceback" in json.loads((folder / "networkfickle-seed0" / "failed.json").read_text())["details"]
    _, rows = read_study(folder)
    assert [row.state for row in rows] == ["failed", "done"]

    done = (folder / "networkfirm-seed0" / "result.json").stat().st_mtime_ns
    (tmp_path / "room").touch()
    assert study(file) == 0
    assert "Trying again what failed: networkfickle-seed0." in capsys.readouterr().out
    assert not (folder / "networkfickle-seed0" / "failed.json").exists()
    assert (folder / "networkfirm-seed0" / "result.json").stat().st_mtime_ns == done


def test_a_run_that_diverges_does_not_stop_the_study(write, capsys):
    rates = {"wild": {"model.learning_rates": [1e9] * 4}, "calm": {"model.learning_rates": [0.01] * 4}}
    file = write(axes={"method": ["conv", "diffstride"], "rates": rates})
    assert study(file, "--trainer.log_every_n_steps", "1") == 1
    _, rows = read_study(file.parent / "runs" / "tiny")
    assert [row.state for row in rows] == ["failed", "done", "failed", "done"]
    for row in rows[::2]:
        assert "step" in row.error
        assert "learning_rates" in row.error
        assert "\n" not in row.error
    assert "2 of 4 runs failed" in capsys.readouterr().err


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


def test_a_dry_run_lists_costs_and_writes_nothing(write, capsys):
    file = write()
    assert study(file, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert not (file.parent / "runs").exists()
    assert printed.count("│ open") == 4
    # conv: 3x3 kernels at stride 3 on 32x32, circular: 11x11 maps; then a linear layer. 6 steps of 32 images, times 3.
    macs = 11 * 11 * 9 * (1 * 4 + 4 * 8) + 8 * 4
    assert f"{macs / 1e6:.3g}" in printed
    assert f"{3 * macs * 6 * 32 / 1e12:.3g}" in printed


def test_a_dry_run_finds_a_network_that_cannot_be_built(write, capsys):
    file = write(axes={"method": "conv", "strides": [[[2, 2]], [[2.5, 2]]]})
    assert study(file, "--dry-run") == 2
    assert "error: run conv-2.5x2: " in (error := capsys.readouterr().err)
    assert "stride must be an integer for downsample='conv'" in error


def test_a_dry_run_without_a_limit_of_epochs_counts_steps(write, capsys):
    assert study(write(), "--dry-run", "--trainer.max_epochs", "-1") == 0
    printed = capsys.readouterr().out
    macs = 11 * 11 * 9 * (1 * 4 + 4 * 8) + 8 * 4
    assert f"{3 * macs * 6 * 32 / 1e12:.3g}" in printed


def test_a_study_without_accuracies(write, capsys):
    file = write(axes={"method": "conv", "seed": 0})
    assert study(file, "--trainer.limit_val_batches", "0") == 0
    assert "conv-seed0: accuracy –, " in capsys.readouterr().out


LABELS = ["..", ".", "../x", "/tmp/x", "a/../../b", "~", "-x", "", " ", "x\n", "\x1b[2J", "con", "x" * 200]


@pytest.mark.parametrize("label", LABELS)
def test_whatever_a_label_is_the_runs_of_others_stay(write, label, capsys):
    """Even where its axis is alone, so that the label is all of the name of a run."""
    file = write(axes={"dataset": {label: {"model.network.width": 4}}})
    runs = file.parent / "runs"
    for other in (runs / "other", runs / "tiny" / "mine", runs.parent / "x"):
        other.mkdir(parents=True)
        (other / "result.json").write_text("mine")
    (runs / "tiny" / ".diffstride-study").touch()
    for request in (runs, runs / "tiny", runs.parent):  # as one that was asked for otherwise, and never began
        (request / "request.json").write_text(json.dumps({"config": {}, "settings": {}, "cpus": 1}))
    before = {path: path.read_bytes() for path in file.parent.rglob("*") if path.is_file()}
    assert study(file) == 0
    assert {path: path.read_bytes() for path in before} == before
    (run,) = load_study(file).runs
    assert (runs / "tiny" / run.name / "result.json").exists()
    assert {path.name for path in runs.iterdir()} == {"other", "tiny", "request.json"}
    assert {path.name for path in runs.parent.iterdir()} == {"runs", "x", "tiny.yaml", "request.json"}


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", ".x", "a/b", "-x"])
@pytest.mark.parametrize("where", ["file", "argument"])
def test_a_study_stays_in_its_folder(write, name, where, capsys):
    file = write()
    if where == "file":
        file.write_text(f"{file.read_text()}name: {name}\n")
    before = sorted(file.parent.rglob("*"))
    assert study(file, *([f"--name={name}"] if where == "argument" else [])) == 2
    assert "must be a plain file name" in capsys.readouterr().err
    assert sorted(file.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["../x", "/etc", "..", "a/b"])
def test_a_kept_study_names_its_own_runs_alone(write, name, capsys):
    folder = write().parent / "kept"
    shutil.copytree(folder.parent, folder.parent / "x")
    folder.mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump({"runs": {name: {"seed": 0}}}))
    assert main(["report", str(folder)]) == 2
    assert "the name of a run must be a plain file name" in capsys.readouterr().err


def test_labels_that_make_one_name_are_refused(write, capsys):
    for labels in ("a b", "a_b"), ("A", "a"), ("x", "../x"):
        file = write(axes={"dataset": {label: {"model.network.width": 4} for label in labels}})
        assert study(file, "--dry-run") == 2
        assert "is there twice" in capsys.readouterr().err
    file = write(axes={"dataset": {"x" * 300: {"model.network.width": 4}}})
    assert study(file, "--dry-run") == 2
    assert "at most 255 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "label", ["results.csv", "Table.md", "STUDY.YAML", "report.html", "pareto.png", "latency.json"]
)
def test_a_run_cannot_be_called_like_a_file_of_its_study(write, label, capsys):
    file = write(axes={"setting": {label: {"model.network.width": 4}}})
    assert study(file) == 2
    assert "the name of a run must not be that of a file of the study" in capsys.readouterr().err
    assert not (file.parent / "runs").exists()


def test_runs_of_several_devices_have_a_process_of_their_own(write, capsys):
    file = write(axes={"method": "conv", "seed": 0})
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    assert study(file, *devices) == 0
    assert "conv-seed0: accuracy" in capsys.readouterr().out
    single = ["--trainer.devices", "1", "--trainer.strategy", "ddp_spawn"]
    assert study(file, *single, "--name", "other") == 1
    assert "1 of 1 runs failed" in (error := capsys.readouterr().err)
    assert "trainer.strategy must start processes of their own" in error


@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
def test_a_study_goes_on_where_a_result_does_not_tell_its_time(write, value, capsys):
    file = write(axes={"method": "conv", "seed": 0})
    assert study(file) == 0
    folder = file.parent / "runs" / "tiny"
    result = json.loads((folder / "conv-seed0" / "result.json").read_text())
    (folder / "conv-seed0" / "result.json").write_text(json.dumps(result | {"train_seconds": value}))
    assert study(file) == 0
    assert json.loads((folder / "provenance.json").read_text())["seconds"] == 0


def test_a_folder_of_something_else_is_no_study(write, capsys):
    file = write(axes={"method": "conv", "seed": 0})
    folder = file.parent / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(file.read_text())  # the file of a study, not what one leaves
    (folder / "results.csv").write_text("mine")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert study(file) == 2
    assert "has files of something else" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


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


def test_what_a_failed_run_had_learned_is_not_thrown_away(write, capsys):
    file = write(axes={"method": "diffstride", "seed": 0})
    assert study(file) == 0
    run = file.parent / "runs" / "tiny" / "diffstride-seed0"
    (run / "result.json").unlink()
    (run / "failed.json").write_text(json.dumps({"error": "was killed"}))
    saved = (run / "checkpoints" / "last.ckpt").read_bytes()
    assert study(file, "--data.batch_size", "16") == 2
    assert "was run with other settings (data.batch_size 32, now 16)" in capsys.readouterr().err
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == saved


def test_two_processes_find_what_one_finds(write):
    file = write()
    assert study(file) == 0
    assert study(file, "--name", "two", "--processes", 2) == 0
    runs = file.parent / "runs"
    assert findings(runs / "two") == findings(runs / "tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--processes", "2", "--ray", "auto"], "not allowed with argument"),
        (["--processes", "two"], "invalid int value: 'two'"),
        (["extra"], "cannot read the argument 'extra'"),
        (["--model.network.width"], "cannot read the argument '--model.network.width'"),
        (["--model.network.widht", "3"], "unknown key model.network.widht: did you mean model.network.width?"),
        (["--seed_everything", "3"], "the axis seed of"),
    ],
)
def test_mistakes_on_the_command_line(write, capsys, arguments, message):
    file = write()
    assert study(file, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (file.parent / "runs").exists()


def test_a_folder_that_cannot_be_written(write, capsys):
    file = write()
    (file.parent / "runs").write_text("a file")
    assert study(file) == 2
    error = capsys.readouterr().err
    assert "cannot write to" in error
    assert "give another --runs" in error


def test_one_process_at_a_time(write, capsys):
    file = write()
    folder = file.parent / "runs" / "tiny"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        assert study(file) == 2
    assert "is being worked on by another process" in capsys.readouterr().err


def test_a_machine_without_the_folder_sends_back_what_the_run_left(write, tmp_path, monkeypatch):
    """What a Ray task does where the study's folder is not to be seen."""
    (run,) = load_study(write(axes={"method": "diffstride", "seed": 0})).runs
    here = tmp_path / "runs" / run.name
    write_request(here, run.request)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "there"))
    (tmp_path / "there").mkdir()
    text = (here / "request.json").read_text()
    archive = _remote_work(os.getcwd(), Path("/nowhere/study") / run.name, text, "token")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(here, filter="data")
    sent = json.loads((here / "result.json").read_text())
    (tmp_path / "runs" / ".token").touch()
    (seen,) = load_study(write(axes={"method": "diffstride", "seed": 0})).runs
    second = tmp_path / "runs" / "second"
    write_request(second, seen.request)
    assert _remote_work(os.getcwd(), second, "", "token") is None
    result = json.loads((second / "result.json").read_text())
    assert {k: sent[k] for k in ("accuracy", "loss", "strides")} == {
        k: result[k] for k in ("accuracy", "loss", "strides")
    }


def test_the_share_of_a_run_is_read_from_what_it_logs(tmp_path):
    assert runner._share_done(tmp_path) == 0
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: -1, max_epochs: 8}")
    assert runner._share_done(tmp_path) == 0
    (tmp_path / "metrics.csv").write_text("epoch,step\n0,10\n6,210\n")
    assert runner._share_done(tmp_path) == 6 / 8
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 400, max_epochs: null}")
    assert runner._share_done(tmp_path) == 210 / 400


# Limited by epochs: a run that steps alone limit goes on with other batches after a resume.
@pytest.mark.long
@pytest.mark.parametrize(("how", "arguments"), [(signal.SIGINT, []), (signal.SIGKILL, ["--processes", "2"])])
def test_cut_off_in_the_middle_it_goes_on_and_finds_the_same(write, how, arguments):
    whole, cut = (write(name, settings=SLOWER) for name in ("whole", "cut"))
    assert study(whole) == 0
    runs = whole.parent / "runs"
    process = in_another_process(cut, *arguments)
    folder = runs / "cut"
    begun = folder / ("diffstride-3x3-seed0" if arguments else "conv-3x3-seed1") / "checkpoints" / "last.ckpt"
    wait_for(begun.exists, process)
    os.killpg(process.pid, how) if how is signal.SIGINT else process.kill()
    said, _ = process.communicate(timeout=60)
    if how is signal.SIGINT:
        assert process.returncode == 1
        assert "runs are done; the same command goes on" in said
        assert "Traceback" not in said
    else:
        time.sleep(1.0)  # the runs notice that nobody waits for them
        ps = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert str(folder) not in ps
    states = [row.state for row in read_study(folder)[1]]
    assert set(states) != {"done"}
    assert "unfinished" in states
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    assert study(cut, *arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert findings(folder) == findings(runs / "whole")


@pytest.mark.long
def test_a_process_that_dies_fails_its_run_alone(write, tmp_path, monkeypatch):
    (tmp_path / "dying_network.py").write_text(
        "import os, signal\nfrom diffstride.experiments.models import TinyCNN\n\nclass Dying(TinyCNN):\n"
        "    def forward(self, x):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    networks = {"dying": {"model.network.class_path": "dying_network.Dying"}, "firm": {"model.network.width": 5}}
    file = write(axes={"network": networks})
    assert study(file, "--processes", 2) == 1
    _, rows = read_study(file.parent / "runs" / "tiny")
    assert [row.state for row in rows] == ["failed", "done"]
    assert rows[0].error == "the process of the run was killed by SIGKILL"
