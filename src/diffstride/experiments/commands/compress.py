"""`diffstride compress`: make a trained network cheaper by strides inserted into it."""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from diffstride.cost import CostModel, count_macs
from diffstride.errors import InterruptedRunError, UsageError
from diffstride.experiments.benchmark.measure import Candidate, alternate
from diffstride.experiments.console import PlainConsole, make_table
from diffstride.experiments.parser import CommandParser, at_least
from diffstride.experiments.provenance import write_report
from diffstride.experiments.training.callbacks import in_short
from diffstride.experiments.training.documents import flatten, read_json, read_yaml
from diffstride.experiments.training.fit import make_paths_absolute, quiet, train
from diffstride.experiments.training.folders import as_name, check_name
from diffstride.experiments.training.runs import TrainedNetwork, build_classifier, build_data, load, read_result
from diffstride.experiments.training.schema import total_macs
from diffstride.export import freeze

DESCRIPTION = """Make the network of a run cheaper. Strides of 1 are inserted into it, so that it computes what it
computed. Combinations of strides on the budget are compared by the loss, and the best few again after some steps of
training. The network is fine-tuned with the best, at constant sizes.

  diffstride compress runs/NAME --budget 0.6
  diffstride compress runs/NAME --budget 0.4 --epochs 10 --name half

The result is a run like any other, in RUNS/NAME: report, predict and export take it. A command that was interrupted
goes on when it is given again. compress.json has the accuracy, multiply-accumulates and latency of each stage."""


def compress(arguments: Sequence[str]) -> None:
    """Insert, train, evaluate, print a table."""
    options = _options(arguments)
    with quiet():
        run = load(options.run)
        sample_shape = run.data.sample_shape
    result = read_result(run.folder)
    if result is None or not result["epochs"] or not result["steps"]:
        raise UsageError(f"{options.run} has no result: finish the run first (--ckpt_path last)")
    name = options.name or as_name(f"{run.folder.name}-{options.budget:g}")
    folder = Path(options.runs or run.folder.parent).expanduser() / check_name("--name", name)
    cost = CostModel(run.network, torch.zeros(1, *sample_shape))
    budget = options.budget * cost.exact() / cost.baseline()  # a network with learned strides may be above its baseline
    steps = round(options.epochs * result["steps"] / result["epochs"])
    config = _compressed(run, sample_shape, options, steps, budget)
    _check_same(folder, config)
    console = PlainConsole(width=100)
    if not (folder / "result.json").exists():
        resume = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").exists() else []
        try:
            train(["--config", json.dumps(config), "--runs", str(folder.parent), "--name", folder.name, *resume])
        except InterruptedRunError as error:
            raise InterruptedRunError("interrupted: the same command goes on from here") from error
    with console.status("evaluating"), quiet():
        stages = _stages(run.network, config, folder, result["accuracy"])
    learned = read_json(folder / "result.json")["strides"]
    report = {"budget": options.budget, "stages": stages, "strides": learned}
    write_report(folder / "compress.json", ["compress", *arguments], torch.device("cpu"), report)
    table = make_table(f"{run.folder.name} at {options.budget:g} of its multiply-accumulates", "", *stages)
    rows: dict[str, Callable[[Any], float]] = {
        "accuracy, %": lambda stage: 100 * stage["accuracy"],
        "million MACs per sample, resampling included": lambda stage: total_macs(stage) / 1e6,
        "of them resampling": lambda stage: stage["resampling_macs"] / 1e6,
        "ms for one sample, strides fixed": itemgetter("latency_ms"),
        "ms for 64 samples": itemgetter("latency_batch_ms"),
    }
    for text, value in rows.items():
        table.add_row(text, *(f"{value(stage):.4g}" for stage in stages.values()))
    console.print(table)
    layers = ", ".join(f"{layer} {in_short({layer: s})}" for layer, s in learned.items())
    console.say(f"{folder}: strides {layers}")


