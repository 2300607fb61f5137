"""A run's folder read back: its trained network, its data, its result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from diffstride._text import one_line
from diffstride.errors import UsageError
from diffstride.experiments.data import ClassificationData
from diffstride.experiments.training.checkpoints import read_checkpoint
from diffstride.experiments.training.classifier import Classifier
from diffstride.experiments.training.documents import read_json, read_yaml
from diffstride.experiments.training.schema import Result, check_result

# Errors of a configuration that does not describe a network or data.
_BUILDING = (yaml.YAMLError, FileNotFoundError, KeyError, TypeError, ValueError, ArgumentError, ModuleNotFoundError)


class Run(NamedTuple):
    """A run's network in evaluation mode, and the configuration that built it."""

    network: nn.Module
    config: dict[str, Any]


def find_run(given: Path) -> tuple[Path, Path]:
    """Return the files of a run's checkpoint and configuration, from its folder or from a checkpoint in it."""
    checkpoint = given / "checkpoints" / "last.ckpt" if given.is_dir() else given
    if not checkpoint.is_file():
        raise UsageError(f"there is no checkpoint {checkpoint}: give the folder of a run, or a checkpoint in it")
    return checkpoint, checkpoint.absolute().parent.parent / "config.yaml"


def load_run(given: Path) -> Run:
    """Return the network of a run, from its folder or from a checkpoint in it.

    Raises:
        UsageError: files that do not exist, cannot be read or do not belong together.
    """
    checkpoint, config_file = find_run(given)
    try:
        config = read_yaml(config_file)
        network = build_classifier(config["model"])
    except _BUILDING as error:
        raise UsageError(f"{config_file} does not describe a network: {one_line(error)}") from error
    state = read_checkpoint(checkpoint)["state_dict"]
    try:
        network.load_state_dict({k: v for k, v in state.items() if not k.startswith("cost.")})  # a budget's state
    except RuntimeError as error:
        raise UsageError(f"{checkpoint} is of another network than {config_file} describes") from error
    return Run(network.network.eval(), config)


def load_data(given: Path) -> ClassificationData:
    """Return the data of a run from its checkpoint, without samples: it can prepare files like those of the run.

    Raises:
        UsageError: files that do not exist, cannot be read or do not belong together.
    """
    checkpoint, config_file = find_run(given)
    try:
        data = _make_data(read_yaml(config_file)["data"])
    except _BUILDING as error:
        raise UsageError(f"{config_file} does not describe data: {one_line(error)}") from error
    try:
        data.load_state_dict(read_checkpoint(checkpoint)[type(data).__qualname__])
    except KeyError as error:
        raise UsageError(f"{checkpoint} does not describe its data ({one_line(error)}): train again") from error
    return data


def read_result(folder: Path) -> Result | None:
    """Return the checked `result.json` of a run; None if the run has not ended.

    Raises:
        UsageError: a file that is damaged, or not of a run.
    """
    file = folder / "result.json"
    try:
        return check_result(read_json(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UsageError(
            f"{file} is damaged ({one_line(error)}): remove it, and resume the run with --ckpt_path last to write it"
        ) from error


def build_classifier(model: Mapping[str, Any]) -> Classifier:
    """Return the module that `fit` trains, from the part `model` of a configuration."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Classifier, "model")
    return cast(Classifier, _instantiate(parser, "model", model))


def build_data(data: Mapping[str, Any]) -> ClassificationData:
    """Return the loaded data of a run, from the part `data` of its configuration."""
    made = _make_data(data)
    made.setup()
    return made


def _make_data(data: Mapping[str, Any]) -> ClassificationData:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ClassificationData, "data")
    return cast(ClassificationData, _instantiate(parser, "data", data))


def _instantiate(parser: ArgumentParser, name: str, content: Mapping[str, Any]) -> object:
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # until jsonargparse 4.48
    return instantiate(parser.parse_object({name: content}))[name]
