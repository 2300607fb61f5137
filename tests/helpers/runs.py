"""Runs of the demo's configuration that take a second."""

import json
from pathlib import Path

from diffstride.experiments.training.fit import train

CONFIG = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
SMALL = [
    "--config", CONFIG, "--data.train_samples", "192", "--data.test_samples", "64", "--data.batch_size", "32",
    "--model.network.width", "4", "--model.milestones", "[3,8,10]", "--trainer.enable_progress_bar", "false",
]  # fmt: skip


def small(folder, name, *more, steps=None):
    """Train with some arguments; an epoch has 6 steps. Return the command line and the result."""
    steps = [] if steps is None else ["--trainer.max_steps", str(steps)]
    cli = train([*SMALL, "--runs", str(folder), "--name", name, *steps, *more])
    return cli, json.loads((cli.run_folder / "result.json").read_text())
