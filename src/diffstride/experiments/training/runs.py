"""A run's folder read back: its trained network, its data, its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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


@dataclass(frozen=True, eq=False)
class Run:
    """A run read from its folder.

    Attributes:
        network: the network in evaluation mode.
        config: the configuration that built it.
        folder: the folder of the run.
        checkpoint: the file of the weights.
        saved: the content of that file.
    """

    network: nn.Module
    config: dict[str, Any]
    folder: Path
    checkpoint: Path
    saved: dict[str, Any]

    def data(self) -> ClassificationData:
        """Return the data set of the run without its samples. It prepares files as those of the run were.

        Raises:
            UsageError: a configuration or a checkpoint that does not describe data.
        """
        try:
            data = _make_data(self.config["data"])
        except _BUILDING as error:
            raise UsageError(f"{self.folder / 'config.yaml'} does not describe data: {one_line(error)}") from error
        try:
            data.load_state_dict(self.saved[type(data).__qualname__])
        except KeyError as error:
            raise UsageError(
                f"{self.checkpoint} does not describe its data ({one_line(error)}): train again"
            ) from error
        return data


def load_run(given: Path) -> Run:
    """Return a run from its folder, or from a checkpoint in it.

    Raises:
        UsageError: files that do not exist, cannot be read or do not belong together.
    """
    checkpoint = given / "checkpoints" / "last.ckpt" if given.is_dir() else given
    if not checkpoint.is_file():
        raise UsageError(f"there is no checkpoint {checkpoint}: give the folder of a run, or a checkpoint in it")
    folder = checkpoint.absolute().parent.parent
    config_file = folder / "config.yaml"
    try:
        config = read_yaml(config_file)
        network = build_classifier(config["model"])
    except _BUILDING as error:
        raise UsageError(f"{config_file} does not describe a network: {one_line(error)}") from error
    saved = read_checkpoint(checkpoint)
    weights = {k: v for k, v in saved["state_dict"].items() if not k.startswith("cost.")}  # a budget's state
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{checkpoint} is of another network than {config_file} describes") from error
    return Run(network.network.eval(), config, folder, checkpoint, saved)


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
