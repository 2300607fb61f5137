"""`diffstride predict`: classify image or audio files with a trained network."""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from diffstride._files import atomic_path
from diffstride._text import csv_cell, printable
from diffstride.errors import RunError, UsageError
from diffstride.experiments.console import PlainConsole
from diffstride.experiments.data import ClassificationData, DataError, MultiTask
from diffstride.experiments.data.base import mean_of_views
from diffstride.experiments.parser import CommandParser, by, check_new_file
from diffstride.experiments.training.fit import quiet
from diffstride.experiments.training.runs import load_data, load_run

DESCRIPTION = """Classify image or audio files with a trained network. Print the most likely classes with probabilities.

  diffstride predict runs/NAME picture.png
  diffstride predict runs/NAME/checkpoints/last.ckpt sounds/*.wav --top 1 --csv predictions.csv

A folder stands for all files in it. Files are prepared like those of the test split. Files that cannot be read are
listed and left out, and the exit status is then 1."""


class Prediction(NamedTuple):
    """One of the most likely classes of a file.

    Attributes:
        file: the file.
        task: the task of several; "" for a single one.
        rank: 1 for the most likely class.
        label: name of the class.
        probability: softmax of the logits.
    """

    file: Path
    task: str
    rank: int
    label: str
    probability: float


class Predictor:
    """A trained network and the preparation of its data.

    Args:
        run: folder of a run, or a checkpoint in it.
        top: number of classes for each file and task.
        device: to run on.

    Raises:
        UsageError: a run that cannot be read, or whose data are not files.
    """

    def __init__(self, run: Path, top: int = 3, device: torch.device | str = "cpu") -> None:
        self.network: nn.Module = load_run(run).network.to(device)
        data = load_data(run)
        self.tasks: Mapping[str, ClassificationData] = data.tasks if isinstance(data, MultiTask) else {"": data}
        for each in self.tasks.values():
            if type(each).read is ClassificationData.read:
                raise UsageError(f"{run} was trained on {type(each).__name__}, which is generated and reads no files")
        self.top, self.device = top, device

    def read(self, file: Path) -> dict[str, Tensor]:
        """Return the inputs of a file, for each task `[views, *sample_shape]`.

        Raises:
            DataError: a file that cannot be read, or has another size than the network's inputs.
        """
        found = {}
        for task, data in self.tasks.items():
            inputs, _ = data.prepare_batch((data.read(file)[None].to(self.device), torch.zeros(1, dtype=torch.int64)))
            if inputs.shape[1:] != data.sample_shape:
                raise DataError(
                    f"{file}: it is {by(inputs.shape[1:])} but the network was trained on {by(data.sample_shape)}: "
                    "resize it, or train with data.image_size"
                )
            found[task] = inputs
        return found

    @torch.inference_mode()
    def __call__(self, files: Mapping[Path, Mapping[str, Tensor]]) -> list[Prediction]:
        """Return the most likely classes of files that have been read, in their order."""
        found: dict[Path, list[Prediction]] = {file: [] for file in files}
        for task, data in self.tasks.items():
            inputs = torch.cat([each[task] for each in files.values()])
            logits: Any = self.network(inputs)
            own: Tensor = logits[task] if task else logits
            probabilities = mean_of_views(own.float(), len(files)).softmax(-1)
            best = probabilities.topk(min(self.top, own.shape[-1]))
            for file, values, places in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
                for rank, (value, place) in enumerate(zip(values, places, strict=True), 1):
                    found[file].append(Prediction(file, task, rank, data.classes[place], value))
        return list(itertools.chain.from_iterable(found.values()))


def predict(arguments: Sequence[str]) -> None:
    """Load the run, classify the files, and print or write the results."""
    options = _options(arguments)
    files = list(dict.fromkeys(_files(options.files)))
    with quiet():
        predictor = Predictor(options.run, options.top, "cuda" if torch.cuda.is_available() else "cpu")
    console = PlainConsole(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    unread = 0
    with ExitStack() as stack:
        rows = None if options.csv is None else stack.enter_context(_new_csv(options.csv))
        bar = Progress(
            *columns,
            console=console,
            transient=True,
            disable=len(files) < 2 or not console.is_terminal,
            redirect_stdout=sys.stdout.isatty(),  # on one terminal, lines go above the bar
        )
        progress = stack.enter_context(bar)
        task = progress.add_task("predicting", total=len(files))
        for start in range(0, len(files), options.batch):
            batch = files[start : start + options.batch]
            readable = {}
            for file in batch:
                try:
                    readable[file] = predictor.read(file)
                except DataError as error:
                    unread += 1
                    console.say(str(error))
                    if rows is not None:
                        rows.writerow(map(csv_cell, [file, "", "", "", "", error]))
            found = predictor(readable) if readable else []
            if rows is not None:
                rows.writerows(map(csv_cell, [*prediction, ""]) for prediction in found)
            else:
                for line in _lines(found):
                    print(printable(line))
            progress.advance(task, len(batch))
    if options.csv is not None:
        print(printable(f"{options.csv}: {len(files) - unread} files"))
    if unread:
        raise RunError(f"{unread} of {len(files)} files could not be read: they are listed above")


@contextmanager
def _new_csv(path: Path) -> Iterator[Any]:
    """Yield the writer of a CSV file that replaces `path` when it is complete."""
    with atomic_path(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "task", "rank", "class", "probability", "error"])
        yield writer


def _lines(found: Sequence[Prediction]) -> Iterator[str]:
    """Yield a line for each file and task."""
    for (file, task), group in itertools.groupby(found, key=lambda prediction: prediction[:2]):
        classes = ", ".join(f"{prediction.label} {prediction.probability:.3f}" for prediction in group)
        yield f"{file}: {f'{task}: ' if task else ''}{classes}"


def _files(given: Sequence[Path]) -> Iterator[Path]:
    """Yield the given files and those in given folders, without hidden ones."""
    for path in given:
        if not path.is_dir():
            yield path
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(path))]
        if not inside:
            raise UsageError(f"{path} is an empty folder: give files, or a folder with some")
        yield from inside


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="diffstride predict", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a checkpoint in it")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="image or audio file, or a folder of them")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="number of classes to print (default: 3)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="files per batch (default: 32)")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="write a table instead of printing lines")
    parser.add_argument("--force", action="store_true", help="replace an existing table")
    options = parser.parse_args(arguments)
    for name in ("top", "batch"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.csv is not None:
        check_new_file(options.csv, options.force)
    return options
