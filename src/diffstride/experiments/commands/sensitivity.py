"""`diffstride sensitivity`: how the loss of a trained network changes with each of its strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffstride.convert import insert
from diffstride.cost import CostModel
from diffstride.errors import UsageError
from diffstride.experiments.console import PlainConsole
from diffstride.experiments.figures import style
from diffstride.experiments.figures.sensitivity import tradeoffs
from diffstride.experiments.parser import CommandParser, at_least
from diffstride.experiments.provenance import write_report
from diffstride.experiments.training.fit import quiet
from diffstride.experiments.training.measured import recalibrated_loss
from diffstride.experiments.training.runs import build_data, load
from diffstride.nn.strides import learnable_layers

DESCRIPTION = """Measure how the loss of a run's network changes when each stride changes alone, on training data, and
what its gradient predicts. A network without learned strides gets strides of 1 first (diffstride.insert). Statistics
of batch norms are computed again for each change; with --steps, the weights are adapted, too.

  diffstride sensitivity runs/NAME
  diffstride sensitivity runs/NAME --steps 50 --samples 5000

sensitivity.json, .png and .svg are written into the folder of the run. A budget should first move the strides whose
loss rises least for what they save."""


def sensitivity(arguments: Sequence[str]) -> None:
    """Measure, print a table, write the file and the picture."""
    parser = CommandParser(prog="diffstride sensitivity", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--samples", type=at_least(1), default=2048, metavar="N", help="training samples of the loss (default: 2048)"
    )
    parser.add_argument(
        "--steps", type=at_least(0), default=0, metavar="N", help="training steps that adapt the weights (default: 0)"
    )
    parser.add_argument(
        "--exclude", nargs="+", metavar="PATTERN", help="places where no stride is inserted, such as 'stages.*'"
    )
    options = parser.parse_args(arguments)
    console = PlainConsole(width=110)
    with console.status("measuring"), quiet():
        run = load(options.run)
        folder, network = run.folder, run.network
        learned = any(learnable_layers(network))
        if learned and options.exclude:
            raise UsageError(f"--exclude is for networks without learned strides: {options.run} has some already")
        data = build_data(run.config["data"])
        if not learned:
            insert(network, torch.zeros(2, *data.sample_shape), exclude=options.exclude)
        loss = recalibrated_loss(data, torch.device("cpu"), samples=options.samples, steps=options.steps)
        found = CostModel(network, torch.zeros(1, *data.sample_shape)).sensitivity(loss)
    report = {
        "loss": found.loss,
        "macs": found.cost,
        "changes": [change._asdict() for change in found.changes],
        "rank_correlation": {layer: _number(found.rank_correlation(layer)) for layer in found.layers},
        "sign_agreement": {layer: _number(found.sign_agreement(layer)) for layer in found.layers},
    }
    write_report(folder / "sensitivity.json", ["sensitivity", *arguments], torch.device("cpu"), report)
    style.save(tradeoffs(found, title=f"Loss and cost of single strides: {folder.name}"), folder / "sensitivity")
    print(found)
    agreement = found.sign_agreement()
    says = f"predicts {agreement:.0%} of the signs; rank correlation {found.rank_correlation():.2f}"
    says = "is zero under these windows" if math.isnan(agreement) else says
    console.say(f"The gradient {says}. {folder / 'sensitivity.png'} shows the changes.")


def _number(value: float) -> Any:
    return None if math.isnan(value) else value
