"""`diffstride fit`: one training, from a YAML file and arguments to a run folder."""

from __future__ import annotations

import argparse
import csv
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch
import torch
from jsonargparse import ActionConfigFile, DefaultHelpFormatter  # type: ignore[attr-defined]
from jsonargparse.typing import NonNegativeFloat
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

import diffstride.experiments.data
import diffstride.experiments.models
from diffstride._files import DISK_ERRORS, atomic_path, atomic_write_text, remove_unfinished
from diffstride._text import one_line, printable
from diffstride.errors import InterruptedRunError, RunError, UsageError
from diffstride.experiments import history
from diffstride.experiments.data import ClassificationData
from diffstride.experiments.training.callbacks import (
    LiveCost,
    SeedSteps,
    StrideHistory,
    StrideProgressBar,
    WriteResult,
)
from diffstride.experiments.training.checkpoints import (
    AtomicCheckpointIO,
    EpochCheckpoint,
    SaveWithinEpochs,
    cannot_go_on,
    read_checkpoint,
    read_last,
)
from diffstride.experiments.training.classifier import Classifier
from diffstride.experiments.training.config_errors import in_plain_words, unknown_key, unreadable_config
from diffstride.experiments.training.diverged import StopWhenDiverged, StopWhenStridesExplode
from diffstride.experiments.training.folders import check_name, check_new, clear, held, is_run, runs_folder
from diffstride.experiments.training.runs import read_result
from diffstride.experiments.training.schema import check_kind
from diffstride.experiments.training.signals import end_with_parent
from diffstride.experiments.training.tensorboard import LiveView
from diffstride.integrations.lightning import ClampStrides

DESCRIPTION = """Train one network; everything it leaves is in RUNS/NAME.

  diffstride fit --config configs/cifar10-small.yaml
  diffstride fit --config configs/cifar10-small.yaml --name strided --model.network.downsample conv
  diffstride fit --config configs/cifar10-small.yaml --name strided --ckpt_path last      (resume)

The arguments most used: --name, --data.path, --data.batch_size, --model.network.downsample, --model.network.strides,
--model.cost_weight, --model.budget, --model.stride_lr, --trainer.max_epochs, --seed_everything. Choices of a class:
--model.network.help ResNet, --data.help ImageData. All of them, as YAML: --print_config."""

# What libraries say to each other, and what a data set in memory need not be told.
HARMLESS = (
    "LightningCLI's args parameter",
    "JsonargparseDeprecationWarning",
    r"(``)?\w+(``)?( parameter)? was deprecated in v4",  # jsonargparse to Lightning
    "LeafSpec",
    "does not have many workers",
    "number of training batches",
    "exists and is not empty",
    "The dirpath has changed",  # of a run whose folder was moved
)


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(_own_words(ex) or one_line(message)) from ex


class _MetricsWriter(ExperimentWriter):
    """Lightning's, made to keep what is there: a run that is resumed loses no row, however often it is killed."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        if rows := history.read_dicts(self.metrics_file_path):
            self.metrics_keys = list(rows[0])

    def _check_log_dir_exists(self) -> None:
        """Lightning's deletes the file that is there."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Lightning's empties the file before it writes."""
        rows = history.read_dicts(self.metrics_file_path)
        with atomic_path(Path(self.metrics_file_path)) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames)
            writer.writeheader()
            writer.writerows(rows)


class ContinuedCSVLogger(CSVLogger):
    """Lightning's logger, which deletes what it finds, made to go on after the rows of a resumed run."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of `metrics.csv`."""
        if self._experiment is None:
            self._experiment = _MetricsWriter(self.log_dir)
        return self._experiment


