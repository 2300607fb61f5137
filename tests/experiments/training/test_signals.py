"""Signals to a training of several processes: all end soon, with a checkpoint to resume from."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffstride.experiments.history import read_dicts
from diffstride.experiments.training.signals import EndTogether
from tests.helpers.processes import PROCESSES

psutil = pytest.importorskip("psutil")
CONFIG = str(Path(__file__).parents[3] / "configs" / "demo.yaml")
BANDS = [
    "--config", CONFIG, "--data.train_samples", "640", "--data.test_samples", "32", "--data.batch_size", "32",
    "--model.network.width", "4", "--trainer.max_steps", "-1", "--trainer.enable_progress_bar", "false",
    "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--checkpoint_minutes", "1000",
]  # fmt: skip
MODULE = "diffstride.experiments.commands.main"
FIT = [sys.executable, "-m", MODULE, "fit", *BANDS, "--trainer.strategy", "ddp", "--trainer.devices", "2"]
SOON = 15  # seconds


@pytest.fixture
def training(tmp_path):
    """Start `diffstride fit` in two processes, and return them in the second epoch."""
    started = []

    def start(*more):
        process = subprocess.Popen(
            [*FIT, "--runs", str(tmp_path), "--name", "x", *more], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        end = time.monotonic() + 120
        while len(read_dicts(tmp_path / "x" / "metrics.csv")) < 14:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.05)
        (other,) = [child for child in psutil.Process(process.pid).children() if MODULE in child.cmdline()]
        return process, other

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process, other, began):
    """Return the printed lines when both processes have ended."""
    _, printed = process.communicate(timeout=SOON)
    other.wait(max(0.1, began + SOON - time.monotonic()))
    return printed.splitlines()


@pytest.mark.parametrize("to", ["all", "first", "second"])
def test_all_processes_end_together_with_a_checkpoint(training, tmp_path, to):
    number = signal.SIGINT if to == "all" else signal.SIGTERM
    process, other = training("--trainer.max_epochs", "100000")
    began = time.monotonic()
    if to == "all":
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid if to == "first" else other.pid, number)
    printed = ended(process, other, began)
    assert process.returncode == 1
    assert printed == ["diffstride: error: interrupted: resume with the same arguments and --ckpt_path last"]
    steps = [int(row["step"]) for row in read_dicts(tmp_path / "x" / "metrics.csv") if row["train/loss"]]
    saved = torch.load(tmp_path / "x" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == steps[-1] + 1 == len(steps)  # no step is lost


@pytest.mark.parametrize("to", ["first", "second"])
def test_no_process_outlives_one_that_was_killed(training, to):
    process, other = training("--trainer.max_epochs", "100000")
    began = time.monotonic()
    os.kill(process.pid if to == "first" else other.pid, signal.SIGKILL)
    printed = ended(process, other, began)
    assert not any("Traceback" in line for line in printed)
    assert len(printed) <= 1


def _waits_in_vain():
    end = EndTogether()
    end.GRACE = 1
    end._note()
    time.sleep(60)


def test_a_process_that_the_others_do_not_answer_ends_all_the_same():
    process = PROCESSES.Process(target=_waits_in_vain)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGALRM


@pytest.mark.long
def test_a_resumed_training_of_two_processes_ends_as_an_uninterrupted_one(training, tmp_path):
    epochs = ["--trainer.max_epochs", "12"]
    process, other = training(*epochs)
    began = time.monotonic()
    os.kill(other.pid, signal.SIGTERM)
    ended(process, other, began)
    assert (tmp_path / "x" / "checkpoints" / "last.ckpt").exists()
    command = [*FIT, *epochs, "--runs", str(tmp_path)]
    for more in ["--name", "x", "--ckpt_path", "last"], ["--name", "whole"]:
        subprocess.run([*command, *more], check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, two = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("x", "whole"))
    assert one["global_step"] == two["global_step"] == 120
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(value, two["state_dict"][name], rtol=0, atol=0)
    for name in "metrics.csv", "strides.csv":
        assert read_dicts(tmp_path / "x" / name) == read_dicts(tmp_path / "whole" / name)
