"""Checkpoints and results that are damaged, incomplete or of another program: every command answers in one line."""

import copy
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from diffstride.experiments.commands.main import main
from diffstride.experiments.training.schema import check_kind, check_result

MORE = [
    "--model.network", "TinyCNN", "--model.network.width", "4", "--model.network.in_channels", "3",
    "--model.network.num_classes", "2", "--model.budget", "1.5", "--model.exploration", "Sweep",
    "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1",
]  # fmt: skip
COMMANDS = {
    "fit": "fit --config {run}/config.yaml --runs {above} --name run --ckpt_path last --trainer.max_epochs 2",
    "predict": "predict {run} {above}/set/test/class0/0.png",
    "export": "export {run} {above}/model.safetensors --force",
    "report": "report {run}",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on pictures, with a budget and an exploration, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    draw = np.random.default_rng(0)
    for split, count in ("train", 8), ("test", 4):
        for i in range(count):
            path = folder / "set" / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSTRIDE_CACHE", str(folder / "cache"))
        data = ["--data", "ImageData", "--data.path", str(folder / "set"), "--data.batch_size", "4"]
        assert main(["fit", *data, *MORE, "--runs", str(folder), "--name", "run"]) == 0
        yield folder


def answer(command, above, capsys):
    """The exit status of a command, which prints one line where it fails, and raises nothing."""
    capsys.readouterr()
    status = main([part.format(run=above / "run", above=above) for part in COMMANDS[command].split()])
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == (status != 0), lines
    return status, "".join(lines)


@pytest.fixture
def here(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "set").symlink_to(made / "set")
    return tmp_path


def put(folder, content):
    for file in (folder / "run" / "checkpoints").glob("*.ckpt"):
        torch.save(content, file)


def changed(content, path, value):
    """A copy in which the entry at a path is replaced; without a value, it is dropped."""
    content = copy.deepcopy(content)
    *above, last = path
    node = content
    for key in above:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return content


FIT = ("loops", "fit_loop")
PLACES = [
    ("state_dict",), ("state_dict", "network.conv.weight"), ("state_dict", "cost.multiplier"), ("global_step",),
    ("epoch",), ("loops",), FIT, (*FIT, "epoch_progress"), (*FIT, "epoch_progress", "current", "processed"),
    (*FIT, "epoch_progress", "total", "completed"), (*FIT, "epoch_loop.batch_progress", "total"),
    (*FIT, "epoch_loop.val_loop.batch_progress"), (*FIT, "epoch_loop.state_dict", "_batches_that_stepped"),
    (*FIT, "state_dict", "combined_loader"), ("callbacks",), ("callbacks", "WriteResult"),
    ("callbacks", "WriteResult", "initial"), ("callbacks", "WriteResult", "seconds"),
    ("callbacks", "ExploreStrides", "sizes"), ("optimizer_states",), ("optimizer_states", 0),
    ("optimizer_states", 0, "state", 0, "momentum_buffer"), ("optimizer_states", 0, "param_groups", 0, "lr"),
    ("optimizer_states", 0, "param_groups", 1, "name"), ("lr_schedulers",), ("lr_schedulers", 0, "last_epoch"),
    ("ImageData",), ("ImageData", "classes"), ("ImageData", "sample_shape"), ("ImageData", "mean"),
    ("pytorch-lightning_version",), ("hyper_parameters",),
]  # fmt: skip
VALUES = {"dropped": ..., "a text": "x", "a list": [1, [2]], "a tensor": torch.ones(3, 2)}
RESUMED_ALONE = "loops", "callbacks", "optimizer_states", "lr_schedulers", "pytorch-lightning_version"


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("place", PLACES, ids=lambda path: "/".join(map(str, path)))
def test_a_checkpoint_with_an_entry_that_is_wrong(place, kind, here, made, capsys):
    good = torch.load(made / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    put(here, changed(good, place, VALUES[kind]))
    for command in COMMANDS if place[0] not in RESUMED_ALONE else ["fit"]:
        status, _ = answer(command, here, capsys)
        assert status in (0, 2)
        if place in (("state_dict",), ("global_step",)) and command != "report":
            assert status == 2


class Other(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def of_another_program(file):
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    trainer = Trainer(max_steps=2, accelerator="cpu", **quiet)
    trainer.fit(Other(), torch.utils.data.DataLoader(torch.randn(4, 2)))
    trainer.save_checkpoint(file)


def of_another_network(file):
    content = torch.load(file, weights_only=True)
    content["state_dict"] = {f"model.{name}": value for name, value in content["state_dict"].items()}
    torch.save(content, file)


def of_weights_alone(file):
    content = torch.load(file, weights_only=True)
    torch.save({key: content[key] for key in ("state_dict", "global_step", "epoch")}, file)


def a_folder(file):
    file.unlink()
    file.mkdir()


FILES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "text": lambda file: file.write_text("hello"),
    "an archive of something else": lambda file: zipfile.ZipFile(file, "w").close(),
    "a tensor": lambda file: torch.save(torch.ones(3), file),
    "a list": lambda file: torch.save([1, 2], file),
    "a state_dict": lambda file: torch.save(torch.nn.Linear(2, 2).state_dict(), file),
    "an older format of torch": lambda file: torch.save({"a": 1}, file, _use_new_zipfile_serialization=False),
    "a folder": a_folder,
    "of another program": of_another_program,
    "of another network": of_another_network,
    "of weights alone": of_weights_alone,
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec")
@pytest.mark.parametrize("damage", FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint_of_the_run(damage, here, capsys):
    for file in (here / "run" / "checkpoints").glob("*.ckpt"):
        damage(file)
    for command in "fit", "predict", "export":
        status, error = answer(command, here, capsys)
        if damage is not of_weights_alone or command == "fit":
            assert status == 2
            assert "last.ckpt" in error
    assert answer("report", here, capsys)[0] == 0  # with what there is


RESULT = {
    "accuracy": 0.5, "macs": 1e6, "resampling_macs": 0, "step_time_ms": 5.0, "strides": {"down": [2.0, 3]},
    "strides_initial": {"down": [2, 2]}, "axes": {"time": "Hz", "frequency": "cycles per bin"},
    "cutoffs": {"exact": {"down": [1.0, 2.0]}, "whole_bins": {"down": [1.0, 2.0]}},
}  # fmt: skip
WRONG = [
    (("accuracy",), "x"), (("accuracy",), True), (("macs",), None), (("macs",), 10**400), (("macs",), ...),
    (("macs",), 10**308), (("macs",), 2**64), (("accuracy",), 1.7e308), (("steps",), 10**400),
    (("parameters",), -(2**64)), (("strides", "down"), [2.0, 10**300]),
    (("strides",), []), (("strides", "down"), 3.0), (("strides", "down"), []), (("strides", "down"), [2.0]),
    (("strides", "down"), [2.0, "x"]), (("strides", "down"), [2.0, float("nan")]), (("strides", "down"), [2.0, 0]),
    (("strides", "down"), [2.0] * 4), (("strides_initial",), {}), (("strides_initial", "down"), [2.0]),
    (("accuracies",), [0.5]), (("accuracies",), {"a": "x"}), (("axes",), ["time"]), (("axes", "depth"), "Hz"),
    (("cutoffs", "exact"), {}), (("cutoffs", "exact", "down"), [1.0]), (("cutoffs", "whole_bins"), ...),
    (("steps",), 1.5), (("versions",), "1.0"), (("versions",), {"torch": 2}), (("seed",), {}), (("hardware",), 3),
]  # fmt: skip


def test_what_a_result_lacks_is_none():
    assert check_result(RESULT)["parameters"] is None
    assert check_result(RESULT | {"accuracy": None, "strides": {}, "strides_initial": {}, "cutoffs": None})


@pytest.mark.parametrize(("path", "value"), WRONG)
def test_a_result_with_an_entry_that_is_wrong(path, value, here, capsys):
    with pytest.raises(ValueError):  # noqa: PT011 - the commands print it
        check_result(changed(RESULT, path, value))
    file = here / "run" / "result.json"
    (here / "study").mkdir()
    (here / "study" / "study.yaml").write_text("runs: {run: {seed: 0}}\n")
    file.write_text(json.dumps(changed(RESULT, path, value)))
    status, error = answer("report", here, capsys)
    assert status == 2
    assert re.search("result.json is (not the result of a run|damaged)", error)


def test_kinds_are_named_with_their_place():
    with pytest.raises(ValueError, match=r"it\['down'\]\[1\] must be a number, got 'x'"):
        check_kind({"down": [1, "x"]}, dict[str, list[float]])
    with pytest.raises(ValueError, match=r"it\['a'\]\[0\] must be a text, got 1"):
        check_kind({"a": [1]}, None | dict[str, list[str]])
    check_kind({"a": (1, 2.5, float("inf"))}, dict[str, list[float]] | None)
