"""Places where runs are done: the results are the same, also when a worker is lost."""

import io
import json
import os
import signal
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest

from diffstride.experiments.studies.executors import _remote_work
from diffstride.experiments.studies.results import read_study
from diffstride.experiments.studies.study import load_study
from diffstride.experiments.studies.worker import write_request
from tests.helpers.studies import SLOWER, findings, study

# Ray leaves sockets and files to the end of the process, and warns of changes in a later version.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_runs_of_several_devices_have_a_process_of_their_own(write, capsys):
    file = write(axes={"method": "conv", "seed": 0})
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    assert study(file, *devices) == 0
    assert "conv-seed0: accuracy" in capsys.readouterr().out
    single = ["--trainer.devices", "1", "--trainer.strategy", "ddp_spawn"]
    assert study(file, *single, "--name", "other") == 1
    assert "1 of 1 runs failed" in (error := capsys.readouterr().err)
    assert "trainer.strategy must start separate processes" in error


def test_two_processes_find_what_one_finds(write):
    file = write()
    assert study(file) == 0
    assert study(file, "--name", "two", "--processes", 2) == 0
    runs = file.parent / "runs"
    assert findings(runs / "two") == findings(runs / "tiny")


def test_a_machine_that_does_not_see_the_folder_sends_it_back(write, tmp_path, monkeypatch):
    """A Ray task gives the same result in the study's folder and in a folder of its own."""
    (run,) = load_study(write(axes={"method": "diffstride", "seed": 0})).runs
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "there"))
    archive = _remote_work(os.getcwd(), Path("/nowhere/study") / run.name, run.request, "token")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(tmp_path / "sent", filter="data")
    shared = tmp_path / "runs" / "shared"
    write_request(shared, run.request)
    (tmp_path / "runs" / ".token").touch()
    assert _remote_work(os.getcwd(), shared, run.request, "token") is None
    sent, seen = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "sent", shared))
    assert [sent[key] for key in ("accuracy", "loss", "strides")] == [seen[k] for k in ("accuracy", "loss", "strides")]


@pytest.mark.long
def test_a_process_that_dies_fails_its_run_alone(write, tmp_path, monkeypatch):
    (tmp_path / "dying_network.py").write_text(
        "import os, signal\nfrom diffstride.experiments.models import TinyCNN\n\nclass Dying(TinyCNN):\n"
        "    def forward(self, x):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    networks = {"dying": {"model.network.class_path": "dying_network.Dying"}, "firm": {"model.network.width": 5}}
    file = write(axes={"network": networks})
    assert study(file, "--processes", 2) == 1
    _, rows = read_study(file.parent / "runs" / "tiny")
    assert [row.state for row in rows] == ["failed", "done"]
    assert rows[0].error == "the process of the run was killed by SIGKILL"


def workers():
    """Return the process numbers of the Ray workers that do a run."""
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "ray::_remote_work" in line]


@pytest.mark.long
def test_two_workers_give_the_table_of_one_process(write):
    pytest.importorskip("ray")
    file = write()
    assert study(file) == 0
    assert study(file, "--name", "ray", "--ray", "local") == 0
    runs = file.parent / "runs"
    here, there = findings(runs / "tiny"), findings(runs / "ray")
    assert here.keys() == there.keys()
    for name, found in here.items():
        for key in "accuracy", "loss":
            assert there[name][key] == pytest.approx(found[key], abs=1e-6)
    assert {path.name for path in (runs / "ray").glob(".*")} == {".lock", ".diffstride-study"}


@pytest.mark.long
def test_a_worker_killed_in_the_middle_changes_nothing(write):
    pytest.importorskip("ray")
    whole, cut = (write(name, settings=SLOWER) for name in ("whole", "cut"))
    assert study(whole) == 0
    runs = whole.parent / "runs"
    checkpoint = runs / "cut" / "diffstride-3x3-seed0" / "checkpoints" / "last.ckpt"
    killed = []

    def kill_one():
        end = time.monotonic() + 120
        while time.monotonic() < end and not killed:
            if checkpoint.exists() and (found := workers()):
                os.kill(found[0], signal.SIGKILL)
                killed.append(found[0])
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert study(cut, "--ray", "local") == 0
    killer.join()
    assert killed
    assert findings(runs / "cut") == findings(runs / "whole")


@pytest.mark.long
def test_a_missing_or_small_cluster_is_one_line(write, capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "5")
    file = write()
    assert study(file, "--ray", "auto") == 2
    assert "--ray auto: no cluster answers" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert study(write("large", cpus=4096), "--ray", "local") == 2
    assert "CPUs, but a run takes 4096" in capsys.readouterr().err
    assert not (file.parent / "runs").exists()
