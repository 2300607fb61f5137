"""YAML and JSON files that expand beyond all use, or never end, are refused in an instant and in one line."""

import os
import shutil
import signal

import pytest
import yaml

from diffstride.experiments.commands.main import main
from diffstride.experiments.training.documents import load_yaml, read_json, read_yaml
from diffstride.experiments.training.fit import train

LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 10)}]\n" for i in range(9)
)
MERGED = "a0: &a0 {k0: 1, k1: 1}\n" + "".join(
    f"a{i + 1}: &a{i + 1} {{<<: [{','.join([f'*a{i}'] * 10)}], j{i}: 1}}\n" for i in range(9)
)
BOMBS = {
    "aliases of aliases": LAUGHS,
    "merges of merges": MERGED,
    "an alias inside of itself": "a: &a [*a]",
    "deep flow": "[" * 100_000,
    "deep blocks": "\n".join("  " * i + "k:" for i in range(2000)),
    "a list of lists": "- " * 3000 + "x",
    "a date that there is not": "2001-99-99",
    "a long number": "9" * 5000,
    "a long number in base 16": f"a: [0x{'F' * 5000}]",
    "a long number in base 60": f"a: {{1{':1' * 5000}: b}}",
    "aliases of a long text": f"- &a {'x' * 1_000_000}\n" + "- *a\n" * 20_000,
    "aliases of a key": f"? &a {'x' * 100_000}\n: 1\n" + "".join(f"{i}: *a\n" for i in range(100)),
    "bytes that are not UTF-8": "\udcff",
}  # fmt: skip
OURS = {
    "an alias": ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
    "a merge": ("a: &x {k: 1}\nb: {<<: *x, j: 2}", {"a": {"k": 1}, "b": {"k": 1, "j": 2}}),
    "a thousand runs": ("\n".join(f"{i}: {{seed: {i}}}" for i in range(1000)), {i: {"seed": i} for i in range(1000)}),
    "nothing": ("", None),
    "a long text": ("x" * 2**21, "x" * 2**21),
    "numbers": ("[0xFF, 1.0e+300, -9223372036854775807]", [255, 1e300, -9223372036854775807]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_time():
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_what_expands_beyond_all_use_is_an_error_of_yaml(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


@pytest.mark.parametrize(("text", "content"), OURS.values(), ids=OURS)
def test_what_people_write_is_read(text, content):
    assert load_yaml(text) == content


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in read_yaml, read_json:
        for file in tmp_path / "pipe", "/dev/zero", tmp_path:
            with pytest.raises(OSError, match=r"Not a regular file|Is a directory"):
                read(file)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")
    (tmp_path / "number.json").write_text(f'{{"a": [{10**308}]}}')
    with pytest.raises(ValueError, match="must be below 2"):
        read_json(tmp_path / "number.json")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="more than"):
        read_yaml(tmp_path / "large.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    few = [
        "--data.train_samples",
        "64",
        "--data.test_samples",
        "32",
        "--data.batch_size",
        "32",
        "--trainer.max_steps",
        "1",
    ]
    demo = ["--data", "PlantedBands", "--model.network", "TinyCNN", "--model.network.width", "4", "--name", "run"]
    return train([*demo, *few, "--runs", str(folder), "--trainer.enable_progress_bar", "false"]).run_folder  # fmt: skip


def refused(arguments, capsys):
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.lstrip("\n")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("bomb", ["text", "pipe", "device"])
def test_every_command_that_reads_yaml_answers_in_one_line(bomb, run, tmp_path, capsys):
    def put(file):
        file.unlink(missing_ok=True)
        {
            "text": lambda: file.write_text(LAUGHS),
            "pipe": lambda: os.mkfifo(file),
            "device": lambda: file.symlink_to("/dev/zero"),
        }[bomb]()

    bad = tmp_path / "bad.yaml"
    put(bad)
    reasons = {"text": "expands to more than", "pipe": "Not a regular file", "device": "Not a regular file"}
    assert reasons[bomb] in refused(["fit", "--config", bad], capsys)
    assert reasons[bomb] in refused(["study", bad], capsys)
    assert reasons[bomb] in refused(["demo", bad], capsys) or bomb != "text"
    copy = shutil.copytree(run, tmp_path / "run")
    put(copy / "config.yaml")
    (tmp_path / "x.png").touch()
    for command in (["predict", copy, tmp_path / "x.png"], ["export", copy, tmp_path / "m.safetensors"]):
        refused(command, capsys)
    if bomb == "text":  # a run's page shows what there is
        assert main(["report", str(copy), "--out", str(tmp_path / "page.html")]) == 0
    else:
        refused(["report", copy], capsys)
    study = tmp_path / "study"
    study.mkdir()
    put(study / "study.yaml")
    refused(["report", study], capsys)


def test_values_on_the_command_line_are_bounded_too(tmp_path, capsys):
    laughs = LAUGHS.replace("\n", ", ").rstrip(", ")
    assert main(["fit", "--data", "PlantedBands", "--model.network", f"{{{laughs}}}", "--runs", str(tmp_path)]) == 2
    assert main(["study", str(tmp_path / "x.yaml"), "--model.network", f"{{{laughs}}}"]) == 2
