"""A trained network with the preparation of its data: `load` reads it from the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffstride.errors import UsageError
from diffstride.experiments.data import ClassificationData, DataError, MultiTask
from diffstride.experiments.data.base import mean_of_views
from diffstride.experiments.parser import by
from diffstride.experiments.training.runs import load_run


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
        tasks: the data by task, without samples; a single task is called "". `prepare_batch` of each prepares samples.
        device: the device of the network.
    """

    network: nn.Module
    config: Mapping[str, Any]
    tasks: Mapping[str, ClassificationData]
    device: torch.device

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
    loaded = load_run(Path(run))
    data = loaded.data()
    tasks: Mapping[str, ClassificationData] = data.tasks if isinstance(data, MultiTask) else {"": data}
    return TrainedNetwork(loaded.network.to(device), loaded.config, tasks, torch.device(device))
