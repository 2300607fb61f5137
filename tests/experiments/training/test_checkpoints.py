"""Checkpoints: atomic writing, damaged and foreign files, which every command answers in one line."""

import errno
import os
import shlex
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from diffstride.errors import UsageError
from diffstride.experiments.commands.main import main
from diffstride.experiments.training.checkpoints import AtomicCheckpointIO, read_checkpoint, read_last
from tests.helpers.errors import without_bars
from tests.helpers.workplace import LAST, PICTURES, RESUME

COMMANDS = {
    "fit": f"fit {RESUME}",
    "predict": f"predict {PICTURES} set/test/class0/0.png",
    "export": f"export {PICTURES} x.safetensors --force",
    "report": f"report {PICTURES}",
}


def answer(command, capsys):
    """Return the exit status and the error of a command, which prints one line if it fails, and raises nothing."""
    capsys.readouterr()
    status = main(shlex.split(COMMANDS[command]))
    error = without_bars(capsys.readouterr().err)
    assert error.count("\n") == (status != 0), error
    return status, error


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 3 and 6, the latter as `last.ckpt`."""
    for name, step in ("epoch=0", 3), ("last", 6):
        content = {"state_dict": {"w": torch.arange(1000.0)}, "global_step": step, "epoch": 0}
        AtomicCheckpointIO().save_checkpoint(content, tmp_path / f"{name}.ckpt")
    return tmp_path


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda c: c[:-100], flip, lambda c: b""], ids=["cut off", "one bit", "empty"])
def test_the_last_good_checkpoint_replaces_a_damaged_one(folder, damage, capsys):
    last, other = folder / "last.ckpt", folder / "epoch=0.ckpt"
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(UsageError, match=r"last\.ckpt is not a readable .* good one is .*epoch=0\.ckpt \(step 3\)"):
        read_checkpoint(last)
    path, content = read_last(last)
    assert (path, content["global_step"]) == (other, 3)
    assert capsys.readouterr().err == f"diffstride: {last} is damaged: resuming from epoch=0.ckpt (step 3)\n"
    other.write_bytes(damage(other.read_bytes()))
    for read in read_checkpoint, read_last:
        with pytest.raises(UsageError, match="there is no other in"):
            read(last)


@pytest.mark.parametrize("fails", ["write", "flush", "move"])
def test_a_disk_that_refuses_leaves_the_previous_checkpoint_and_names_it(folder, monkeypatch, fails):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(content, file):
        file.write(b"half")
        refuse()

    targets = {"write": (torch, "save", half), "flush": (os, "fsync", refuse), "move": (Path, "replace", refuse)}
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(*targets[fails])
        with pytest.raises(UsageError, match=r"cannot write .*last\.ckpt \(No space left .*\): .* last \(step 6\)"):
            AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 9, "epoch": 0}, folder / "last.ckpt")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


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


def edited(change):
    """Return a call that changes the content of a checkpoint."""

    def edit(file):
        content = torch.load(file, weights_only=True)
        torch.save(change(content) or content, file)

    return edit


FILES = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("hello"),
    "another archive": lambda file: zipfile.ZipFile(file, "w").close(),
    "a list": lambda file: torch.save([1, 2], file),
    "a state_dict": lambda file: torch.save(torch.nn.Linear(2, 2).state_dict(), file),
    "of another program": of_another_program,
    "of another network": edited(lambda c: c.update(state_dict={f"x.{k}": v for k, v in c["state_dict"].items()})),
    "without steps": edited(lambda c: c.pop("global_step") and None),
    "of wrong weights": edited(lambda c: c.update(state_dict="x")),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec")
@pytest.mark.parametrize("damage", FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint_of_the_run(damage, here, capsys):
    for file in Path(LAST).parent.glob("*.ckpt"):
        damage(file)
    for command in "fit", "predict", "export":
        status, error = answer(command, capsys)
        assert status == 2
        assert "last.ckpt" in error
    assert answer("report", capsys)[0] == 0  # a page without the network


RESUMED = {
    "weights alone": lambda c: {key: c[key] for key in ("state_dict", "global_step", "epoch")},
    "no loops": lambda c: c["loops"].update(fit_loop={}),
    "no state of a callback": lambda c: c["callbacks"].update(WriteResult={"x": 1}),
    "a text as momentum": lambda c: c["optimizer_states"][0]["state"][0].update(momentum_buffer="x"),
}


@pytest.mark.parametrize("change", RESUMED.values(), ids=RESUMED)
def test_a_checkpoint_that_cannot_be_resumed_from(change, here, capsys):
    for file in Path(LAST).parent.glob("*.ckpt"):
        edited(change)(file)
    status, error = answer("fit", capsys)
    assert status == 2
    assert "last.ckpt" in error


@pytest.mark.parametrize("classes", [..., "x", [1]], ids=["missing", "a text", "numbers"])
def test_a_checkpoint_that_does_not_describe_its_data(classes, here, capsys):
    def change(content):
        content["ImageData"]["classes"] = classes
        if classes is ...:
            del content["ImageData"]["classes"]

    for file in Path(LAST).parent.glob("*.ckpt"):
        edited(change)(file)
    status, error = answer("predict", capsys)
    assert status == 2
    assert "does not describe its data" in error
