"""`diffstride study`: its command line and its dry run."""

import pytest

from diffstride.experiments.commands.study import _options
from tests.helpers.studies import study


@pytest.mark.parametrize("limit", [[], ["--trainer.max_epochs", "-1"]])
def test_a_dry_run_lists_costs_and_writes_nothing(write, capsys, limit):
    file = write()
    assert study(file, "--dry-run", *limit) == 0
    printed = capsys.readouterr().out
    assert not (file.parent / "runs").exists()
    assert printed.count(" open │") == 4
    # conv: 3x3 kernels at stride 3 on 32x32, circular: 11x11 maps; then a linear layer. 6 steps of 32 images, times 3.
    macs = 11 * 11 * 9 * (1 * 4 + 4 * 8) + 8 * 4
    assert f"{macs / 1e6:.3g}" in printed
    assert f"{3 * macs * 6 * 32 / 1e12:.3g}" in printed


def test_a_dry_run_finds_a_network_that_cannot_be_built(write, capsys):
    file = write(axes={"method": "conv", "strides": [[[2, 2]], [[2.5, 2]]]})
    assert study(file, "--dry-run") == 2
    assert "error: run conv-2.5x2: " in (error := capsys.readouterr().err)
    assert "stride must be an integer for downsample='conv'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes: must be a whole number of at least 1, got '0'"),
        (["--processes", "2", "--ray", "auto"], "not allowed with argument"),
        (["extra"], "cannot read the argument 'extra'"),
        (["--model.network.widht", "3"], "unknown key model.network.widht: did you mean model.network.width?"),
        (["--seed_everything", "3"], "the axis seed of"),
    ],
)
def test_mistakes_on_the_command_line(write, capsys, arguments, message):
    file = write()
    assert study(file, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (file.parent / "runs").exists()


def test_a_value_that_looks_like_a_date_is_text():
    _, settings = _options(["study.yaml", "--data.path", "2024-05-01", "--name.of", "2024-02-30", "--a.b", "[1, 2]"])
    assert settings == {"data.path": "2024-05-01", "name.of": "2024-02-30", "a.b": [1, 2]}
