"""The folder of a run: what it may be called, who may write there, what is never touched."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from diffstride.errors import UsageError
from diffstride.experiments.commands.main import main
from diffstride.experiments.history import StrideRow, append_rows, drop_rows_from, read_dicts, read_rows
from diffstride.experiments.training.fit import train
from diffstride.experiments.training.folders import LOCK, RUN, as_name, check_name, held
from tests.helpers.errors import content
from tests.helpers.processes import PROCESSES, fit, start, warm_up

CONFIG = str(Path(__file__).parents[3] / "configs" / "demo.yaml")
SMALL = [
    "--config", CONFIG, "--data.train_samples", "64", "--data.test_samples", "32", "--data.batch_size", "32",
    "--model.network.width", "4", "--model.milestones", "[1,2,3]", "--trainer.enable_progress_bar", "false",
    "--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1",
]  # fmt: skip
HOSTILE = [
    "..", ".", "../x", "a/b", "/tmp/x", "a\\b", "~", "~root", "-x", ".hidden", "x\n", "\x1b[2J", "a\x00b", " x", "x ",
    "\udcff", "x" * 256, "ä" * 128,
]  # fmt: skip
PLAIN = ["one", "cifar10-small", "größe", "a b", "diffstride-2-2-2-seed0", "0.1", "x" * 255]


def steps_of(run):
    return [int(row["step"]) for row in read_dicts(run / "metrics.csv") if row["train/loss"]]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_no_plain_file_name_is_refused(name, tmp_path, capsys):
    with pytest.raises(UsageError, match="it must be a plain file name") as caught:
        check_name("it", name)
    assert str(caught.value).isprintable()
    (tmp_path / "runs").mkdir()
    before = content(tmp_path)
    assert main(["fit", *SMALL, "--runs", str(tmp_path / "runs"), f"--name={name}"]) == 2
    assert "--name must be a plain file name" in capsys.readouterr().err
    assert content(tmp_path) == before


@pytest.mark.parametrize("text", HOSTILE + PLAIN)
def test_any_text_becomes_a_plain_file_name(text):
    name = as_name(text[:100])
    assert check_name("it", name) == name
    assert (Path("runs") / name).parent == Path("runs")
    assert name == as_name(name)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names_are_taken(name):
    assert check_name("it", name) == name


OTHERS = {
    "a configuration": {"config.yaml": "mine"},
    "tables": {"metrics.csv": "a,b\n1,2\n", "strides.csv": "step\n"},
    "events": {"tensorboard/events.out.tfevents.1": "mine"},
    "notes": {"notes.txt": "mine", "deep/er": "mine"},
    "a hidden file": {".git/config": "mine"},
}


@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("mistake", [[], ["--model.network.num_classes", "7"]], ids=["right", "wrong"])
def test_a_folder_of_something_else_is_left_as_it_is(files, mistake, tmp_path, capsys):
    for name, text in files.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(text)
    before = content(tmp_path)
    assert main(["fit", *SMALL, "--runs", str(tmp_path), "--name", "x", *mistake]) == 2
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


def test_a_run_of_an_earlier_version_which_left_no_mark_is_resumed(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "x"))
    (folder / RUN).unlink()
    train([*SMALL, "--runs", str(tmp_path), "--name", "x", "--ckpt_path", "last"])
    assert steps_of(folder) == [0, 1, 2, 3]
    assert (folder / RUN).exists()


NO_STEPS = ["²", "9" * 5000, "", "-1", "1_0", "nan", "1.5"]


@pytest.mark.parametrize("step", NO_STEPS, ids=lambda step: step[:5])
def test_rows_without_a_step_do_not_hinder_a_resumed_run(step, run, tmp_path):
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


@pytest.mark.parametrize("left", ["step,lay", "step,layer,axis,stride,size\r\n0,down,hei"], ids=["header", "first row"])
def test_nothing_is_written_behind_a_torn_line(left, tmp_path):
    file, row = tmp_path / "strides.csv", StrideRow(1, "down", "height", 2.5, 3)
    file.write_text(left)
    drop_rows_from(file, 1)
    append_rows(file, [row])
    assert read_rows(file) == [row]


def test_what_a_run_left_that_never_reached_a_checkpoint_makes_room_for_the_next(tmp_path, monkeypatch):
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
    Path("tiny.yaml").write_text(f"{{base: {CONFIG}, axes: {{seed: [0]}}, settings: {{trainer.max_steps: 1}}}}")
    assert main(["study", "tiny.yaml"]) == 0
    before = content(tmp_path)
    assert main(["fit", *SMALL, "--name", "tiny"]) == 2
    assert main(["study", "tiny.yaml", "--name", "one"]) == 2
    assert capsys.readouterr().err.count("has files of something else") == 2
    assert content(tmp_path) == before


@pytest.mark.parametrize("link", ["the run", "all runs", "an empty folder"])
def test_a_folder_may_be_a_link(link, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    if link == "all runs":
        (tmp_path / "runs").symlink_to("elsewhere")
    else:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "x").symlink_to("../elsewhere")
    arguments = [*SMALL, "--runs", str(tmp_path / "runs"), "--name", "x"]
    assert main(["fit", *arguments]) == 0
    assert main(["fit", *arguments, "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    assert main(["report", str(tmp_path / "runs" / "x")]) == 0
    assert main(["export", str(tmp_path / "runs" / "x"), str(tmp_path / "x.safetensors")]) == 0


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
    with held(folder):
        ready.set()
        time.sleep(60)


def test_a_hold_ends_with_its_process_and_with_no_other(tmp_path):
    folder = tmp_path / "x"
    ready = PROCESSES.Event()
    process = PROCESSES.Process(target=_hold, args=(folder, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(UsageError, match="is being worked on by another process"), held(folder):
        pass
    process.kill()
    process.join()
    with held(folder):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))  # as a loader's worker is
        child.start()
    with held(folder):
        child.kill()
    assert {path.name for path in folder.iterdir()} == {RUN, LOCK}


def test_home_is_where_it_is_for_other_programs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["fit", *SMALL, "--runs=~/runs", "--name", "x"]) == 0
    assert (tmp_path / "runs" / "x" / "result.json").exists()
    assert not os.path.exists("~")


def test_a_name_and_a_folder_of_runs_from_outside_are_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *SMALL, "--runs", "~nobody-of-that-name/x", "--name", "x"]) == 2
    assert "--runs names the home of a user who does not exist" in capsys.readouterr().err
    monkeypatch.setenv("DIFFSTRIDE_RUN_NAME", "../x")
    Path("nameless.yaml").write_text(Path(CONFIG).read_text().replace("\nname: demo\n", "\n"))
    assert main(["fit", "--config", "nameless.yaml", *SMALL[2:], "--runs", "runs"]) == 2
    assert "DIFFSTRIDE_RUN_NAME must be a plain file name" in capsys.readouterr().err
    assert content(tmp_path).keys() == {"nameless.yaml"}
