"""Full disks, locked files, and files with code: nothing is lost, and nothing is executed."""

import contextlib
import os
import re
import resource
import shlex
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffstride.experiments.commands.main import main
from tests.helpers.errors import content, without_bars
from tests.helpers.workplace import LAST, PICTURES, RESULT, RESUME, TINY, Malicious, pickled, text


def refused(line, capsys, new=None):
    """The one line that answers a command; the status is 2, and no name and no byte in the folder has changed.

    Only the folder `new` may be left, of a run that had begun.
    """
    before = content(Path())
    assert main(shlex.split(line)) == 2
    error = without_bars(capsys.readouterr().err)
    assert error.startswith("diffstride: error: ")
    assert error.count("\n") == 1, error
    after = {name: data for name, data in content(Path()).items() if new is None or not name.startswith(new)}
    assert after.keys() == before.keys()
    assert after == before
    return error


# Full disks: the kernel refuses files that grow beyond a limit, as a full disk does.


@contextlib.contextmanager
def full_disk(free):
    """Limit the files of this process to so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("line", "answer", "change"),
    [
        ("fit --config demo.yaml", r"cannot write \S+/config.yaml .*: make room, and start it again", None),
        (f"fit {RESUME}", r"cannot write .*: make room, and resume with .*--ckpt_path last", None),
        ("study tiny.yaml", r"cannot write runs/tiny/study.yaml \(File too large\): make room", None),
        (f"report {PICTURES}", r"cannot write runs/pictures/report.html \(File too large\): make room", None),
        (f"predict {PICTURES} set --csv x.csv --force", r"cannot write x.csv", text("x.csv", "kept")),
        pytest.param(f"export {PICTURES} model.onnx --repeats 0", r"cannot write model.onnx .*make room", None,
                     marks=pytest.mark.long),
        (f"export {PICTURES} model.safetensors --force", r"cannot write model.safetensors",
         text("model.safetensors", "kept")),
    ],
)  # fmt: skip
def test_a_full_disk_leaves_what_was_there(line, answer, change, made, here, capsys, monkeypatch):
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(made.parent / "cache0"))  # what was decoded before
    if change is not None:
        change()
    with full_disk(64):
        error = refused(line, capsys, new="runs/demo")
    assert re.search(answer, error)


@pytest.mark.parametrize(
    ("moment", "free", "step", "answer"),
    [
        ("classifier.Classifier.on_train_batch_end", 10_000, 2, r"cannot write \S+\.ckpt \(File too large\)"),
        ("callbacks.provenance", 64, 3, r"cannot write runs/pictures/result.json \(File too large\)"),
    ],
)
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(moment, free, step, answer, here, capsys, monkeypatch):
    """And the run goes on from it to its end once there is room."""
    old = Path(RESULT).read_bytes()

    def fills(*_, **__):
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.RLIM_INFINITY))
        return {}

    with full_disk(resource.RLIM_INFINITY), monkeypatch.context() as patch:
        patch.setattr(f"diffstride.experiments.training.{moment}", fills)
        assert main(["fit", *RESUME.split()]) == 2
    error = without_bars(capsys.readouterr().err)
    assert re.search(rf"{answer}: make room, and resume with .*--ckpt_path last", error)
    assert error.count("\n") == 1
    assert not list(Path().rglob("*.tmp"))
    assert Path(RESULT).read_bytes() == old
    assert torch.load(LAST, weights_only=True)["global_step"] == step
    Path(RESULT).unlink()
    assert main(["fit", *RESUME.split()]) == 0
    assert '"steps": 3' in Path(RESULT).read_text()


# Files with code, which runs if they are unpickled.


def test_a_pickle_with_code_would_make_a_file(here):
    """The next tests would fail if the file were unpickled."""
    pickled("bad.ckpt")()
    torch.load("bad.ckpt", weights_only=False)["state_dict"].close()
    assert Path("executed").exists()


@pytest.mark.parametrize("command", [f"report {PICTURES}", "study tiny.yaml"])
def test_a_page_is_made_without_a_malicious_checkpoint(command, here, capsys):
    pickled(LAST)()
    pickled(f"{TINY}/seed0/checkpoints/last.ckpt")()
    assert main(command.split()) == 0
    assert not Path("executed").exists()
    if command == f"report {PICTURES}":
        page = Path(PICTURES, "report.html").read_text()
        assert "is not a readable checkpoint: the last good checkpoint is" in page


def test_a_malicious_array_in_the_cache_is_decoded_anew(here):
    arguments = ["fit", "--config", "pictures.yaml", "--name"]
    assert main([*arguments, "one"]) == 0
    cached = [*Path(os.environ["DIFFSTRIDE_CACHE"]).glob("*.npy")]
    good = {path: path.read_bytes() for path in cached}
    assert len(good) == 2
    for path in cached:
        np.save(path, np.array([Malicious()], dtype=object), allow_pickle=True)
    assert main([*arguments, "two"]) == 0
    assert not Path("executed").exists()
    assert {path: path.read_bytes() for path in cached} == good


# Permissions.


@pytest.fixture
def mine(made, monkeypatch):
    """A copy of the folder, owned by a user to whom permissions apply: root becomes another user during a test."""
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(made / "nowhere"))
    with tempfile.TemporaryDirectory() as above:  # those of pytest are for root alone
        folder = shutil.copytree(made, Path(above, "here"))
        monkeypatch.chdir(folder)
        is_root = os.geteuid() == 0
        if is_root:
            Path(above).chmod(0o755)
            for path in (folder, *folder.rglob("*")):
                os.chown(path, 65534, 65534)
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o755)
            monkeypatch.chdir("/")


@pytest.mark.parametrize(
    ("line", "locked", "mode", "answer"),
    [
        ("fit --config demo.yaml", "runs", 0o555, "(Permission denied): change its permissions"),
        ("fit --config demo.yaml", "demo.yaml", 0, "demo.yaml (Permission denied): change its permissions"),
        ("study tiny.yaml", TINY, 0o555, "(Permission denied): change its permissions"),
        (f"report {PICTURES}", RESULT, 0, "result.json (Permission denied): change its permissions"),
        (f"predict {PICTURES} set", LAST, 0, "last.ckpt (Permission denied): change its permissions"),
        (f"predict {PICTURES} set --csv folder/x.csv", "folder", 0o555, "cannot write folder/x.csv"),
    ],
)
def test_a_locked_file_or_folder_is_named(line, locked, mode, answer, mine, capsys):
    Path(locked).chmod(mode)
    names = sorted(os.walk("."))
    assert main(line.split()) == 2
    error = without_bars(capsys.readouterr().err)
    assert answer in error
    assert error.count("\n") == 1
    assert sorted(os.walk(".")) == names
