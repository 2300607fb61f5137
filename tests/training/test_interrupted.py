"""Killed, or out of disk: what was reached is kept, and a resumed run ends as one that was never interrupted."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from killing import ended, killed_again_and_again, start, warm_up

pytestmark = pytest.mark.long  # some seconds for each start

CONFIG = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
OFTEN = ["--checkpoint_minutes", "0", "--trainer.log_every_n_steps", "2", "--trainer.enable_progress_bar", "false"]
BANDS = [
    "--config", CONFIG, *OFTEN,
    "--data.train_samples", "224", "--data.test_samples", "64", "--data.batch_size", "32", "--model.network.width", "4",
    "--model.milestones", "[3,8,12]", "--trainer.max_steps", "-1", "--trainer.max_epochs", "3",
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Arguments of a training on images from files, loaded by workers, augmented, with dropout and a budget."""
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for split, count in ("train", 60), ("test", 12):
        for i in range(count):
            path = tmp_path / "set" / split / f"class{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return [
        *OFTEN, "--data", "ImageData", "--data.path", str(tmp_path / "set"), "--data.batch_size", "8",
        "--data.cache", "false", "--data.num_workers", "2", "--data.augment.pad_crop", "2",
        "--data.augment.flip", "true", "--data.augment.mixup", "0.2",
        "--model.network", "killing.Dropped", "--model.network.num_classes", "3", "--model.network.in_channels", "3",
        "--model.learning_rates", "[0.05]", "--model.budget", "0.5", "--trainer.max_epochs", "3",
        "--trainer.accumulate_grad_batches", "2", "--trainer.accelerator", "cpu",
    ]  # fmt: skip


def same(whole, killed):
    """Weights, strides, optimiser, metrics and result."""
    contents = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, killed)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        one, two = (json.dumps(_plain(content[key])) for content in contents)
        assert one == two, key
    for name in ("metrics.csv", "strides.csv"):
        assert (killed / name).read_text() == (whole / name).read_text(), name
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


def through_kills(arguments, tmp_path, kills, seed=0):
    places = [["--runs", str(tmp_path), "--name", name] for name in ("whole", "killed")]
    warm_up()
    begin = time.monotonic()
    assert ended(start([*arguments, *places[0]])) == 0
    seconds = time.monotonic() - begin
    counts = killed_again_and_again([*arguments, *places[1]], tmp_path / "killed", kills, seed, seconds)
    same(tmp_path / "whole", tmp_path / "killed")
    return counts


@pytest.mark.parametrize("more", [[], ["--model.exploration", "Sweep"]], ids=["bands", "sweep"])
def test_a_run_killed_at_random_moments_ends_as_one_never_interrupted(tmp_path, more):
    at_work, _ = through_kills([*BANDS, *more], tmp_path, 6)
    assert at_work >= 2


def test_so_does_one_with_workers_augmentation_dropout_budget_and_accumulated_gradients(pictures, tmp_path):
    at_work, _ = through_kills(pictures, tmp_path, 6, seed=1)
    assert at_work >= 2


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_twenty_kills(pictures, tmp_path, seed):
    at_work, unfinished = through_kills([*pictures, "--trainer.max_epochs", "12"], tmp_path, 20, seed)
    assert at_work >= 10
    assert unfinished
