"""Keys and classes that `fit` does not know, in a file or on the command line: refused with the nearest right one."""

from pathlib import Path

import pytest
import yaml

from diffstride.errors import UsageError
from diffstride.experiments.training.fit import parse

DEMO = yaml.safe_load((Path(__file__).parents[3] / "configs" / "demo.yaml").read_text())
MULTI = {
    "class_path": "MultiTask",
    "init_args": {"tasks": {name: {"class_path": "PlantedBands", "init_args": {"bnad": [2, 4]}} for name in "ab"}},
}


def refused(*arguments):
    with pytest.raises(UsageError) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(folder, config):
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


@pytest.mark.parametrize(
    ("arguments", "unknown", "near"),
    [
        ("--model.strid_lr 3", "model.strid_lr", "model.stride_lr"),
        ("--model.stride_l=3", "model.stride_l", "model.stride_lr"),  # no abbreviations
        ("--model.network.width 4 --model.network.strid [2]", "model.network.strid", "model.network.strides"),
        ("--model.network.init_args.strid [2]", "model.network.strid", "model.network.strides"),
        ("--data.bandz [1,2]", "data.bandz", "data.band"),
        ("--model.exploration Sweep --model.exploration.dept .5", "model.exploration.dept", "model.exploration.depth"),
        ("--max_steps 3", "max_steps", "trainer.max_steps"),
        ("--downsample conv", "downsample", "model.network.downsample"),
    ],
)
def test_an_unknown_key_on_the_command_line(arguments, unknown, near, tmp_path):
    message = refused("--config", written(tmp_path, DEMO), *arguments.split())
    assert message == f"unknown key {unknown}: did you mean {near}?"


def test_a_key_that_resembles_none(tmp_path):
    assert "unknown key zzz: --print_config" in refused("--config", written(tmp_path, DEMO), "--zzz", "3")


@pytest.mark.parametrize(
    ("place", "name", "near"),
    [
        ("data", "PlantedBand", "PlantedBands"),
        ("model.exploration", "Sweeps", "Sweep"),
        ("model.network", "diffstride.models.ResNet", None),
        ("model.network", "torch.nn.Linera", None),
    ],
)
def test_an_unknown_class(place, name, near, tmp_path):
    message = refused("--config", written(tmp_path, DEMO), f"--{place}", name)
    assert message.startswith(f"{place} must be one of ")
    assert repr(name) in message
    assert near is None or message.endswith(f"did you mean {near}?")


@pytest.mark.parametrize("name", ["ResNet", "diffstride.experiments.models.ResNet"])
def test_a_class_by_its_bare_name_or_its_path(name, tmp_path):
    config = DEMO | {"model": DEMO["model"] | {"network": {"class_path": name}}}
    found = [
        parse(["--config", written(tmp_path, config)]),
        parse(["--data", "PlantedBands", "--model.network", name]),
    ]
    assert {one.model.network.class_path for one in found} == {"diffstride.experiments.models.ResNet"}


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        (["model"], "modle", "unknown key modle: did you mean model?"),
        (["model", "network"], "netwrk", "unknown key model.netwrk: did you mean model.network?"),
        (["model", "network", "class_path"], "clas_path", "model.network.clas_path"),
        (["model", "network", "init_args", "strides"], "stride", "did you mean model.network.strides?"),
        (["data", "init_args"], "init_arg", "unknown key data.init_arg: did you mean data.init_args?"),
    ],
)
def test_an_unknown_key_in_a_file(path, wrong, message, tmp_path):
    config = yaml.safe_load(yaml.safe_dump(DEMO))
    above = config
    for key in path[:-1]:
        above = above[key]
    above[wrong] = above.pop(path[-1])
    file = written(tmp_path, config)
    answer = refused("--config", file)
    assert answer.startswith(f"{file}: unknown key ")
    assert message in answer


def test_a_key_of_one_of_several_tasks(tmp_path):
    message = refused("--config", written(tmp_path, DEMO | {"data": MULTI}))
    assert message.endswith("unknown key data.tasks.a.bnad: did you mean data.tasks.a.band?")


def test_arguments_of_a_class_that_is_not_named():
    message = refused("--data", "PlantedBands", "--model.network.strides", "[2]")
    assert message.startswith("model.network.strides needs a class: give --model.network as well")


def test_a_wrong_value_is_left_to_the_parser(tmp_path):
    """Options of layers, and classes of others, have keys of their own."""
    more = "--model.network.downsample_options.basis dct --trainer.callbacks EarlyStopping"
    more += " --trainer.callbacks.monitor x --model.momentum a"
    message = refused("--config", written(tmp_path, DEMO), *more.split())
    assert "model.momentum" in message
    assert "unknown" not in message


@pytest.mark.parametrize("content", ["a: [1", "[1, 2]", "\x00"])
def test_a_file_without_a_configuration_is_named(content, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    assert str(file) in refused("--config", str(file))
