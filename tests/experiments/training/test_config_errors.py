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


def without(config, *path):
    """The part of a nested mapping that a path leads to, taken out."""
    *above, last = path
    for key in above:
        config = config[key]
    return config.pop(last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.strid_lr", "3"], "unknown key model.strid_lr: did you mean model.stride_lr?"),
        (["--model.stride_l=3"], "unknown key model.stride_l: did you mean model.stride_lr?"),  # no abbreviations
        (["--model.network.width", "4", "--model.network.strid", "[2]"],
         "unknown key model.network.strid: did you mean model.network.strides?"),
        (["--model.network.init_args.strid", "[2]"],
         "unknown key model.network.strid: did you mean model.network.strides?"),
        (["--data.bandz", "[1,2]"], "unknown key data.bandz: did you mean data.band?"),
        (["--model.exploration", "Sweep", "--model.exploration.dept", ".5"],
         "unknown key model.exploration.dept: did you mean model.exploration.depth?"),
        (["--trainer.max_epoch", "3"], "unknown key trainer.max_epoch: did you mean trainer.max_epochs?"),
        (["--max_steps", "3"], "unknown key max_steps: did you mean trainer.max_steps?"),
        (["--downsample", "conv"], "unknown key downsample: did you mean model.network.downsample?"),
        (["--confg", "x.yaml"], "unknown key confg: did you mean config?"),
        (["--zzz", "3"], "unknown key zzz: --print_config shows those that there are"),
        (["--data", "PlantedBand"], "data must be one of AudioData, ImageData, MultiTask, PlantedBands, "
         "SyntheticSounds, or a class of your own as package.Name, got 'PlantedBand': did you mean PlantedBands?"),
        (["--model.exploration", "Sweeps"], "model.exploration must be one of Jitter, Sweep, or a class of your own "
         "as package.Name, got 'Sweeps': did you mean Sweep?"),
        (["--model.network", "torch.nn.Linera"], "model.network must be one of AudioCNN, DenseNet, ResNet, TinyCNN, "
         "WaveformCNN, or a class of your own as package.Name, got 'torch.nn.Linera'"),
    ],
)  # fmt: skip
def test_on_the_command_line(arguments, message, tmp_path):
    with pytest.raises(UsageError) as caught:
        parse(["--config", written(tmp_path, DEMO), *arguments])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        (["model"], "modle", "unknown key modle: did you mean model?"),
        (["model", "network"], "netwrk", "unknown key model.netwrk: did you mean model.network?"),
        (["model", "network", "class_path"], "clas_path",
         "unknown key model.network.clas_path: did you mean model.network.class_path?"),
        (["model", "network", "init_args", "strides"], "stride",
         "unknown key model.network.stride: did you mean model.network.strides?"),
        (["data", "init_args"], "init_arg", "unknown key data.init_arg: did you mean data.init_args?"),
        (["trainer", "max_steps"], "max_step", "unknown key trainer.max_step: did you mean trainer.max_steps?"),
    ],
)  # fmt: skip
def test_in_a_file(path, wrong, message, tmp_path):
    config = yaml.safe_load(yaml.safe_dump(DEMO))
    value = without(config, *path)
    above = config
    for key in path[:-1]:
        above = above[key]
    above[wrong] = value
    file = written(tmp_path, config)
    with pytest.raises(UsageError) as caught:
        parse(["--config", file])
    assert str(caught.value) == f"{file}: {message}"


def test_below_the_tasks_of_a_data_set_of_several(tmp_path):
    file = written(tmp_path, DEMO | {"data": MULTI})
    with pytest.raises(UsageError) as caught:
        parse(["--config", file])
    assert str(caught.value) == f"{file}: unknown key data.tasks.a.bnad: did you mean data.tasks.a.band?"


def test_arguments_of_a_class_that_is_not_named():
    with pytest.raises(UsageError, match=r"^model.network.strides needs a class: give --model.network as well, one of"):
        parse(["--data", "PlantedBands", "--model.network.strides", "[2]"])


def test_what_is_known_is_not_blamed(tmp_path):
    """A wrong value is the parser's to explain; options of layers, and classes of others, have keys of their own."""
    more = ["--model.network.downsample_options.basis", "dct", "--trainer.callbacks", "EarlyStopping"]
    with pytest.raises(UsageError) as caught:
        parse(["--config", written(tmp_path, DEMO), *more, "--trainer.callbacks.monitor", "x", "--model.momentum", "a"])
    assert "model.momentum" in str(caught.value)
    assert "unknown" not in str(caught.value)


def written(folder, config):
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)
