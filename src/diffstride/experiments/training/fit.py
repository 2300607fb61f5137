"""`diffstride fit`: train one network, from a YAML file and arguments to a run folder."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import torch
from jsonargparse import ArgumentError, DefaultHelpFormatter, Namespace
from jsonargparse.typing import NonNegativeFloat
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

import diffstride
from diffstride._files import DISK_ERRORS, PATH_ERRORS, atomic_write_text, describe_os_error, remove_unfinished
from diffstride._logging import log_level
from diffstride._text import one_line, printable
from diffstride.errors import InterruptedRunError, RunError, UsageError
from diffstride.experiments import history
from diffstride.experiments.data import ClassificationData
from diffstride.experiments.training.callbacks import (
    EpochLines,
    LiveCost,
    SeedSteps,
    StrideHistory,
    StrideProgressBar,
    WriteResult,
    in_one_line,
)
from diffstride.experiments.training.checkpoints import (
    AtomicCheckpointIO,
    EpochCheckpoint,
    SaveWithinEpochs,
    read_checkpoint,
)
from diffstride.experiments.training.classifier import Classifier
from diffstride.experiments.training.config_errors import unknown_key
from diffstride.experiments.training.diverged import StopWhenDiverged, StopWhenStridesExplode
from diffstride.experiments.training.documents import load_yaml, read_json
from diffstride.experiments.training.folders import RUN, check_name, check_new, clear, locked
from diffstride.experiments.training.signals import end_with_parent
from diffstride.integrations.lightning import ClampStrides

DESCRIPTION = """Train one network. Everything that the run leaves is in the folder RUNS/NAME.

  diffstride fit --config configs/cifar10-small.yaml
  diffstride fit --config configs/cifar10-small.yaml --name strided --model.network.downsample conv
  diffstride fit --config configs/cifar10-small.yaml --name strided --ckpt_path last      (resume)

The arguments of a class follow its name: --model.network.downsample, --model.network.strides, --data.path,
--data.batch_size. To list them: --model.network.help ResNet, --data.help ImageData. To list all arguments of the
trainer as well: --help all. To print all arguments as YAML: --print_config."""

_RUN_NAME = "DIFFSTRIDE_RUN_NAME"

_TRAINER_HELP = {
    "max_epochs": "epochs to train",
    "max_steps": "optimiser steps to train; -1: all of max_epochs",
    "accelerator": "cpu, gpu, mps or auto",
    "devices": "number of devices, or auto",
    "strategy": "how several devices work together, ddp for example",
    "precision": "32, bf16-mixed or 16-mixed",
    "accumulate_grad_batches": "batches in an optimiser step",
    "check_val_every_n_epoch": "epochs between two validations",
    "logger": "further loggers beside the files of the run: WandbLogger, MLFlowLogger or another one of Lightning's",
    "callbacks": "further callbacks: EarlyStopping, EMAWeightAveraging or another one of Lightning's",
    "enable_progress_bar": "false: print no progress",
}
_RARE = "model.search_rounds", "model.compare_steps", "model.compare_lr"  # in the complete help alone


class _CompleteHelp(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A formatter that keeps the lines of the description."""


