"""Checkpoints: atomic writing, damaged and foreign files, which every command answers in one line."""

import errno
import os
import shlex
from pathlib import Path

import pytest
import torch

from diffstride.errors import UsageError
from diffstride.experiments.commands.main import main
from diffstride.experiments.training.checkpoints import AtomicCheckpointIO, read_checkpoint
from tests.helpers.errors import content, without_bars
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
def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_named(folder, damage):
    last, other = folder / "last.ckpt", folder / "epoch=0.ckpt"
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(UsageError, match=r"last\.ckpt is not a readable .* good .*epoch=0\.ckpt \(step 3\)"):
        read_checkpoint(last)
    other.write_bytes(damage(other.read_bytes()))
    with pytest.raises(UsageError, match="there is no good checkpoint in"):
        read_checkpoint(last)


@pytest.mark.parametrize("fails", ["write", "flush", "move"])
def test_a_disk_that_refuses_leaves_the_previous_checkpoint(folder, monkeypatch, fails):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(content, file):
        file.write(b"half")
        refuse()

    targets = {"write": (torch, "save", half), "flush": (os, "fsync", refuse), "move": (Path, "replace", refuse)}
    before = content(folder)
    with monkeypatch.context() as patch:
        patch.setattr(*targets[fails])
        with pytest.raises(OSError, match=r"No space left .*last\.ckpt"):
            AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 9, "epoch": 0}, folder / "last.ckpt")
    assert content(folder) == before


def edited(change):
    """Return a call that changes the content of a checkpoint."""

    def edit(file):
        content = torch.load(file, weights_only=True)
        torch.save(change(content) or content, file)

    return edit


FILES = {
    "empty": lambda file: file.write_bytes(b""),
    "a list": lambda file: torch.save([1, 2], file),
    "a state_dict": lambda file: torch.save(torch.nn.Linear(2, 2).state_dict(), file),
    "of another network": edited(lambda c: c.update(state_dict={f"x.{k}": v for k, v in c["state_dict"].items()})),
    "without steps": edited(lambda c: c.pop("global_step") and None),
    "of wrong weights": edited(lambda c: c.update(state_dict="x")),
}


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
    "no state of a callback": lambda c: c["callbacks"].update(WriteResult={"x": 1}),
}


@pytest.mark.parametrize("change", RESUMED.values(), ids=RESUMED)
def test_a_checkpoint_that_cannot_be_resumed_from(change, here, capsys):
    edited(change)(Path(LAST))
    status, error = answer("fit", capsys)
    assert status == 2
    assert "last.ckpt" in error


def test_a_checkpoint_that_does_not_describe_its_data(here, capsys):
    edited(lambda content: content["ImageData"].pop("classes") and None)(Path(LAST))
    status, error = answer("predict", capsys)
    assert status == 2
    assert "does not describe its data" in error
