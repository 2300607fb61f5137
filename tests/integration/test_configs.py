"""The shipped configurations run, on real images where they are at hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from diffstride.errors import UsageError
from diffstride.experiments.training.fit import parse, train

ROOT = Path(__file__).parents[2]
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"
FSDD = ROOT.parent / "shared" / "data" / "fsdd"
SHORT = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not at hand")
@pytest.mark.parametrize("name", ["cifar10", "cifar10-small", "release"])
@pytest.mark.parametrize("method", ["diffstride", "conv"])
def test_two_steps_on_real_images(name, method, tmp_path):
    # Not narrower: see `steps` in diffstride.experiments.benchmark.suites.
    cli = train([
        "--config", str(ROOT / "configs" / f"{name}.yaml"), "--data.path", str(CIFAR10), "--runs", str(tmp_path),
        "--data.train_samples", "256", "--data.test_samples", "100", "--model.network.width", "0.125",
        "--model.network.downsample", method, "--trainer.max_steps", "2", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false",
    ])  # fmt: skip
    result = json.loads((cli.run_folder / "result.json").read_text())
    assert 0 <= result["accuracy"] <= 1
    # log(10) = 2.3 for a network that knows nothing. In the release's norm, maps are larger than batch norms know yet.
    assert result["loss"] < (10 if name == "release" else 4)
    strides = {"diffstride": {"cifar10": 5, "cifar10-small": 3, "release": 4}[name], "conv": 0}[method]
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


@pytest.mark.skipif(not FSDD.exists(), reason="FSDD is not at hand")
@pytest.mark.parametrize(
    ("name", "over", "classes"),
    [
        ("fsdd", None, 10),
        ("fsdd", "fsdd-speaker", 6),
        ("fsdd", "fsdd-new-speaker", 10),
        ("audio", None, 10),
        ("audio", "audio/nsynth-pitch", 10),
    ],
)
def test_two_steps_on_real_sounds(name, over, classes, tmp_path):
    options = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
    if over:
        options += ["--config", str(ROOT / "configs" / f"{over}.yaml")]
    options += ["--data.path", str(FSDD), "--data.train_samples", "128", "--data.test_samples", "30"]
    if over != "fsdd-speaker":
        options += ["--data.label_column", "digit"]
    options += ["--model.network.width", "0.0625", "--model.network.num_classes", str(classes), "--runs", str(tmp_path)]
    cli = train([*options, "--data.subset", "null", *SHORT])
    result = json.loads((cli.run_folder / "result.json").read_text())
    assert math.isfinite(result["loss"])
    assert result["axes"] == {"time": "Hz", "frequency": "cycles per mel band"}
    starts = [s for layer in result["strides_initial"].values() for s in layer]
    assert starts == [2, 2, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2]
    if over == "fsdd-new-speaker":
        assert set(cli.datamodule.groups) == {"george", "jackson", "lucas", "nicolas", "yweweler"}
    assert cli.datamodule.sample_shape == ((1, 100, 64) if name == "fsdd" else (1, 160, 64))


@pytest.mark.skipif(not FSDD.exists(), reason="FSDD is not at hand")
def test_two_steps_on_both_tasks_of_real_sounds(tmp_path):
    both = tmp_path / "both.yaml"
    both.write_text((ROOT / "configs" / "fsdd-both.yaml").read_text().replace("data/fsdd", str(FSDD)))
    options = ["--config", str(ROOT / "configs" / "fsdd.yaml"), "--config", str(both)]
    cli = train([*options, "--model.network.width", "0.0625", "--runs", str(tmp_path), *SHORT])
    result = json.loads((cli.run_folder / "result.json").read_text())
    assert result["accuracies"].keys() == {"digit", "speaker"}
    assert result["accuracy"] == pytest.approx(sum(result["accuracies"].values()) / 2)


@pytest.mark.parametrize(("name", "axes"), [("sounds", ["time", "frequency"]), ("tones", ["time"])])
def test_two_steps_on_sounds_made_by_code(name, axes, tmp_path):
    options = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--data.train_samples", "128"]
    cli = train([*options, "--data.test_samples", "32", "--runs", str(tmp_path), *SHORT])
    result = json.loads((cli.run_folder / "result.json").read_text())
    assert list(result["axes"]) == axes
    assert math.isfinite(result["loss"])


def test_two_steps_on_a_time_series_meet_half_of_the_cost(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "Toy").mkdir()
    for split in "TRAIN", "TEST":
        lines = ("\t".join(map(str, [i % 6, *rng.normal(size=100).round(4)])) for i in range(24))
        (tmp_path / "Toy" / f"Toy_{split}.tsv").write_text("\n".join(lines))
    options = ["--config", str(ROOT / "configs" / "series.yaml"), "--data.path", str(tmp_path / "Toy")]
    cli = train([*options, "--model.search_steps", "2", "--runs", str(tmp_path), *SHORT])
    result = json.loads((cli.run_folder / "result.json").read_text())
    # Taps of 7, 5 and 3, channels of 64, 128 and 64, and six classes.
    full = 100 * (7 * 64 + 5 * 64 * 128 + 3 * 128 * 64) + 6 * 64
    assert (result["macs"] + result["resampling_macs"]) / full == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "audio").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_goes_over_a_configuration_is_understood(path):
    arguments = ["--config", str(ROOT / "configs" / "audio.yaml"), "--config", str(path)]
    config = parse(arguments)
    assert "Over configs/audio.yaml." in path.read_text()
    assert config.model.network.init_args.num_classes != parse(arguments[:2]).model.network.init_args.num_classes or (
        path.stem == "speech-commands"  # which the base is
    )


def test_every_configuration_has_a_test():
    small = {"cifar10-small", "fsdd-speaker", "fsdd-new-speaker", "fsdd-both"}
    names = {"demo", "series", "cifar10", "release", "imagenet", "densenet", "audio", "fsdd", "sounds", "tones"} | small
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == names


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("fsdd", ["--data.features.bands", "0"], "features.bands must be >= 1, got 0"),
        ("cifar10", ["--data.image_size", "0"], "image_size must be >= 1, got 0"),
    ],
)
def test_a_data_set_explains_a_wrong_argument_alone(name, arguments, message, tmp_path):
    with pytest.raises(UsageError) as error:
        train(["--config", str(ROOT / "configs" / f"{name}.yaml"), "--runs", str(tmp_path), *arguments])
    assert str(error.value) == message
