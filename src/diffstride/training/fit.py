"""`diffstride fit`: one training, from a YAML file and arguments to a run folder."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ActionConfigFile, DefaultHelpFormatter  # type: ignore[attr-defined]
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import diffstride.data
import diffstride.models  # noqa: F401 - so that classes are found by their bare names
from diffstride import tracking
from diffstride._check import UserError
from diffstride.data import ClassificationData
from diffstride.training.callbacks import ClampStrides, StrideHistory, StrideProgressBar, TrainingError, WriteResult
from diffstride.training.classifier import Classifier

DESCRIPTION = """Train one network; everything it leaves is in RUNS/NAME.

  diffstride fit --config configs/cifar10-small.yaml
  diffstride fit --config configs/cifar10-small.yaml --name strided --model.network.downsample conv
  diffstride fit --config configs/cifar10-small.yaml --name strided --ckpt_path last      (resume)

The arguments most used: --name, --data.path, --data.batch_size, --model.network.downsample, --model.network.strides,
--model.cost_weight, --model.stride_lr, --trainer.max_epochs, --seed_everything. Choices of a class:
--model.network.help ResNet, --data.help ImageData. All of them, as YAML: --print_config."""


# What libraries say to each other, and what a data set in memory need not be told.
HARMLESS = (
    "LightningCLI's args parameter",
    "JsonargparseDeprecationWarning",
    "was deprecated in v",  # jsonargparse to Lightning
    "LeafSpec",
    "does not have many workers",
    "number of training batches",
    "exists and is not empty",
)


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        # The outer lines say where, the last one what: "Parser key "model.network": Problem with ...: strides must ..."
        print(f"diffstride fit: error: {' '.join(lines)}", file=sys.stderr)
        sys.exit(2)


class ContinuedCSVLogger(CSVLogger):
    """Lightning's logger, which deletes what it finds, made to go on after the rows of a resumed run."""

    @property
    def experiment(self) -> Any:
        """The writer of `metrics.csv`."""
        if self._experiment is None:
            path = Path(self.log_dir) / "metrics.csv"
            rows = tracking.read_dicts(path)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Experiment logs directory", UserWarning)
                writer = super().experiment
            if rows:
                writer.metrics.extend(rows)
                writer.save()
            return writer
        return super().experiment


class FitCLI(LightningCLI):
    """LightningCLI with a run folder."""

    run_folder: Path

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose errors are one line."""
        parser = _Parser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file; later arguments override it")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The name and place of the run; one seed for all."""
        parser.add_argument(
            "--name", type=str | None, default=None, help="folder of the run inside RUNS; default: date and time"
        )
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="checkpoint to resume from; `last` is the run's own last"
        )
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Settle the run folder, so that nothing is overwritten and nothing lost."""
        config = self.config
        config.name = config.name or datetime.now().strftime("%Y%m%d-%H%M%S")
        self.run_folder = Path(config.runs) / config.name
        if config.ckpt_path:
            config.ckpt_path = str(_resume(self.run_folder, config.ckpt_path))
        elif (self.run_folder / "config.yaml").exists():
            raise UserError(
                f"{self.run_folder} holds a run already: give another --name, or resume it with --ckpt_path last"
            )
        try:
            self.run_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.run_folder} ({error.strerror}): give another --runs") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that leaves what a run leaves."""
        folder = self.run_folder
        configured = self._get(self.config_init, "trainer").get("callbacks") or []
        callbacks = [
            ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_last=True, enable_version_counter=False),
            LearningRateMonitor("step"),
            ClampStrides(),
            StrideHistory(folder / "strides.csv"),
            WriteResult(folder),
        ]
        if self._get(self.config_init, "trainer").get("enable_progress_bar") is not False and sys.stderr.isatty():
            callbacks.append(StrideProgressBar())
        else:
            kwargs["enable_progress_bar"] = False
        loggers = [
            ContinuedCSVLogger(folder, name="", version=""),
            TensorBoardLogger(folder, name="", version="tensorboard"),
        ]
        return super().instantiate_trainer(
            logger=loggers, callbacks=[*configured, *callbacks], default_root_dir=str(folder), **kwargs
        )


def _resume(folder: Path, ckpt_path: str) -> Path:
    """The checkpoint to resume from; rows written after it are dropped, since they will be written again."""
    path = folder / "checkpoints" / "last.ckpt" if ckpt_path == "last" else Path(ckpt_path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: check --name and --runs, or start without --ckpt_path")
    try:
        step = torch.load(path, map_location="cpu", weights_only=True)["global_step"]
    except Exception as error:  # whatever a damaged file makes the unpickler say
        raise UserError(
            f"{path} is not a readable checkpoint: resume from another one in {folder}/checkpoints"
        ) from error
    for name in ("metrics.csv", "strides.csv"):
        tracking.drop_rows_after(folder / name, step)
    return path


def train(arguments: Sequence[str]) -> FitCLI:
    """Train with the arguments of `diffstride fit`; model, data and folder are attributes of what is returned."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for harmless in HARMLESS:
            warnings.filterwarnings("ignore", f"(?s).*{harmless}")
        try:
            cli = FitCLI(
                Classifier,
                ClassificationData,
                subclass_mode_data=True,
                seed_everything_default=0,
                run=False,
                auto_configure_optimizers=False,
                trainer_defaults={"enable_model_summary": False},
                parser_kwargs={
                    "prog": "diffstride fit",
                    "usage": "diffstride fit --config FILE [--ARGUMENT VALUE ...]",
                    "description": DESCRIPTION,
                    "formatter_class": _HelpFormatter,
                },
                save_config_kwargs={"overwrite": True},
                args=list(arguments),
            )
        except (ValueError, TypeError, ModuleNotFoundError) as error:  # what a class says of its arguments
            raise UserError(" ".join(str(error).split())) from error
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True)
        except SystemExit as stop:  # Lightning's answer to Ctrl-C, after it has put everything away
            raise TrainingError("interrupted: resume with the same arguments and --ckpt_path last") from stop
    return cli


def fit(arguments: Sequence[str]) -> None:
    """`diffstride fit`: train, then say in one line what came of it."""
    print(summary(train(arguments).run_folder))


def summary(folder: Path) -> str:
    """One line about a finished run."""
    result = json.loads((folder / "result.json").read_text())
    learned = ", ".join("x".join(f"{s:.2f}" for s in layer) for layer in result["strides"].values())
    strides = f", strides {learned}" if learned else ""
    return f"{folder}: accuracy {result['accuracy']:.4f}{strides}, {result['macs'] / 1e6:.2f} million MACs an image"
