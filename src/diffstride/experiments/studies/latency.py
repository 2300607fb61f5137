"""How long the networks of a study take once their strides are fixed, side by side."""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffstride._files import atomic_write_text
from diffstride.experiments.benchmark.measure import Candidate, alternate
from diffstride.experiments.provenance import provenance
from diffstride.experiments.studies.results import latency_file
from diffstride.experiments.training.runs import build_data, load_run
from diffstride.export import freeze
from diffstride.nn import learnable_layers

REPEATS = 30


@torch.inference_mode()
def measure(folder: Path, runs: Mapping[str, Path], batch: int, cpus: int) -> None:
    """Time a batch through each run's network with its strides fixed, in turns, and write `latency.json`.

    Args:
        folder: of the study.
        runs: by label, the folder of a run that is done.
        batch: samples at a time.
        cpus: threads.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(cpus)
    try:
        contestants = {label: Candidate(_step(run, batch, device)) for label, run in runs.items()}
        seconds = alternate(contestants, REPEATS, random.Random(0))
        facts = provenance(device)
    finally:
        torch.set_num_threads(threads)
    latency = {}
    for label, times in seconds.items():
        low, middle, high = (1e3 * q for q in statistics.quantiles(times, n=4, method="inclusive"))
        timed = {"run": runs[label].name, "result": _digest(runs[label])}
        latency[label] = {"ms": middle, "low": low, "high": high, **timed}
    table = {"batch": batch, "repeats": REPEATS, "latency": latency, **facts}
    atomic_write_text(folder / "latency.json", json.dumps(table, indent=1) + "\n")


def is_timed(folder: Path, runs: Mapping[str, Path], batch: int) -> bool:
    """Whether `latency.json` is of these runs, as they are now, and of this batch."""
    before = latency_file(folder)
    if before is None or before["batch"] != batch:
        return False
    found = {label: entry.get("result") for label, entry in before["latency"].items()}
    return found == {label: _digest(run) for label, run in runs.items()}


def _digest(run: Path) -> str:
    return hashlib.sha256((run / "result.json").read_bytes()).hexdigest()[:16]


def _step(run: Path, batch: int, device: torch.device) -> Callable[[], object]:
    network, config = load_run(run)
    example = torch.randn(batch, *build_data(config["data"]).sample_shape)
    frozen = freeze(network, example) if any(learnable_layers(network)) else network
    model, x = frozen.to(device), example.to(device)
    return lambda: _timed(model, x)


def _timed(model: nn.Module, x: Tensor) -> None:
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
