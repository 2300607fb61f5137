"""The entry point: commands, help, and the exit status of mistakes."""

import re
import sys

import pytest

import diffstride as ds
from diffstride.experiments.commands.main import COMMANDS, main


def test_version_and_list_of_commands(capsys):
    assert main(["--version"]) == 0
    assert ds.__version__ in capsys.readouterr().out
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"diffstride {name}" in printed
    assert "LazyLinear" not in printed  # not every module of torch


def test_the_help_of_fit_has_the_arguments_that_are_used_most_and_all_on_request(capsys):
    shown = {}
    for more in [], ["all"]:
        with pytest.raises(SystemExit):
            main(["fit", "--help", *more])
        shown[bool(more)] = set(re.findall(r"^  (--[\w.]+)", capsys.readouterr().out, re.MULTILINE))
    assert {"--name", "--model.budget", "--model.network", "--data", "--trainer.max_epochs"} <= shown[False]
    assert len(shown[False]) <= 42
    assert shown[False] < shown[True]
    assert "--trainer.limit_train_batches" in shown[True] - shown[False]
    assert "--trainer.default_root_dir" not in shown[True]  # which is refused


def test_a_missing_package_is_named_with_the_cure(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffstride.experiments.training.fit", None)
    assert main(["fit"]) == 2
    assert "pip install 'diffstride[train]'" in capsys.readouterr().err
