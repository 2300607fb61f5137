"""Runs that are interrupted or killed: a resumed run ends as an uninterrupted one."""

import json
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffstride.errors import InterruptedRunError
from diffstride.experiments.commands.main import main
from diffstride.experiments.history import read_dicts
from diffstride.experiments.training import Classifier, fit
from diffstride.experiments.training.checkpoints import read_checkpoint
from diffstride.experiments.training.fit import train
from tests.helpers.processes import ended, killed_again_and_again, start, warm_up

CONFIG = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
OFTEN = ["--checkpoint_minutes", "0", "--trainer.log_every_n_steps", "2", "--trainer.enable_progress_bar", "false"]
BANDS = [
    "--config", CONFIG, *OFTEN,
    "--data.train_samples", "224", "--data.test_samples", "64", "--data.batch_size", "32", "--model.network.width", "4",
    "--model.milestones", "[3,8,12]", "--trainer.max_steps", "-1", "--trainer.max_epochs", "3",
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Arguments of a training on images from files, augmented, with dropout and a budget."""
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for split, count in ("train", 60), ("test", 12):
        for i in range(count):
            path = tmp_path / "set" / split / f"class{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return [
        *OFTEN, "--data", "ImageData", "--data.path", str(tmp_path / "set"), "--data.batch_size", "8",
        "--data.cache_gb", "0", "--data.augment.pad_crop", "2",
        "--data.augment.flip", "true", "--data.augment.mixup", "0.2",
        "--model.network", "tests.helpers.processes.Dropped", "--model.network.num_classes", "3",
        "--model.network.in_channels", "3",
        "--model.learning_rates", "[0.05]", "--model.budget", "2.2", "--trainer.max_epochs", "3",
        "--trainer.accumulate_grad_batches", "2", "--trainer.accelerator", "cpu",
    ]  # fmt: skip


def same(whole, killed):
    """Weights, strides, optimiser, metrics and result."""
    contents = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, killed)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        one, two = (json.dumps(_plain(content[key])) for content in contents)
        assert one == two, key
    for name in ("metrics.csv", "strides.csv"):
        assert read_dicts(killed / name) == read_dicts(whole / name), name
    results = [json.loads((f / "result.json").read_text()) for f in (whole, killed)]
    for name in ("step_time_ms", "train_seconds", "peak_memory_mb"):
        results[0].pop(name), results[1].pop(name)
    assert results[0] == results[1]


def _plain(value):
    if isinstance(value, torch.Tensor):
        return value.double().tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def through_kills(arguments, tmp_path, kills, least, seed=0):
    """Kill runs until at least this many kills found one at work; each must end as one never interrupted.

    Returns whether any kill left a checkpoint unfinished.
    """
    warm_up()
    begin = time.monotonic()
    assert ended(start([*arguments, "--runs", str(tmp_path), "--name", "whole"])) == 0
    seconds = time.monotonic() - begin
    at_work = unfinished = 0
    while at_work < least:  # a machine that has become faster ends a run before all kills
        name = f"killed{seed}"
        found = killed_again_and_again(
            [*arguments, "--runs", str(tmp_path), "--name", name], tmp_path / name, kills, seed, seconds
        )
        same(tmp_path / "whole", tmp_path / name)
        at_work, unfinished, seed = at_work + found[0], unfinished + found[1], seed + 100
    return bool(unfinished)


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("step", [2, 7])
def test_an_epoch_that_was_cut_off_goes_on_with_the_batch_that_follows(pictures, tmp_path, monkeypatch, workers, step):
    """Steps 2 and 7 are within the first epoch and the second, of 4 steps."""
    arguments = [*pictures, "--data.num_workers", workers, "--trainer.max_epochs", "2", "--runs", str(tmp_path)]
    train([*arguments, "--name", "whole"])

    class CutOff(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == step:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit, "Classifier", CutOff)
        with pytest.raises(InterruptedRunError, match="--ckpt_path last"):
            train([*arguments, "--name", "killed"])
    train([*arguments, "--name", "killed", "--ckpt_path", "last"])
    same(tmp_path / "whole", tmp_path / "killed")


def test_a_machine_that_gives_notice_takes_nothing_away(pictures, tmp_path, monkeypatch):
    """Between checkpoints, in the middle of an epoch of four steps, the last of them logged."""
    arguments = [*pictures, "--checkpoint_minutes", "1000", "--trainer.max_epochs", "2", "--runs", str(tmp_path)]
    train([*arguments, "--name", "whole"])

    class Noticed(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 6 and batch_idx % 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(fit, "Classifier", Noticed)
        with pytest.raises(InterruptedRunError, match="--ckpt_path last"):
            train([*arguments, "--name", "killed"])
    assert read_checkpoint(tmp_path / "killed" / "checkpoints" / "last.ckpt")["global_step"] == 6
    train([*arguments, "--name", "killed", "--ckpt_path", "last"])
    same(tmp_path / "whole", tmp_path / "killed")


def kill_a_worker():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def lose_a_connection(unread):
    """Read from a process that has ended, as the loader does if it notices the missing batch before the end."""
    mine, other = multiprocessing.Pipe()
    if unread:
        mine.send(0)
    other.close()
    mine.recv()


@pytest.mark.parametrize(
    "end", [kill_a_worker, partial(lose_a_connection, False), partial(lose_a_connection, True)],
    ids=["killed", "end of file", "reset"],
)  # fmt: skip
def test_a_worker_that_ends_is_named_with_the_cure(pictures, tmp_path, monkeypatch, capsys, end):
    class Kills(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 5:
                end()

    arguments = [*pictures, "--data.num_workers", "2", "--trainer.max_epochs", "1000", "--runs", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "Classifier", Kills)
        assert main(["fit", *arguments, "--name", "x"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "DataLoader worker ended (" in error
    assert "lower data.num_workers" in error
    assert "--ckpt_path last" in error


def test_a_picture_that_a_worker_cannot_read_is_named(pictures, tmp_path, capsys):
    broken = tmp_path / "set" / "train" / "class1" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    arguments = [*pictures, "--data.num_workers", "2", "--runs", str(tmp_path), "--name", "x"]
    assert main(["fit", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(broken) in error


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--model.exploration", "Sweep"]], ids=["bands", "sweep"])
def test_a_run_killed_at_random_moments_ends_as_one_never_interrupted(tmp_path, more):
    through_kills([*BANDS, *more], tmp_path, 6, 2)


@pytest.mark.long
def test_so_does_one_with_augmentation_dropout_budget_and_accumulated_gradients(pictures, tmp_path):
    through_kills(pictures, tmp_path, 6, 2, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_twenty_kills(pictures, tmp_path, seed):
    assert through_kills([*pictures, "--trainer.max_epochs", "12"], tmp_path, 20, 10, seed)