def _compressed(
    run: TrainedNetwork, sample_shape: Sequence[int], options: argparse.Namespace, steps: int, budget: float
) -> dict[str, Any]:
    """Return the configuration of a fine-tuning of so many steps of a run's network with inserted strides."""
    changed = json.loads(json.dumps(run.config))  # a copy, with lists for the tuples of the parser
    model = changed["model"]
    network = model["network"]
    model["network"] = {
        "class_path": "diffstride.experiments.models.Built",
        "init_args": {
            "function": network["class_path"],
            "arguments": network.get("init_args", {}),
            "input_shape": list(sample_shape),
            "options": {"smoothness": options.smoothness, "window": options.window, "exclude": options.exclude},
        },
    }
    rate = options.lr or max(model["learning_rates"]) / 5
    measured = options.search == "measured"
    model |= {
        "init_from": str(run.checkpoint), "budget": budget, "stride_search": options.search,
        "stride_steps": 0 if measured else max(1, steps // 3),
        "learning_rates": [rate, rate / 10], "milestones": [max(1, 2 * steps // 3)], "cost_weight": 0.0,
        "exploration": None, "stride_lr": options.stride_lr, "search_steps": 0, "search_rounds": 1,
        "compare_steps": 50, "compare_lr": None, "budget_warmup": 0,
    }  # fmt: skip
    changed["trainer"] |= {"max_epochs": options.epochs, "max_steps": -1}
    return {key: part for key, part in changed.items() if key not in ("name", "runs", "ckpt_path")}


def _check_same(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that a folder has no run of other arguments."""
    file = folder / "config.yaml"
    if file.exists():
        found, asked = read_yaml(file), copy.deepcopy(dict(config))
        for part in found, asked:
            make_paths_absolute(part["data"])
        before = dict(flatten(found))
        if any(before.get(name) != value for name, value in flatten(asked)):
            raise UsageError(f"{folder} holds a run with other arguments: give another --name")


def _stages(original: nn.Module, config: Mapping[str, Any], folder: Path, accuracy: float | None) -> dict[str, Any]:
    """Return accuracy, multiply-accumulates and latency of the network before, with strides of 1, and at the end."""
    data = build_data(config["data"])
    inserted = build_classifier(config["model"])
    inserted.load_initial_weights()
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    (metrics,) = trainer.validate(inserted, datamodule=data, verbose=False)
    stages = {
        "before": (original, accuracy),
        "inserted": (inserted.network.eval(), metrics["val/accuracy"]),
        "fine-tuned": (load(folder).network, read_json(folder / "result.json")["accuracy"]),
    }
    example = torch.zeros(1, *data.sample_shape)
    frozen = {name: freeze(network.float(), example) for name, (network, _) in stages.items()}
    single, batch = (_latencies(frozen, torch.zeros(size, *data.sample_shape)) for size in (1, 64))
    found = {}
    for name, (network, reached) in stages.items():
        macs = count_macs(network, example)
        found[name] = {
            "accuracy": reached, "macs": macs.model, "resampling_macs": macs.resampling,
            "latency_ms": single[name], "latency_batch_ms": batch[name],
        }  # fmt: skip
    return found


def _latencies(networks: Mapping[str, nn.Module], x: torch.Tensor) -> dict[str, float]:
    """Return the median time of a forward pass of networks in turns, in ms."""
    with torch.inference_mode():
        steps = {name: Candidate(partial(network, x)) for name, network in networks.items()}
        seconds = alternate(steps, 20, random.Random(0))
    return {name: 1e3 * statistics.median(own) for name, own in seconds.items()}


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="diffstride compress", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--budget", type=float, required=True, help="multiply-accumulates to reach, of those of the run"
    )
    parser.add_argument("--epochs", type=at_least(1), default=3, metavar="N", help="epochs of fine-tuning (default: 3)")
    parser.add_argument("--lr", type=float, help="learning rate of the weights (default: a fifth of the run's highest)")
    parser.add_argument("--stride_lr", type=float, default=0.1, help="learning rate of the strides (default: 0.1)")
    parser.add_argument(
        "--search", choices=("measured", "gradient"), default="measured",
        help="find strides by the loss that is measured with them, before the fine-tuning, or by their gradient in its "
        "first third (default: measured)",
    )  # fmt: skip
    parser.add_argument(
        "--window", choices=("inner", "hard"),
        help="inner has a ramp, which a gradient needs; hard keeps more detail (default: hard if measured, else inner)",
    )  # fmt: skip
    parser.add_argument("--smoothness", type=float, default=4.0, help="R, the width of inner ramps (default: 4)")
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help="places that get no stride, such as 'stages.*'")
    parser.add_argument("--name", help="name of the new run (default: RUN-BUDGET)")
    parser.add_argument("--runs", help="folder of the new run (default: that of RUN)")
    options = parser.parse_args(arguments)
    options.window = options.window or ("hard" if options.search == "measured" else "inner")
    return options
