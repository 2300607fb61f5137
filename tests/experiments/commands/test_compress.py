"""`diffstride compress`: a trained run becomes cheaper, and a killed command goes on."""

import json

import pytest
import torch
import yaml

from diffstride.cost import CostModel, count_macs
from diffstride.errors import InterruptedRunError
from diffstride.experiments.commands import compress
from diffstride.experiments.commands.main import main
from diffstride.experiments.history import read_rows
from diffstride.experiments.training.runs import load
from diffstride.experiments.training.schema import total_macs
from tests.helpers.runs import small


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    arguments = ["--model.network.downsample", "conv", "--model.network.strides", "[[2, 2]]"]
    return small(folder, "plain", *arguments, steps=12)[0].run_folder


def run(*arguments):
    return main(["compress", *map(str, arguments)])


@pytest.mark.parametrize("search", ["measured", "gradient"])
def test_a_run_becomes_cheaper_by_about_the_budget(search, trained, tmp_path, capsys):
    options = ["--epochs", "3", "--runs", tmp_path, "--name", "cheap", "--search", search]
    assert run(trained, "--budget", "0.6", *options) == 0
    report = json.loads((tmp_path / "cheap" / "compress.json").read_text())
    assert report["command"].startswith(f"diffstride compress {trained} --budget 0.6")
    stages = report["stages"]
    before, inserted, after = stages["before"], stages["inserted"], stages["fine-tuned"]
    assert before["accuracy"] == json.loads((trained / "result.json").read_text())["accuracy"]
    assert inserted["accuracy"] == pytest.approx(before["accuracy"], abs=1e-6)
    assert inserted["macs"] == before["macs"]
    share = total_macs(after) / total_macs(before)
    if search == "measured":  # a stride alone moves in large steps: somewhat below the budget is allowed
        assert 0.9 * 0.6 <= share <= 1.03 * 0.6
    else:
        assert share == pytest.approx(0.6, rel=0.06)  # maps have whole sizes
    network = load(tmp_path / "cheap").network
    assert total_macs(after) == sum(count_macs(network, torch.zeros(1, 1, 32, 32)))
    result = json.loads((tmp_path / "cheap" / "result.json").read_text())
    assert {key: after[key] for key in ("accuracy", "macs", "resampling_macs")}.items() <= result.items()
    printed = capsys.readouterr().out
    assert "plain at 0.6 of its multiply-accumulates" in printed
    assert f"{1e-6 * total_macs(after):.4g}" in printed

    written = read_rows(tmp_path / "cheap" / "strides.csv")
    rows = [row for row in written if row.layer == "model.conv.diffstride_before"]
    if search == "measured":
        later = [row for row in written if row.step > 0]
        assert len({(row.layer, row.stride) for row in later}) == len({row.layer for row in later}) == 2
        assert "loss" in printed
        assert "million MACs: model.conv.diffstride_before" in printed
    else:  # strides stay from a third of the 18 steps on
        assert {row.stride for row in rows if row.step > 7} == {rows[-1].stride}
        assert len({row.stride for row in rows if row.step <= 6}) >= 3
    # The result is a run that others take.
    assert main(["report", str(tmp_path / "cheap"), "--out", str(tmp_path / "page.html")]) == 0
    assert main(["export", str(tmp_path / "cheap"), str(tmp_path / "model.safetensors")]) == 0


def test_the_budget_is_a_part_of_what_the_run_costs_where_its_strides_are_learned(tmp_path):
    options = ["--model.network.downsample_options.window", "inner", "--model.network.strides", "[[1.4, 2]]"]
    learned = small(tmp_path, "learned", *options, "--model.stride_lr", "0", steps=12)[0].run_folder
    assert run(learned, "--budget", "0.6", "--epochs", "1") == 0
    stages = json.loads((tmp_path / "learned-0.6" / "compress.json").read_text())["stages"]
    assert stages["inserted"]["macs"] == stages["before"]["macs"]
    assert 0.9 * 0.6 <= total_macs(stages["fine-tuned"]) / total_macs(stages["before"]) <= 1.03 * 0.6


def test_a_killed_command_goes_on_and_ends_as_one_that_was_not(trained, tmp_path, monkeypatch, capsys):
    searches, find = [], CostModel.find_strides
    monkeypatch.setattr(CostModel, "find_strides", lambda *a, **k: searches.append(1) or find(*a, **k))
    arguments = [trained, "--budget", "0.6", "--epochs", "2"]
    assert run(*arguments, "--runs", tmp_path / "whole") == 0
    original = compress.train

    def killed(given):
        original([*given, "--trainer.max_epochs", "1"])
        folder = tmp_path / "parts" / "plain-0.6"
        (folder / "result.json").unlink()
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["trainer"]["max_epochs"] = 2
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        raise InterruptedRunError("interrupted")

    monkeypatch.setattr(compress, "train", killed)
    assert run(*arguments, "--runs", tmp_path / "parts") == 1
    monkeypatch.setattr(compress, "train", original)
    assert run(*arguments, "--runs", tmp_path / "parts") == 0
    assert len(searches) == 2  # one for each run, none for the resumed part
    states = [load(tmp_path / part / "plain-0.6").network.state_dict() for part in ("whole", "parts")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert run(*arguments[:-1], "3", "--runs", tmp_path / "whole") == 2
    assert "plain-0.6 holds a run with other arguments: give another --name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--budget", "0.6"], "there is no checkpoint nowhere"),
        (["RUN", "--budget", "0.0001"], "budget must be between the least and the most that strides can reach"),
        (["RUN"], "the following arguments are required: --budget"),
        (
            ["RUN", "--budget", "0.6", "--search", "gradient", "--window", "hard"],
            "strides of a hard window have no gradient",
        ),
        (["RUN", "--budget", "0.6", "--epochs", "0"], "argument --epochs: must be a whole number of at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(trained, tmp_path, arguments, message, capsys):
    given = [trained if argument == "RUN" else argument for argument in arguments]
    assert run(*given, "--runs", tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"diffstride: error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