class _SaveConfig(SaveConfigCallback):
    """Lightning's, which empties the file before it writes, made to write it whole or not at all."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """In the run folder."""
        text = self.parser.dump(self.config, skip_none=False)
        atomic_write_text(runs_folder(self.config.runs) / self.config.name / "config.yaml", text)


class FitCLI(LightningCLI):
    """LightningCLI with a run folder."""

    run_folder: Path
    result: WriteResult
    resumes = False  # a run in its own folder
    resumed_step: int | None = None  # of the checkpoint, whosever it is

    def __init__(self, *args: Any, holds: ExitStack, **kwargs: Any) -> None:
        self._holds, self._is_first = holds, not _get_rank()  # None where there is one process
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose errors are one line."""
        parser = _Parser(allow_abbrev=False, **kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file; later arguments override it")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; an unknown key is named with the nearest right one."""
        if (unreadable := unreadable_config(args)) is not None:
            raise UsageError(unreadable)
        try:
            super().parse_arguments(parser, args)
        except (UsageError, UnicodeDecodeError) as error:
            raise UsageError(unknown_key(parser, args) or in_plain_words(str(error), args)) from error
        seed = self.config.seed_everything
        if seed is not True and not 0 <= seed < 2**32:  # as numpy has it
            raise UsageError(f"seed_everything must be between 0 and {2**32 - 1}, got {seed}")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The name and place of the run; one seed for all."""
        parser.add_argument(
            "--name", type=str, default=None, help="folder of the run inside RUNS; default: date and time"
        )
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="checkpoint to resume from; `last` is the run's own last"
        )
        parser.add_argument(
            "--checkpoint_minutes",
            type=NonNegativeFloat,
            default=10.0,
            help="between checkpoints within an epoch, at least; the end of each epoch has one",
        )
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Settle the run folder, so that nothing is overwritten and nothing lost."""
        config = self.config
        for option in ("logger", "default_root_dir"):
            if config.trainer[option] is not None:
                raise UsageError(f"trainer.{option} cannot be set: records are kept in RUNS/NAME (--runs, --name)")
        if config.trainer.enable_checkpointing is False:
            raise UsageError("trainer.enable_checkpointing cannot be false: a run can always be resumed")
        if config.name is not None:
            check_name("--name", config.name)
        elif inherited := os.environ.get(_RUN_NAME):  # by processes that Lightning starts for further devices
            config.name = check_name(_RUN_NAME, inherited)
        else:
            config.name = datetime.now().strftime("%Y%m%d-%H%M%S")
        os.environ[_RUN_NAME] = config.name
        self.run_folder = runs_folder(config.runs) / config.name
        if config.ckpt_path:
            self._resume(config)
        if not self.resumes and self._is_first:
            check_new(self.run_folder)

    def _resume(self, config: Any) -> None:
        """Find the checkpoint to resume from."""
        folder = self.run_folder
        path = folder / "checkpoints" / "last.ckpt" if config.ckpt_path == "last" else Path(config.ckpt_path)
        if not path.is_file():
            raise UsageError(f"there is no checkpoint {path}: check --name and --runs, or start without --ckpt_path")
        self.resumes = is_run(folder) and path.resolve().is_relative_to(folder.resolve())
        if self.resumes and self._is_first:  # before it is read: another process may be about to write the next one
            self._holds.enter_context(held(folder, adopt=True))
            remove_unfinished(folder / "checkpoints")
        if config.ckpt_path == "last":
            path, saved = read_last(path)
        else:
            saved = read_checkpoint(path)
        if "loops" not in saved:
            raise UsageError(f"{path} has weights alone: resume from a checkpoint that `diffstride fit` left")
        self.resumed_step, self._resumed = saved["global_step"], saved
        config.ckpt_path = str(path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that leaves what a run leaves."""
        folder = self.run_folder
        self.result = WriteResult(folder)
        trainer = self._get(self.config_init, "trainer")
        checkpoints = folder / "checkpoints"
        callbacks = [
            EpochCheckpoint(checkpoints, filename="{epoch}", save_last=True, enable_version_counter=False),
            LearningRateMonitor("step"),
            SeedSteps(self.config.seed_everything),
            ClampStrides(),
            StopWhenStridesExplode(),
            StopWhenDiverged(),
            StrideHistory(folder / "strides.csv"),
            LiveCost(),
            self.result,
            SaveWithinEpochs(checkpoints / "last.ckpt", self.config.checkpoint_minutes),
        ]
        further = _as_list(trainer.get("callbacks"))
        for callback in further:
            if isinstance(callback, ModelCheckpoint):
                callback.dirpath = str(callback.dirpath or folder / "more_checkpoints")
                if Path(callback.dirpath).resolve() == checkpoints.resolve():
                    raise UsageError(f"dirpath of a ModelCheckpoint must not be {checkpoints}, which has the run's own")
        if trainer.get("enable_progress_bar") is not False and sys.stderr.isatty():
            callbacks.append(StrideProgressBar())
        else:
            kwargs["enable_progress_bar"] = False
        loggers = [
            ContinuedCSVLogger(folder, name="", version=""),
            LiveView(folder, self.resumed_step),
        ]
        made = super().instantiate_trainer(
            logger=loggers,
            callbacks=[*further, *callbacks],
            plugins=[*_as_list(trainer.get("plugins")), AtomicCheckpointIO()],
            default_root_dir=str(folder),
            **kwargs,
        )
        if isinstance(made.strategy.launcher, _MultiProcessingLauncher):  # what such a process notes is lost with it
            raise UsageError("trainer.strategy must start processes of their own, as ddp does, not copies of this one")
        return made

    def run(self) -> None:
        """Train, evaluate what was trained, write the result."""
        try:
            if self._is_first:
                self._check()
                self._open()
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path, weights_only=True)
            if self.result.validated_step != self.trainer.global_step:  # max_steps ended in the middle of an epoch
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            self.result.write(self.trainer, self.model)
        except (UsageError, RunError, MisconfigurationException, torch.OutOfMemoryError):
            raise
        except SystemExit as stop:  # Lightning's answer to Ctrl-C, after it has put everything away
            if not self._is_first:  # which prints for all; with another status, Lightning would kill it
                sys.exit(0)
            raise InterruptedRunError(f"interrupted: {self._how_to_go_on()}") from stop
        except Exception as error:
            if isinstance(error, OSError) and _is_of_a_disk(error):
                where = error.filename or f"in {self.run_folder}"  # a write itself has no name
                raise UsageError(cannot_go_on(error, where, self.run_folder / "checkpoints")) from error
            if (explained := self._explained(error)) is None:
                raise
            raise explained from error

    def _explained(self, error: Exception) -> Exception | None:
        """Return what users can cure of an error that a library has raised, in one line; None for any other."""
        for one in _causes(error):
            if isinstance(one, RuntimeError) and str(one).startswith("DataLoader worker (pid"):
                if "Terminated" in str(one):  # who ends a whole group of processes ends the workers, too
                    return InterruptedRunError(f"interrupted: {self._how_to_go_on()}")
                return self._lost_worker(one_line(one).rstrip("."))
            if _is_of_a_handover(one):  # PyTorch did not yet know that it has ended
                return self._lost_worker(
                    f"DataLoader worker (pid unknown) ended while it handed over a batch ({one!r})"
                )
        if self.trainer.world_size > 1 and _is_of_other_processes(error):
            return RunError(f"another process of the training has ended: {self._how_to_go_on()}")
        if _is_of_lightning(error):
            return UsageError(one_line(error))
        if self.resumed_step is None or self.result.has_stepped or isinstance(error, OSError):
            return None
        # Whatever libraries make of a checkpoint that is damaged, or of another program.
        return UsageError(
            f"{self.config.ckpt_path} cannot be resumed from ({type(error).__name__}: {one_line(error)}): give another "
            "checkpoint with --ckpt_path, or start without it"
        )

    def _lost_worker(self, what: str) -> RunError:
        cure = "lower data.num_workers or data.batch_size if memory was short"
        return RunError(f"{what}: {cure}, then {self._how_to_go_on()}")

    def _how_to_go_on(self) -> str:
        resumable = (self.run_folder / "checkpoints" / "last.ckpt").exists()
        return "resume with the same arguments and --ckpt_path last" if resumable else "start it again"

    def _check(self) -> None:
        """Find what would stop the training at its start, before anything is written."""
        if self.resumed_step is not None:
            self._check_resumed(self._resumed)
            del self._resumed
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        self.datamodule.train_dataloader()
        self.model.try_on(self.datamodule)

    def _check_resumed(self, saved: dict[str, Any]) -> None:
        """Find that a checkpoint is of such a training, and that there are steps left to do."""
        path, folder, trainer = self.config.ckpt_path, self.run_folder, self.config.trainer
        try:
            _check_like(saved["loops"], {"fit_loop": self.trainer.fit_loop.state_dict()}, "loops")
            epochs = saved["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        except (KeyError, ValueError) as error:
            raise UsageError(f"{path} does not tell how far its training was ({error}): give another") from error
        for option, done in ("max_steps", saved["global_step"]), ("max_epochs", epochs):
            over = (trainer[option] or -1) != -1 and done >= trainer[option]
            if over and (folder / "result.json").exists():  # without it, the end was cut off: evaluate, and write it
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
        """Make the folder of a new run; in that of a resumed one, drop the rows that will be written again."""
        if not self.resumes:
            self._holds.enter_context(held(self.run_folder))
            check_new(self.run_folder)  # another process may have used it meanwhile
            clear(self.run_folder)
            return
        assert self.resumed_step is not None
        # Lightning numbers metrics by steps done before, strides.csv by steps done.
        firsts = {"strides.csv": self.resumed_step + 1, "metrics.csv": self.resumed_step}
        for name in firsts:  # both can be read before either is written
            history.read_dicts(self.run_folder / name)
        for name, first in firsts.items():
            history.drop_rows_from(self.run_folder / name, first)


def _check_like(found: Any, expected: Any, where: str) -> None:
    """Check that the entries of a state are of the kinds that those of another one have."""
    check_kind(found, type(expected), where)
    for key in expected if isinstance(expected, dict) else ():
        if key in found:  # the library that reads it says what another version of it left out
            _check_like(found[key], expected[key], f"{where}[{key!r}]")


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


_RUN_NAME = "DIFFSTRIDE_RUN_NAME"


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries' chatter off; put back after."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    said_of_threads = threading.excepthook
    with warnings.catch_warnings():
        for harmless in HARMLESS:
            warnings.filterwarnings("ignore", f"(?s).*{harmless}")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        # TensorBoard writes in a thread, which passes the errors of files on.
        threading.excepthook = lambda failed: None if isinstance(failed.exc_value, OSError) else said_of_threads(failed)
        try:
            yield
        finally:
            threading.excepthook = said_of_threads
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _is_of_a_disk(error: BaseException | None) -> bool:
    """Whether a disk has refused, whatever wrote there."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def train(arguments: Sequence[str]) -> FitCLI:
    """Train with the arguments of `diffstride fit`; the result has `model`, `datamodule`, `trainer`, `run_folder`."""
    inherited = os.environ.get(_RUN_NAME)
    with quiet(), ExitStack() as holds:
        try:
            if _get_rank():  # of the processes of one machine, the first one starts the others
                end_with_parent()
            cli = _construct(arguments, holds)
            cli.run()
        except MisconfigurationException as error:
            raise UsageError(one_line(str(error))) from error
        finally:
            if inherited is None:
                os.environ.pop(_RUN_NAME, None)
    return cli


def parse(arguments: Sequence[str]) -> Any:
    """The complete configuration that arguments of `diffstride fit` mean; nothing is built or written.

    Raises:
        UsageError: arguments that `fit` would refuse before it builds anything.
    """
    with quiet():
        return _construct(arguments, ExitStack(), _ParsedFit).config


def has_several_processes(config: Mapping[str, Any]) -> bool:
    """Return whether a training with such arguments of the trainer has several processes, which Lightning starts.

    Lightning starts them with the command line of this process, which must be that of the training and of nothing else.
    """
    given = {name: config[name] for name in ("accelerator", "devices", "num_nodes")}
    strategy = config["strategy"] if isinstance(config["strategy"], str) else "auto"
    try:
        with quiet():
            trainer = Trainer(
                **given, strategy=strategy, logger=False, enable_checkpointing=False, enable_progress_bar=False
            )
            return bool(trainer.world_size > 1)
    except (MisconfigurationException, RuntimeError, ValueError):  # the training itself says what is wrong
        return False


class _ParsedFit(FitCLI):
    """Parses, and leaves it at that."""

    def _set_seed(self) -> None:
        """No run, no seed."""

    def before_instantiate_classes(self) -> None:
        """No run, no folder."""

    def instantiate_classes(self) -> None:
        """Nothing."""


def _construct(arguments: Sequence[str], holds: ExitStack, kind: type[FitCLI] = FitCLI) -> FitCLI:
    try:
        return kind(
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
            save_config_callback=_SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            args=list(arguments),
            holds=holds,
        )
    except UsageError:
        raise
    except (ValueError, TypeError, ModuleNotFoundError) as error:  # what a class says of its arguments
        raise UsageError(_own_words(error) or one_line(str(error))) from error
    except RuntimeError as error:
        if not _is_of_lightning(error):
            raise
        raise UsageError(one_line(error)) from error


def _own_words(error: BaseException | None) -> str | None:
    """What a class of ours has said of its arguments, where the parser has wrapped it in words of its own."""
    own = os.path.dirname(diffstride.__file__)
    return next((str(one) for one in _causes(error) if isinstance(one, UsageError) or _is_of(own, one)), None)


def _is_of_other_processes(error: Exception) -> bool:
    """Return whether a process has waited in vain for another one."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _is_of_a_handover(error: BaseException) -> bool:
    """Return whether a connection to a worker of a data loader broke while tensors came through it."""
    places = traceback.extract_tb(error.__traceback__)
    handover = any(place.filename == resource_sharer.__file__ for place in places)
    return handover and isinstance(error, OSError | EOFError)


def _is_of_lightning(error: Exception) -> bool:
    """Return whether Lightning itself raised an error: of a callback that the user has set wrongly, mostly."""
    return isinstance(error, RuntimeError | ValueError) and _is_of(os.path.dirname(lightning.pytorch.__file__), error)


def _is_of(package: str, error: BaseException) -> bool:
    """Return whether code of a package raised an error."""
    places = traceback.extract_tb(error.__traceback__)
    return bool(places) and places[-1].filename.startswith(package)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what caused it, and so on."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # an error that is raised again may be among its own causes
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def fit(arguments: Sequence[str]) -> None:
    """`diffstride fit`: train, then say in one line what came of it."""
    cli = train(arguments)
    if cli.trainer.is_global_zero:
        print(printable(summary(cli.run_folder)))


def summary(folder: Path) -> str:
    """One line about a finished run."""
    result = read_result(folder)
    assert result is not None, folder
    parts = [] if result["accuracy"] is None else [f"accuracy {result['accuracy']:.4f}"]
    if result["strides"]:
        parts.append(
            "strides " + ", ".join("x".join(f"{s:.2f}" for s in layer) for layer in result["strides"].values())
        )
    parts.append(f"{result['macs'] / 1e6:.2f} million MACs an image")
    return f"{folder}: {', '.join(parts)}"
