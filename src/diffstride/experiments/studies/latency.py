"""Latencies of a study's networks with fixed strides, measured side by side."""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

from diffstride._files import atomic_write_text
from diffstride.experiments.benchmark.measure import Candidate, alternate, synchronise
from diffstride.experiments.provenance import provenance
from diffstride.experiments.studies.results import read_latency
from diffstride.experiments.training.runs import build_data, load_run
from diffstride.export import freeze
from diffstride.nn import learnable_layers

REPEATS = 30


@torch.inference_mode()
def measure(folder: Path, runs: Mapping[str, Path], batch: int, cpus: int) -> None:
    """Time a batch through the network of each run with fixed strides, in turns, and write `latency.json`.

    Args:
        folder: Folder of the study.
        runs: Folder of a finished run, by label.
        batch: Samples at a time.
        cpus: Threads.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(cpus)
    try:
        candidates = {label: _candidate(run, batch, device) for label, run in runs.items()}
        seconds = alternate(candidates, REPEATS, random.Random(0), synchronise=lambda: synchronise(device))
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
    """Return whether `latency.json` holds these runs with their present results, and this batch."""
    before = read_latency(folder)
    if before is None or before["batch"] != batch:
        return False
    digests = {label: entry.get("result") for label, entry in before["latency"].items()}
    return digests == {label: _digest(run) for label, run in runs.items()}


def _digest(run: Path) -> str:
    return hashlib.sha256((run / "result.json").read_bytes()).hexdigest()[:16]


def _candidate(run: Path, batch: int, device: torch.device) -> Candidate:
    network, config = load_run(run)
    example = torch.randn(batch, *build_data(config["data"]).sample_shape)
    frozen = freeze(network, example) if any(learnable_layers(network)) else network
    model, x = frozen.to(device), example.to(device)
    return Candidate(lambda: model(x))
