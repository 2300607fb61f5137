"""A run from arguments to its folder: its files, its repetition, its resumption, and refused arguments."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffstride.cost import CostModel, count_macs
from diffstride.errors import RunError, UsageError
from diffstride.experiments import history
from diffstride.experiments.commands.main import main
from diffstride.experiments.training import Classifier, classifier, fit
from diffstride.experiments.training.documents import load_yaml
from diffstride.experiments.training.measured import SearchSplit
from diffstride.nn import learnable_layers
from tests.helpers.runs import CONFIG, SMALL


def weights(cli):
    return {k: v.clone() for k, v in cli.model.network.state_dict().items()}


def without_times(result):
    return {k: v for k, v in result.items() if k not in ("step_time_ms", "train_seconds", "peak_memory_mb")}


def test_a_run_leaves_its_files_and_repeats_from_its_own_config(run):
    cli, result = run("one", steps=12)
    folder = cli.run_folder
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    expected = {"config.yaml", "metrics.csv", "strides.csv", "result.json", "strides.png", "strides.svg"}
    assert expected | {"checkpoints/last.ckpt"} <= left
    assert any(name.startswith("tensorboard/events") for name in left)

    rows = history.read_rows(folder / "strides.csv")
    assert (rows[0].step, rows[0].stride) == (0, 3.0)
    assert rows[-1].step == 12
    assert [round(s, 4) for s in result["strides"]["down"]] == [round(r.stride, 4) for r in rows[-2:]]
    assert result["strides_initial"] == {"down": [3.0, 3.0]}
    assert result["parameters"] == sum(p.numel() for p in cli.model.network.parameters())
    assert result["stride_cost"] == pytest.approx(1 / math.prod(result["strides"]["down"]))
    assert {"torch", "diffstride", "lightning"} <= set(result["versions"])
    assert result["data_fingerprint"] == cli.datamodule.fingerprint
    metrics = history.read_dicts(folder / "metrics.csv")
    accuracies = [float(m["val/accuracy"]) for m in metrics if m["val/accuracy"]]
    assert accuracies[-1] == pytest.approx(result["accuracy"])

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["init_args"]["train_samples"] == 192
    again = folder.parent / "again.yaml"
    again.write_text(yaml.safe_dump(config | {"name": "two"}))
    twin, twin_result = run("two", "--config", str(again))
    assert without_times(twin_result) == without_times(result)
    assert all(torch.equal(a, b) for a, b in zip(weights(cli).values(), weights(twin).values(), strict=True))


def test_a_resumed_run_ends_as_an_uninterrupted_one(run, tmp_path):
    whole, result = run("whole", "--trainer.max_epochs", "3", "--trainer.max_steps", "-1")
    assert result["strides_initial"] == {"down": [3.0, 3.0]}
    # Interrupted twice, with rows in the files that were written after the checkpoint.
    half, _ = run("half", "--trainer.max_epochs", "1", "--trainer.max_steps", "-1")
    for epochs in "2", "3":
        history.append_rows(half.run_folder / "strides.csv", [history.StrideRow(17, "down", "height", 99.0, 1)])
        with (half.run_folder / "metrics.csv").open("a") as file:
            file.write(",".join([str(6 * (int(epochs) - 1))] * 8) + "\n")
        resumed, resumed_result = run(
            "half", "--trainer.max_epochs", epochs, "--trainer.max_steps", "-1", "--ckpt_path", "last"
        )
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))
    assert without_times(resumed_result) == without_times(result)
    for name in ("strides.csv", "metrics.csv"):
        assert (half.run_folder / name).read_text() == (whole.run_folder / name).read_text(), name


def test_a_run_that_ends_inside_an_epoch_is_evaluated_as_it_is(run):
    cli, result = run("short", steps=8)  # an epoch has 6 steps
    images, labels = cli.datamodule.test_set
    with torch.no_grad():
        predicted = cli.model.network.eval()(images).argmax(-1)
    assert result["accuracy"] == pytest.approx((predicted == labels).float().mean().item())
    assert (result["steps"], result["macs"]) == (8, count_macs(cli.model.network, images[:1]).model)
    assert result["epochs"] == 1.333


def test_a_run_is_not_resumed_with_another_network(run, tmp_path, capsys):
    cli, _ = run("one", steps=3)
    before = {path: path.read_bytes() for path in cli.run_folder.glob("*.*")}
    assert main(["fit", *SMALL, "--runs", str(tmp_path), "--name", "one", "--ckpt_path", "last",
                 "--model.network.width", "5", "--trainer.max_steps", "4"]) == 2  # fmt: skip
    assert "is of another network: resume with --config" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in cli.run_folder.glob("*.*")} == before


def test_a_name_is_free_again_after_a_mistake_and_the_command_prints_the_outcome(tmp_path, capsys):
    arguments = ["fit", *SMALL, "--runs", str(tmp_path), "--name", "one", "--trainer.max_steps", "2"]
    assert main([*arguments, "--model.network.num_classes", "3"]) == 2
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    macs = (result["macs"] + result["resampling_macs"]) / 1e6
    assert f"accuracy {result['accuracy']:.4f}, strides 3.00x3.00, {macs:.2f} million MACs per sample" in printed
    assert "DIFFSTRIDE_RUN_NAME" not in os.environ


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_precisions(run, precision):
    cli, result = run("one", "--trainer.precision", precision, steps=2)
    assert result["accuracy"] is not None
    assert cli.model.network.down.stride.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert result["macs"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model.network.strides [[0.5,1]]", "stride must be >= 1"),
        ("--model.network.in_channels 3", "in_channels"),
        ("--model.budget 0.5 --model.network.downsample conv", "must have learnable strides to meet a budget"),
        ("--ckpt_path last", "last.ckpt (No such file"),
        ("--runs /dev/null", "cannot open /dev/null/x"),
        ("--trainer.logger false", "trainer.logger cannot be set"),
        ("--trainer.default_root_dir x", "unknown key trainer.default_root_dir"),
        ("--trainer.enable_checkpointing false", "enable_checkpointing=False"),
        ("--trainer.strategy ddp_spawn", "trainer.strategy must start separate processes"),
        ("--trainer.callbacks [ModelCheckpoint,ModelCheckpoint]", "more than one stateful callback"),
        ("--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor nope", "nope"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, words, tmp_path, capsys):
    given = ["--runs", str(tmp_path), "--name", "x", "--trainer.max_steps", "6", *arguments.split()]
    assert main(["fit", *SMALL, *given]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1, error
    assert not (tmp_path / "x" / "result.json").exists()


FURTHER = {
    "without monitor": [],
    "weights alone": ["--trainer.callbacks.save_weights_only", "true", "--trainer.callbacks.save_last", "true"],
    "the best": ["--trainer.callbacks.monitor", "val/accuracy", "--trainer.callbacks.mode", "max"],
}  # fmt: skip


@pytest.mark.parametrize("options", FURTHER.values(), ids=FURTHER)
def test_a_further_checkpoint_callback_has_a_folder_of_its_own(run, options):
    """A run resumes from its own checkpoints, whatever else is saved."""
    epochs = ["--trainer.max_steps", "-1", "--trainer.max_epochs"]
    further = ["--trainer.callbacks+=ModelCheckpoint", *options]
    cli, _ = run("one", *epochs, "1", *further)
    own = {path.name for path in (cli.run_folder / "checkpoints").iterdir()}
    assert own == {"last.ckpt", "epoch=0.ckpt"}
    assert any((cli.run_folder / "more_checkpoints").glob("epoch=0*.ckpt"))
    _, result = run("one", *epochs, "2", *further, "--ckpt_path", "last")
    assert result["epochs"] == 2


def test_a_lost_stride_stops_the_run_and_names_the_layer(run, monkeypatch):
    class Lost(Classifier):
        def on_before_optimizer_step(self, optimizer):
            self.network.down.stride.grad.fill_(math.nan)

    monkeypatch.setattr(fit, "Classifier", Lost)
    with pytest.raises(RunError, match=r"epoch 0, step 1: the stride of down became \(nan, nan\): lower"):
        run("lost", steps=3)


def test_a_run_that_diverges_stops_with_one_line_and_leaves_no_result(tmp_path, capsys):
    arguments = [*SMALL, "--runs", str(tmp_path), "--name", "wild"]
    rates = ["--model.learning_rates", "[1e6]", "--model.milestones", "[]", "--trainer.log_every_n_steps", "5"]
    assert main(["fit", *arguments, *rates, "--trainer.max_steps", "60"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"error: epoch \d+, step \d+: (the loss|the stride of down) .*lower learning_rates", error)
    assert error.count("\n") == 1
    left = {str(path.relative_to(tmp_path / "wild")) for path in (tmp_path / "wild").rglob("*")}
    assert "config.yaml" in left
    assert not left & {"result.json", "checkpoints/last.ckpt"}


@pytest.mark.parametrize(
    ("step", "more", "message"),
    [
        (7, [], "epoch 1, step 9: the loss became NaN or infinite, first in network.conv, whose weight is"),
        (11, [], "epoch 1, step 12: val/loss became NaN or infinite, first in network.conv, whose weight is"),
        (11, ["--trainer.limit_val_batches", "0"], r"epoch 1, step 12: network\.\w+\.weight became NaN"),
    ],
)
def test_the_last_checkpoint_is_one_from_before_the_divergence(run, tmp_path, monkeypatch, step, more, message):
    class Lost(Classifier):
        def on_before_optimizer_step(self, optimizer):
            if self.trainer.global_step == step:
                self.network.conv.weight.grad.fill_(math.nan)

    monkeypatch.setattr(fit, "Classifier", Lost)
    with pytest.raises(RunError, match=f"{message}.*the last good checkpoint is .*last.ckpt .step 6"):
        run("lost", "--model.network.downsample", "conv", "--trainer.max_epochs", "5", *more, steps=-1)
    saved = torch.load(tmp_path / "lost" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert not (tmp_path / "lost" / "result.json").exists()


@pytest.mark.long
def test_ctrl_c_ends_cleanly_and_the_run_can_be_resumed(tmp_path):
    arguments = [
        sys.executable, "-m", "diffstride.experiments.commands.main", "fit", "--config", CONFIG,
        "--runs", str(tmp_path),
        "--data.train_samples", "640", "--trainer.max_epochs", "6", "--trainer.max_steps", "-1",
    ]  # fmt: skip
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    last = tmp_path / "demo" / "checkpoints" / "last.ckpt"
    deadline = time.time() + 120
    while not last.exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Traceback" not in error
    assert "--ckpt_path last" in error
    assert not (tmp_path / "demo" / "result.json").exists()
    done = subprocess.run([*arguments, "--ckpt_path", "last"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "result.json").exists()


def test_a_budget_is_met(run):
    inner = ["--model.network.downsample_options.window", "inner", "--model.milestones", "[3,60,80]"]
    cli, result = run("budget", "--model.budget", "1", *inner, steps=120)
    # 3x3 convolutions, 1 to 4 channels before the stride of 3 and 4 to 8 after it, and a linear layer with 4 outputs.
    _, height, width = cli.datamodule.sample_shape
    original = 9 * 4 * height * width + 9 * 4 * 8 * math.ceil(height / 3) * math.ceil(width / 3) + 8 * 4
    assert result["macs_budget"] == pytest.approx(original)
    assert abs((result["macs"] + result["resampling_macs"]) / original - 1) < 0.02
    metrics = [float(m["train/macs"]) for m in history.read_dicts(cli.run_folder / "metrics.csv") if m["train/macs"]]
    assert metrics[0] / original > 1.1  # it came from above


def test_a_search_before_the_training_leaves_only_its_strides(run, monkeypatch):
    """Allocations are compared with trained weights. Then the weights are those of strides found from the start."""
    compared, splits = [], []
    find_strides = CostModel.find_strides
    for name in "recalibrated_loss", "augmented_batches":
        original = getattr(classifier, name)

        def watched(*given, name=name, original=original, **options):
            splits.append((name, options.get("split", given[-1])))
            return original(*given, **options)

        monkeypatch.setattr(classifier, name, watched)

    def record(cost, *given, **options):
        compared.append(cost.model.down.stride.clone())
        compared.append(cost.model.state_dict()["conv.weight"].clone())
        return find_strides(cost, *given, **options)

    monkeypatch.setattr(CostModel, "find_strides", record)
    inner = ["--model.network.downsample_options.window", "inner", "--model.network.strides"]
    search = ["--model.stride_search", "measured", "--model.stride_steps", "0", "--model.budget", "0.8"]
    found = []
    for steps, rounds in ("0", "1"), ("12", "1"), ("12", "2"):
        rounded = ["--model.search_steps", steps, "--model.search_rounds", rounds]
        cli, result = run(f"after{steps}x{rounds}", *inner, "[[2,2]]", *search, *rounded, steps=4)
        found.append([layer.entries for _, layer in learnable_layers(cli.model.network)])
    first, other = (SearchSplit.of(cli.datamodule, number) for number in (0, 1))
    once = [("recalibrated_loss", first), ("augmented_batches", first)]
    assert splits[0] == ("recalibrated_loss", None)  # nothing is trained before
    assert splits[1:] == [*once, *once, ("recalibrated_loss", other), ("augmented_batches", other)]
    untrained, trained, again, second = compared[1::2]
    assert not torch.equal(untrained, trained)
    assert torch.equal(trained, again)
    assert not torch.equal(second, trained)  # at the strides of the first round, from the same weights
    assert not torch.equal(second, untrained)
    starts = [tuple(stride.tolist()) for stride in compared[::2]]
    assert starts[:3] == [(2, 2)] * 3
    assert starts[3] == pytest.approx(found[1][0])
    strides = found[2]
    assert strides != [(2.0, 2.0)]
    fixed, _ = run("fixed", *inner, json.dumps(strides), "--model.stride_lr", "0", steps=4)
    assert result["strides"] == {"down": list(strides[0])}
    for name, value in weights(fixed).items():
        assert torch.equal(value, weights(cli)[name]), name


def test_a_network_of_the_working_directory_is_found(tmp_path):
    """In a process of its own, as a user starts it; a file there that is named like a package hides none."""
    (tmp_path / "mynet.py").write_text(
        "from diffstride.experiments.models import TinyCNN\n\n\nclass Mine(TinyCNN):\n    pass\n"
    )
    (tmp_path / "lightning.py").write_text("raise ImportError('not this one')\n")
    arguments = [*SMALL, "--model.network", "mynet.Mine", "--trainer.max_steps", "1", "--name", "own"]
    command = [str(Path(sys.executable).parent / "diffstride"), "fit", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "mynet.Mine" in (tmp_path / "runs" / "own" / "config.yaml").read_text()


def test_a_further_logger_has_all_that_the_files_of_the_run_have(run, tmp_path):
    given = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(tmp_path / "own")]
    cli, _ = run("one", *given, "--trainer.log_every_n_steps", "1", steps=12)
    (folder,) = {path.parent for path in (tmp_path / "own").rglob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    rows = history.read_rows(cli.run_folder / "strides.csv")
    assert {row.step for row in rows} == {0, 1, 6, 10, 12}
    for row in rows:
        assert scalars[f"stride/{row.layer}/{row.axis}"][row.step] == pytest.approx(row.stride, abs=1e-5)
        assert scalars[f"size/{row.layer}/{row.axis}"][row.step] == row.size
    metrics = [row for row in history.read_dicts(cli.run_folder / "metrics.csv") if row["val/accuracy"]]
    assert len(metrics) == 2
    for row in metrics:
        assert scalars["val/accuracy"][int(row["step"])] == pytest.approx(float(row["val/accuracy"]))
    assert scalars["train/macs"][12] == pytest.approx(sum(count_macs(cli.model.network, cli.model.example())))
    settings = load_yaml((folder / "hparams.yaml").read_text())
    assert settings["data"]["init_args"]["batch_size"] == 32
    assert settings["trainer"]["log_every_n_steps"] == 1  # which the short help does not show


def test_a_run_without_a_terminal_prints_a_line_for_each_epoch(tmp_path, capsys):
    arguments = [a for a in SMALL if a not in ("--trainer.enable_progress_bar", "false")]
    more = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--runs", str(tmp_path), "--name", "lines"]
    assert main(["fit", *arguments, "--trainer.max_steps", "3", "--runs", str(tmp_path), "--name", "within"]) == 0
    assert [line.split(",")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")] == [
        ["epoch 1", " step 3"]
    ]
    assert main(["fit", *arguments, *more]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    rows = [m for m in history.read_dicts(tmp_path / "lines" / "metrics.csv") if m["val/accuracy"]]
    strides = json.loads((tmp_path / "lines" / "result.json").read_text())["strides"]["down"]
    assert len(lines) == len(rows) == 2
    for line, row, epoch in zip(lines, rows, (1, 2), strict=True):
        assert line.startswith(f"epoch {epoch}, step ")
        assert f"accuracy {float(row['val/accuracy']):.4f}" in line
        assert f"validation loss {float(row['val/loss']):.4f}" in line
    assert lines[-1].endswith("strides " + "x".join(f"{s:.2f}" for s in strides))


def test_paths_of_data_are_kept_absolute_and_names_of_the_hub_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/sounds").mkdir(parents=True)
    sounds = {"class_path": "AudioData", "init_args": {"path": "data/sounds"}}
    several = {
        "class_path": "MultiTask",
        "init_args": {"tasks": {"a": sounds, "b": sounds | {"init_args": {"path": "x/y"}}}},
    }
    for given, expected in (
        ({"class_path": "ImageData", "init_args": {"path": "data/sounds"}}, [str(tmp_path / "data/sounds")]),
        ({"class_path": "ImageData", "init_args": {"path": "cifar10"}}, ["cifar10"]),
        (several, [str(tmp_path / "data/sounds"), "x/y"]),
    ):
        data = fit.parse(["--config", str(CONFIG), "--data", json.dumps(given)]).data.init_args
        paths = [data.path] if "path" in data else [task.init_args.path for task in data.tasks.values()]
        assert paths == expected


def test_a_search_by_measured_losses_refuses_several_tasks_at_the_start(tmp_path):
    tasks = {task: {"class_path": "SyntheticSounds", "init_args": {"task": task}} for task in ("pitch", "timbre")}
    data = {"class_path": "MultiTask", "init_args": {"batch_size": 8, "tasks": tasks}}
    network = {
        "class_path": "AudioCNN",
        "init_args": {"width": 0.03, "strides": [2] * 6, "num_classes": {"pitch": 5, "timbre": 4}},
    }
    search = ["--model.stride_search", "measured", "--model.stride_steps", "2", "--model.budget", "0.8"]
    given = ["--data", json.dumps(data), "--model.network", json.dumps(network), *search, "--runs", str(tmp_path)]
    with pytest.raises(UsageError, match="stride_search measured needs data with one task, got pitch, timbre"):
        fit.train(["--config", CONFIG, "--name", "several", *given])
    assert not (tmp_path / "several").exists()


def test_the_peak_memory_of_a_run_is_its_own():
    """A process starts with the peak of the one that has started it, if that is asked for with `getrusage`."""
    measure = "from diffstride.experiments.training.callbacks import _peak_memory; import torch; "
    measure += "print(_peak_memory(torch.device('cpu')))"
    large = f"import subprocess, sys; x = b'1' * 2**30; del x; subprocess.run([sys.executable, '-c', {measure!r}])"
    own, within = (
        int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for code in (measure, large)
    )
    assert within == pytest.approx(own, rel=0.2)
