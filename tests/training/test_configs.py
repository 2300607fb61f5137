"""The shipped configurations run, on real images where they are at hand."""

import json
import math
from pathlib import Path

import pytest

from diffstride.training.fit import train

ROOT = Path(__file__).parents[2]
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"


@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not at hand")
@pytest.mark.parametrize("name", ["cifar10", "cifar10-small"])
@pytest.mark.parametrize("method", ["diffstride", "conv"])
def test_two_steps_on_real_images(name, method, tmp_path):
    # Not narrower: see `steps` in diffstride.studies.bench.
    cli = train([
        "--config", str(ROOT / "configs" / f"{name}.yaml"), "--data.path", str(CIFAR10), "--runs", str(tmp_path),
        "--data.train_samples", "256", "--data.test_samples", "100", "--model.network.width", "0.125",
        "--model.network.downsample", method, "--trainer.max_steps", "2", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false",
    ])  # fmt: skip
    result = json.loads((cli.run_folder / "result.json").read_text())
    assert 0 <= result["accuracy"] <= 1
    assert result["loss"] < 4  # log(10) = 2.3 for a network that knows nothing
    strides = {"diffstride": 5 if name == "cifar10" else 3, "conv": 0}[method]
    assert len(result["strides"]) == strides


@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not at hand")
@pytest.mark.parametrize(
    ("name", "strides", "smaller"),
    [
        ("imagenet", 3, ["--model.network.width", "0.0625", "--data.image_size", "40", "--data.batch_size", "16",
                         "--data.augment.resized_crop", "32"]),
        ("densenet", 2, ["--model.network.depth", "16", "--model.network.growth", "2"]),
    ],
)  # fmt: skip
def test_two_steps_of_large_configurations_made_small(name, strides, smaller, tmp_path):
    cli = train([
        "--config", str(ROOT / "configs" / f"{name}.yaml"), "--data.path", str(CIFAR10), "--runs", str(tmp_path),
        "--data.train_samples", "128", "--data.test_samples", "32", *smaller, "--trainer.max_steps", "2",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--model.network.num_classes", "10",
    ])  # fmt: skip
    result = json.loads((cli.run_folder / "result.json").read_text())
    assert math.isfinite(result["loss"])
    assert len(result["strides"]) == strides


def test_every_configuration_has_a_test():
    names = {"demo", "cifar10", "cifar10-small", "imagenet", "densenet"}
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == names
