"""`diffstride predict`: classify image or audio files with a trained network."""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from diffstride._files import atomic_path
from diffstride._text import csv_cell, printable
from diffstride.errors import RunError, UsageError
from diffstride.experiments.console import PlainConsole
from diffstride.experiments.data import DataError
from diffstride.experiments.parser import CommandParser, at_least, check_file
from diffstride.experiments.training.fit import quiet
from diffstride.experiments.training.runs import load

DESCRIPTION = """Classify image or audio files with a trained network. Print the most likely classes with probabilities.

  diffstride predict runs/NAME picture.png
  diffstride predict runs/NAME/checkpoints/last.ckpt sounds/*.wav --top 1 --csv predictions.csv

A folder stands for all files in it. Files are prepared like those of the test split. Files that cannot be read are
listed and left out, and the exit status is then 1."""


def predict(arguments: Sequence[str]) -> None:
    """Load the run, classify the files, and print or write the results."""
    options = _options(arguments)
    files = list(dict.fromkeys(_files(options.files)))
    with quiet():
        trained = load(options.run, "cuda" if torch.cuda.is_available() else "cpu")
    console = PlainConsole(stderr=True)
    unread = 0
    bar = console.progress(
        transient=True,
        disable=len(files) < 2 or not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # on one terminal, lines go above the bar
    )
    with nullcontext() if options.csv is None else _new_csv(options.csv) as rows, bar:
        for file in bar.track(files, description="predicting"):
            try:
                found = trained.predict(file, options.top, resize=options.resize)
            except DataError as error:
                unread += 1
                console.say(str(error))
                if rows is not None:
                    rows.writerow(map(csv_cell, [file, "", "", "", "", error]))
                continue
            if rows is not None:
                rows.writerows(map(csv_cell, [*prediction, ""]) for prediction in found)
                continue
            for task, group in itertools.groupby(found, key=lambda prediction: prediction.task):
                classes = ", ".join(f"{prediction.label} {prediction.probability:.3f}" for prediction in group)
                print(printable(f"{file}: {f'{task}: ' if task else ''}{classes}"))
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


def _files(given: Sequence[Path]) -> Iterator[Path]:
    """Yield the given files and those in given folders, without hidden ones."""
    for path in given:
        if not path.is_dir():
            yield path
            continue
        inside = [
            file for file in sorted(path.rglob("*")) if file.is_file() and "/." not in f"/{file.relative_to(path)}"
        ]
        if not inside:
            raise UsageError(f"{path} is an empty folder: give files, or a folder with some")
        yield from inside


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="diffstride predict", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a checkpoint in it")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="image or audio file, or a folder of them")
    parser.add_argument(
        "--top", type=at_least(1), default=3, metavar="N", help="number of classes to print (default: 3)"
    )
    parser.add_argument(
        "--resize", action="store_true", help="resize images to the size of training, and keep the middle square"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="write a table instead of printing lines")
    parser.add_argument("--force", action="store_true", help="replace an existing table")
    options = parser.parse_args(arguments)
    if options.csv is not None:
        check_file(options.csv, force=options.force)
    return options
