"""Studies on Ray: the table is that of one process, also when a worker is lost."""

import os
import signal
import subprocess
import threading
import time

import pytest

from tests.helpers.studies import SLOWER, findings, study

pytest.importorskip("ray")
# Ray leaves sockets and files to the end of the process, and warns of what a later version will do.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def workers():
    """Process numbers of the Ray workers that do a run."""
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "ray::_remote_work" in line]


@pytest.mark.long
def test_two_workers_give_the_table_of_one_process(write):
    file = write()
    assert study(file) == 0
    assert study(file, "--name", "ray", "--ray", "local") == 0
    runs = file.parent / "runs"
    here, there = findings(runs / "tiny"), findings(runs / "ray")
    assert here.keys() == there.keys()
    for name, found in here.items():
        for key in "accuracy", "loss":
            assert there[name][key] == pytest.approx(found[key], abs=1e-6)
    assert [path.name for path in (runs / "ray").glob(".*")] == [".lock"]


@pytest.mark.long
def test_a_worker_killed_in_the_middle_changes_nothing(write):
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
def test_what_ray_cannot_do_is_said(write, capsys, monkeypatch):
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "5")
    file = write()
    assert study(file, "--ray", "auto") == 2
    assert "--ray auto: no cluster answers: start one with `ray start --head`" in capsys.readouterr().err
    assert study(write("large", cpus=4096), "--ray", "local") == 2
    assert "CPUs, but a run takes 4096" in capsys.readouterr().err
    assert not (file.parent / "runs").exists()