class _ShortHelp(_CompleteHelp):
    """A formatter of the arguments that are used most, without their types."""

    def add_argument(self, action: argparse.Action) -> None:
        """Add an argument if it is used often."""
        part, _, name = action.dest.partition(".")
        if name in _TRAINER_HELP if part == "trainer" else action.dest not in ("model", *_RARE):
            super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        """Return the help of an argument, and its default if it has one."""
        text = _TRAINER_HELP.get(action.dest.removeprefix("trainer."), action.help)
        has_default = action.default not in (None, argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if has_default else str(text)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Raise the errors of a wrong configuration as a UsageError."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ImportError, ArgumentError, MisconfigurationException) as error:
        causes = _causes(error)  # the parser wraps those of classes
        raise UsageError(one_line(next((it for it in causes if _is_raised_in(diffstride, it)), error))) from error


class FitCLI(LightningCLI):
    """Lightning's command line with a run folder. Arguments are parsed without any effect; then `build` is called."""

    run_folder: Path
    result_writer: WriteResult
    continues_own_folder = False  # True: the checkpoint is one of the run itself
    checkpoint_step: int | None = None  # steps of the checkpoint to resume from, which may be another run's

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; name an unknown key with the nearest right one."""
        try:
            super().parse_arguments(parser, args)
        except (ArgumentError, UnicodeDecodeError) as error:
            raise UsageError(unknown_key(parser, args) or one_line(error)) from error
        seed = self.config.seed_everything
        if seed is not True and not 0 <= seed < 2**32:  # Lightning would take 0 instead
            raise UsageError(f"seed_everything must be between 0 and {2**32 - 1}, got {seed}")
        make_paths_absolute(self.config.data)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name and place, and pass the seed to the data. The trainer's folder is that of the runs."""
        parser.add_argument("--name", type=str, default=None, help="name of the run (default: date and time)")
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        last = "checkpoint to resume from; `last`: the run's last one"
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=last)
        minutes = "minimum time between checkpoints within an epoch; each epoch ends with one"
        parser.add_argument("--checkpoint_minutes", type=NonNegativeFloat, default=10.0, help=minutes)
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("runs", "trainer.default_root_dir")

    def _set_seed(self) -> None:
        """Leave the random numbers as they are until `build`."""

    def instantiate_classes(self) -> None:
        """Build nothing until `build`."""

    @_in_one_line()
    def build(self, locks: ExitStack) -> None:
        """Choose the run folder, so that nothing is overwritten and nothing lost; build network, data and trainer."""
        self._locks, self._is_first, config = locks, not _get_rank(), self.config  # no rank: one process
        if config.trainer.logger is False:
            raise UsageError("trainer.logger cannot be set to false: a run logs to its folder")
        # Lightning starts a process for each further device with the same arguments: the name must be the same, too.
        config.name = config.name or os.environ.get(_RUN_NAME) or datetime.now().strftime("%Y%m%d-%H%M%S")
        os.environ[_RUN_NAME] = check_name("--name", config.name)
        self.run_folder = Path(config.runs).expanduser() / config.name
        if config.ckpt_path:
            self._find_checkpoint()
        if not self.continues_own_folder and self._is_first:
            check_new(self.run_folder)
        super()._set_seed()
        super().instantiate_classes()

    def _find_checkpoint(self) -> None:
        folder, given = self.run_folder, self.config.ckpt_path
        path = folder / "checkpoints" / "last.ckpt" if given == "last" else Path(given)
        self.continues_own_folder = (folder / RUN).is_file() and path.resolve().is_relative_to(folder.resolve())
        if self.continues_own_folder and self._is_first:
            # Before reading: another process may be about to write the next one.
            self._locks.enter_context(locked(folder, adopt=True))
            remove_unfinished(folder / "checkpoints")
        saved = read_checkpoint(path)
        self.checkpoint_step, self._resumed = saved["global_step"], saved
        self.config.ckpt_path = str(path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a trainer with the callbacks and loggers of a run."""
        folder = self.run_folder
        self.result_writer = WriteResult(folder)
        given = self.config_init.trainer
        checkpoints = folder / "checkpoints"
        self._csv = CSVLogger(folder, name="", version="")
        # Lightning's records count the steps done before, so it repeats at most the step of the checkpoint.
        purge = None if self.checkpoint_step is None else self.checkpoint_step + 1
        self._tensorboard = TensorBoardLogger(
            folder, name="", version="tensorboard", default_hp_metric=False, purge_step=purge
        )
        self._further_loggers = [] if given.get("logger") is True else _as_list(given.get("logger"))
        callbacks = [
            EpochCheckpoint(checkpoints, filename="{epoch}", save_last=True, enable_version_counter=False),
            LearningRateMonitor("step"),
            SeedSteps(self.config.seed_everything),
            ClampStrides(),
            StopWhenStridesExplode(),
            StopWhenDiverged(),
            StrideHistory(folder / "strides.csv"),
            LiveCost(),
            self.result_writer,
            SaveWithinEpochs(checkpoints / "last.ckpt", self.config.checkpoint_minutes),
        ]
        further = _as_list(given.get("callbacks"))
        for callback in further:
            if isinstance(callback, ModelCheckpoint):
                callback.dirpath = callback.dirpath or str(folder / "more_checkpoints")
        if given.get("enable_progress_bar") is not False:
            callbacks.append(StrideProgressBar() if sys.stderr.isatty() else EpochLines())
            kwargs["enable_progress_bar"] = sys.stderr.isatty()
        trainer = super().instantiate_trainer(
            logger=[self._csv, self._tensorboard, *self._further_loggers],
            callbacks=[*further, *callbacks],
            plugins=[*_as_list(given.get("plugins")), AtomicCheckpointIO()],
            default_root_dir=str(folder),
            **kwargs,
        )
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # its processes would keep the results
            raise UsageError("trainer.strategy must start separate processes, as ddp does, not copies of this one")
        return trainer

    def run(self) -> None:
        """Train, evaluate the trained network, write the result."""
        try:
            if self._is_first:
                self._check()
                self._open()
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path, weights_only=True)
            if self.result_writer.validated_step != self.trainer.global_step:  # the end is within an epoch
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            self.result_writer.write(self.trainer, self.model)
        except SystemExit as stop:  # Lightning's answer to Ctrl-C, after it has torn down everything
            if not self._is_first:  # the first process prints for all; with another status, Lightning would kill it
                sys.exit(0)
            raise InterruptedRunError(f"interrupted: {self._how_to_resume()}") from stop
        except Exception as error:
            if (explained := self._explain(error)) is None:
                raise
            raise explained from error

    def _explain(self, error: Exception) -> Exception | None:
        """Return a one-line error for a failure that users can cure; None for any other, or one that is explained."""
        if isinstance(error, UsageError | RunError | torch.OutOfMemoryError):
            return None
        for cause in _causes(error):
            # A batch that a worker was about to hand over may be missed before its end is.
            lost = isinstance(cause, ConnectionError | EOFError) and _is_raised_in(multiprocessing, cause)
            if lost or str(cause).startswith("DataLoader worker (pid"):
                # A signal to a group of processes ends the workers, too.
                if "Terminated" in str(cause) or self.trainer.received_sigterm:
                    return InterruptedRunError(f"interrupted: {self._how_to_resume()}")
                reason = one_line(cause).rstrip(".") or type(cause).__name__
                return RunError(
                    f"DataLoader worker ended ({reason}): lower data.num_workers or data.batch_size if memory was "
                    f"short, then {self._how_to_resume()}"
                )
            if isinstance(cause, OSError) and cause.errno in DISK_ERRORS | PATH_ERRORS:
                problem = describe_os_error(cause, cause.filename or f"in {self.run_folder}")  # a write names no file
                return UsageError(f"{problem}, and {self._how_to_resume()}")
        is_of_others = isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
        if self.trainer.world_size > 1 and is_of_others:
            return RunError(f"another process of the training has ended: {self._how_to_resume()}")
        of_settings = isinstance(error, RuntimeError | ValueError) and _is_raised_in(lightning.pytorch, error)
        if of_settings or isinstance(error, MisconfigurationException):  # most often of a callback
            return UsageError(one_line(error))
        if self.checkpoint_step is None or self.trainer.global_step > self.checkpoint_step:  # it has been resumed
            return None
        return UsageError(
            f"{self.config.ckpt_path} cannot be resumed from ({type(error).__name__}: {one_line(error)}): give another "
            "checkpoint with --ckpt_path, or start without it"
        )

    def _how_to_resume(self) -> str:
        resumable = (self.run_folder / "checkpoints" / "last.ckpt").exists()
        return "resume with the same arguments and --ckpt_path last" if resumable else "start it again"

    def _check(self) -> None:
        """Find mistakes that would stop the training at its start, before anything is written."""
        if self.checkpoint_step is not None:
            self._check_resumed(self._resumed)
            del self._resumed
        else:
            self.model.load_initial_weights()
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        self.datamodule.train_dataloader()
        self.model.try_on(self.datamodule)

    def _check_resumed(self, saved: dict[str, Any]) -> None:
        """Check that a checkpoint is of the same network, and that there are steps left."""
        path, folder, trainer = self.config.ckpt_path, self.run_folder, self.config.trainer
        epochs = saved["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        for option, done in ("max_steps", saved["global_step"]), ("max_epochs", epochs):
            over = (trainer[option] or -1) != -1 and done >= trainer[option]
            if over and (folder / "result.json").exists():  # otherwise the run was cut off before its evaluation
                raise UsageError(
                    f"{folder} is finished ({option} {done}): raise --trainer.{option}, or give another --name"
                )
        own, other = (
            {name: value.shape for name, value in state.items() if name.startswith("network.")}
            for state in (self.model.state_dict(), saved["state_dict"])
        )
        if own != other:
            raise UsageError(f"{path} is of another network: resume with --config {folder}/config.yaml")

    def _open(self) -> None:
        """Make the folder of a new run; in a resumed one, drop the rows that the run will write again."""
        folder = self.run_folder
        if self.checkpoint_step is None or not self.continues_own_folder:
            self._locks.enter_context(locked(folder))
            check_new(folder)  # another process may have used it meanwhile
            clear(folder)
        else:
            # strides.csv counts the steps done, metrics.csv the steps done before.
            strides, metrics = folder / "strides.csv", folder / "metrics.csv"
            history.read_dicts(metrics)  # check both files before changing one
            history.drop_rows_from(strides, self.checkpoint_step + 1)
            history.drop_rows_from(metrics, self.checkpoint_step)
            rows = history.read_dicts(metrics)
            writer: Any = self._csv.experiment  # it deletes the file that it finds
            writer.metrics.extend(rows)
            writer.save()
        configuration = self.parser.dump(self.config, skip_none=False)
        atomic_write_text(folder / "config.yaml", configuration)
        if self.model.has_strides:
            charts = {kind: ["Multiline", [f"{kind}/.*"]] for kind in ("stride", "size")}
            self._tensorboard.experiment.add_custom_scalars({"all layers": charts})
        for logger in self._further_loggers:
            logger.log_hyperparams(load_yaml(configuration))


def make_paths_absolute(part: Mapping[str, Any] | Namespace) -> None:
    """Replace paths of data that exist, so that reports from another folder do not take them for names on the hub."""
    content: Any = vars(part) if isinstance(part, Namespace) else part
    for key, value in content.items():
        if key == "path" and isinstance(value, str) and Path(value).expanduser().exists():
            content[key] = str(Path(value).expanduser().absolute())
        elif isinstance(value, Mapping | Namespace):
            make_paths_absolute(value)


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's notes and advice, and restore them afterwards."""
    with warnings.catch_warnings(), log_level(("lightning.pytorch", "lightning.fabric"), logging.WARNING):
        warnings.filterwarnings("ignore", module="lightning")
        yield


def train(arguments: Sequence[str]) -> FitCLI:
    """Train with the arguments of `diffstride fit`; return it with `model`, `datamodule`, `trainer`, `run_folder`."""
    inherited = os.environ.get(_RUN_NAME)
    with quiet(), ExitStack() as locks:
        try:
            if _get_rank():  # the first process of a machine starts the others
                end_with_parent()
            cli = _parsed(arguments)
            cli.build(locks)
            cli.run()
        finally:
            if inherited is None:
                os.environ.pop(_RUN_NAME, None)
    return cli


def parse(arguments: Sequence[str]) -> Any:
    """Return the complete configuration of some arguments of `diffstride fit`. Nothing is built or written."""
    with quiet():
        return _parsed(arguments).config


def has_several_processes(config: Mapping[str, Any]) -> bool:
    """Return whether a training with these arguments of the trainer has several processes, which Lightning starts.

    Lightning starts them with the command line of this process, which must be that of one training.
    """
    given = {name: config[name] for name in ("accelerator", "devices", "num_nodes")}
    given["strategy"] = config["strategy"] if isinstance(config["strategy"], str) else "auto"
    with quiet(), suppress(MisconfigurationException, RuntimeError, ValueError):  # the training explains the mistake
        trainer = Trainer(**given, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        return bool(trainer.world_size > 1)
    return False


@_in_one_line()
def _parsed(arguments: Sequence[str]) -> FitCLI:
    arguments = list(arguments)
    formatter = _CompleteHelp if arguments[-2:] == ["--help", "all"] else _ShortHelp
    if formatter is _CompleteHelp:
        arguments.pop()
    return FitCLI(
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
            "formatter_class": formatter,
            "allow_abbrev": False,
            "exit_on_error": False,
        },
        save_config_callback=None,
        args=arguments,
    )


def _is_raised_in(package: ModuleType, error: BaseException) -> bool:
    """Return whether the code of a package has raised an error."""
    places = traceback.extract_tb(error.__traceback__)
    return bool(places) and places[-1].filename.startswith(os.path.dirname(str(package.__file__)))


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return an error, its cause, and so on."""
    found: list[BaseException] = []
    while error is not None and error not in found:  # an error that is raised again may be among its own causes
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def fit(arguments: Sequence[str]) -> None:
    """Run `diffstride fit`: train, then print the outcome in one line."""
    cli = train(arguments)
    if not cli.trainer.is_global_zero:
        return
    print(printable(f"{cli.run_folder}: {in_one_line(read_json(cli.run_folder / 'result.json'))}"))
