"""A run's folder read back: its trained network, its data, its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from diffstride._text import one_line
from diffstride.errors import UsageError
from diffstride.experiments.data import ClassificationData, DataError, MultiTask
from diffstride.experiments.data.base import mean_of_views
from diffstride.experiments.parser import by
from diffstride.experiments.training.checkpoints import read_checkpoint
from diffstride.experiments.training.classifier import Classifier
from diffstride.experiments.training.documents import read_json, read_yaml
from diffstride.experiments.training.schema import Result, check_result

# Errors of a configuration that does not describe a network or data.
_BUILDING = (yaml.YAMLError, FileNotFoundError, KeyError, TypeError, ValueError, ArgumentError, ModuleNotFoundError)


class Prediction(NamedTuple):
    """One of the most likely classes of a file, of rank 1 for the most likely. A single task is called ""."""

    file: Path
    task: str
    rank: int
    label: str
    probability: float


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """The network of a run and its data; `load` makes it.

    Attributes:
        network: the network in evaluation mode, from prepared inputs to logits.
        config: the configuration of the run.
        device: the device of the network.
        folder: the folder of the run.
        checkpoint: the file of the weights.
        saved: the content of that file.
    """

    network: nn.Module
    config: dict[str, Any]
    device: torch.device
    folder: Path
    checkpoint: Path
    saved: dict[str, Any]

    @cached_property
    def data(self) -> ClassificationData:
        """The data set of the run without its samples. It prepares files as those of the run were.

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

    @property
    def tasks(self) -> Mapping[str, ClassificationData]:
        """The data by task, without samples; a single task is called "". `prepare_batch` of each prepares samples."""
        return self.data.tasks if isinstance(self.data, MultiTask) else {"": self.data}

    @property
    def classes(self) -> dict[str, list[str]]:
        """The names of the classes by task, in the order of the logits."""
        return {task: list(data.classes) for task, data in self.tasks.items()}

    @torch.inference_mode()
    def predict(self, file: str | Path, top: int = 3, *, resize: bool = False) -> list[Prediction]:
        """Return the most likely classes of an image or a sound, by task. It is prepared like those of the test split.

        Args:
            file: the file of the image or of the sound.
            top: the number of classes for each task.
            resize: resize the shorter side of an image to the size of those of training, and keep the middle square.
                Where training had `data.image_size`, this is always done.

        Raises:
            DataError: a file that cannot be read, or has another size than the network's inputs.
            UsageError: data that are generated, not read from files.
        """
        found = []
        for task, data in self.tasks.items():
            if type(data).read is ClassificationData.read:
                raise UsageError(f"the run was trained on {type(data).__name__}, which is generated and reads no files")
            sample = data.read(Path(file), resize)[None].to(self.device)
            inputs, _ = data.prepare_batch((sample, torch.zeros(1, dtype=torch.int64)))
            if inputs.shape[1:] != data.sample_shape:
                raise DataError(
                    f"{file}: it is {by(inputs.shape[1:])} but the network was trained on {by(data.sample_shape)}: "
                    "use resize (--resize), or train with data.image_size"
                )
            logits: Any = self.network(inputs)
            probabilities = mean_of_views((logits[task] if task else logits).float(), 1)[0].softmax(-1)
            best = probabilities.topk(min(top, len(probabilities)))
            for rank, (value, place) in enumerate(zip(*map(Tensor.tolist, best), strict=True), 1):
                found.append(Prediction(Path(file), task, rank, data.classes[place], value))
        return found


def load(run: str | Path, device: torch.device | str = "cpu") -> TrainedNetwork:
    """Return the trained network of a run, ready to predict.

    Args:
        run: the folder of a run, or a checkpoint in it.
        device: the device to run on.

    Raises:
        UsageError: files that do not exist, cannot be read or do not belong together.
    """
    given = Path(run)
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
    device = torch.device(device)
    return TrainedNetwork(network.network.eval().to(device), config, device, folder, checkpoint, saved)


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
