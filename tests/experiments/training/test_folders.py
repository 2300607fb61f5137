"""The folder of a run: its name, who may write there, and files that are never touched."""

import multiprocessing
import shutil
import signal
import time
from pathlib import Path

import pytest

from diffstride.errors import UsageError
from diffstride.experiments.commands.main import main
from diffstride.experiments.history import read_dicts, read_rows
from diffstride.experiments.training.fit import train
from diffstride.experiments.training.folders import LOCK, RUN, as_name, check_name, locked
from tests.helpers import runs
from tests.helpers.errors import content
from tests.helpers.processes import PROCESSES, fit, start, warm_up

SMALL = [
    *runs.SMALL, "--data.train_samples", "64", "--model.milestones", "[1,2,3]",
    "--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1",
]  # fmt: skip
HOSTILE = ["..", "../x", "/tmp/x", "a\\b", "~root", "-x", ".hidden", "x\n", "\x1b[2J", " x", "x" * 256]
PLAIN = ["one", "cifar10-small", "größe", "a b", "0.1", "x" * 255]


def steps_of(run):
    return [int(row["step"]) for row in read_dicts(run / "metrics.csv") if row["train/loss"]]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_no_plain_file_name_is_refused(name):
    with pytest.raises(UsageError, match="it must be a plain file name") as caught:
        check_name("it", name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names_are_accepted(name):
    assert check_name("it", name) == name


@pytest.mark.parametrize("text", HOSTILE + PLAIN)
def test_any_text_becomes_a_plain_file_name(text):
    name = as_name(text[:100])
    assert check_name("it", name) == name
    assert name == as_name(name)


OTHERS = {
    "tables": {"config.yaml": "mine", "metrics.csv": "a,b\n1,2\n", "strides.csv": "step\n"},
    "a hidden file": {".git/config": "mine"},
}


@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
def test_a_folder_of_something_else_is_left_as_it_is(files, tmp_path, capsys):
    for name, text in files.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(text)
    before = content(tmp_path)
    assert main(["fit", *SMALL, "--runs", str(tmp_path), "--name", "x"]) == 2
    assert "has files of something else" in capsys.readouterr().err
    assert content(tmp_path) == before


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch, kept as it is: tests change copies."""
    folder = tmp_path_factory.mktemp("runs")
    return train([*SMALL, "--runs", str(folder), "--name", "x", "--trainer.max_epochs", "1"]).run_folder


@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("place", ["start.ckpt", "checkpoints/last.ckpt"])
def test_a_checkpoint_in_a_folder_of_something_else_does_not_make_it_a_run(files, place, run, tmp_path, capsys):
    for name, text in {**files, "config.yaml": "{model: {}, data: {}, trainer: {}}", place: ""}.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(text)
    shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "x" / place)
    before = content(tmp_path)
    for checkpoint in [str(tmp_path / "x" / place), *(["last"] if "last" in place else [])]:
        assert main(["fit", *SMALL, "--runs", str(tmp_path), "--name", "x", "--ckpt_path", checkpoint]) == 2
        assert "has files of something else" in capsys.readouterr().err
    assert content(tmp_path) == before
    elsewhere = ["--runs", str(tmp_path), "--name", "new", "--ckpt_path", str(tmp_path / "x" / place)]
    assert main(["fit", *SMALL, *elsewhere]) == 0
    assert {name: data for name, data in content(tmp_path).items() if not name.startswith("new")} == before


@pytest.mark.parametrize("step", ["", "nan"])
def test_damaged_rows_do_not_prevent_resuming(step, run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "x"))
    for name in "metrics.csv", "strides.csv":
        header, first, *_ = (folder / name).read_text().splitlines()
        place = header.split(",").index("step")
        cells = [step if i == place else cell for i, cell in enumerate(first.split(","))]
        with (folder / name).open("a") as file:
            file.write(f"{','.join(cells)}\n{first[:-1]}")  # and one that is torn
    train([*SMALL, "--runs", str(tmp_path), "--name", "x", "--ckpt_path", "last"])
    assert steps_of(folder) == [0, 1, 2, 3]
    rows = read_rows(folder / "strides.csv")
    assert len({row[:3] for row in rows}) == len(rows)


def test_a_run_without_a_checkpoint_makes_room_for_the_next(tmp_path):
    warm_up()
    process = start([*SMALL, "--runs", str(tmp_path), "--name", "x", "--trainer.max_epochs", "1000"], "half written")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (tmp_path / "x" / "notes.txt").write_text("mine")
    left = {path.name for path in (tmp_path / "x").iterdir()}
    assert {"config.yaml", "metrics.csv", "strides.csv", "tensorboard", RUN} <= left
    cli = train([*SMALL, "--runs", str(tmp_path), "--name", "x"])
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"
    assert steps_of(tmp_path / "x") == [0, 1, 2, 3]
    assert len([*(cli.run_folder / "tensorboard").glob("events*")]) == 1
    assert not [*(cli.run_folder / "checkpoints").glob("*.tmp")]


def test_a_checkpoint_of_another_run_starts_a_new_one_and_changes_neither(tmp_path, capsys):
    for name in "one", "two":
        train([*SMALL, "--runs", str(tmp_path), "--name", name])
    before = content(tmp_path)
    more = ["--ckpt_path", str(tmp_path / "one" / "checkpoints" / "last.ckpt"), "--trainer.max_epochs", "3"]
    assert main(["fit", *SMALL, "--runs", str(tmp_path), "--name", "two", *more]) == 2
    assert "two holds a run already" in capsys.readouterr().err
    assert content(tmp_path) == before
    three = train([*SMALL, "--runs", str(tmp_path), "--name", "three", *more])
    assert three.trainer.global_step == 6
    assert {name: data for name, data in content(tmp_path).items() if not name.startswith("three")} == before


def test_a_run_and_a_study_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *SMALL, "--name", "one"]) == 0
    Path("tiny.yaml").write_text(f"{{base: {runs.CONFIG}, axes: {{seed: [0]}}, settings: {{trainer.max_steps: 1}}}}")
    assert main(["study", "tiny.yaml"]) == 0
    before = content(tmp_path)
    assert main(["fit", *SMALL, "--name", "tiny"]) == 2
    assert main(["study", "tiny.yaml", "--name", "one"]) == 2
    assert capsys.readouterr().err.count("has files of something else") == 2
    assert content(tmp_path) == before


def test_the_folder_of_runs_may_be_a_link_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").symlink_to("elsewhere")
    arguments = [*SMALL, "--runs=~/runs", "--name", "x"]
    assert main(["fit", *arguments]) == 0
    assert main(["fit", *arguments, "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    assert (tmp_path / "elsewhere" / "x" / "result.json").exists()


def both(arguments):
    """Exit codes of two processes of one run, which start at one moment."""
    processes = [PROCESSES.Process(target=fit, args=(arguments,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return sorted(process.exitcode for process in processes)


@pytest.mark.parametrize("resumed", [False, True])
def test_of_two_processes_of_one_run_one_trains(resumed, tmp_path):
    warm_up()
    arguments = [*SMALL, "--runs", str(tmp_path), "--name", "x", "--data.train_samples", "640"]
    if resumed:
        train([*arguments, "--trainer.max_epochs", "1"])
        arguments += ["--ckpt_path", "last"]
    assert both([*arguments, "--trainer.max_epochs", "12"]) == [0, 2]
    rows = read_rows(tmp_path / "x" / "strides.csv")
    assert len({row[:3] for row in rows}) == len(rows)
    assert steps_of(tmp_path / "x") == [*range(240)]


def _hold(folder, ready):
    with locked(folder):
        ready.set()
        time.sleep(60)


def test_a_hold_ends_with_its_process_and_with_no_other(tmp_path):
    folder = tmp_path / "x"
    ready = PROCESSES.Event()
    process = PROCESSES.Process(target=_hold, args=(folder, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(UsageError, match="is being worked on by another process"), locked(folder):
        pass
    process.kill()
    process.join()
    with locked(folder):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))  # as a loader's worker is
        child.start()
    with locked(folder):
        child.kill()
    assert {path.name for path in folder.iterdir()} == {RUN, LOCK}
