"""Layers side by side: `python benchmarks/layers.py` (or `make bench`).

Forward and backward with the strides' gradients at stride 2, all contestants alternating in random order in one run,
warmed up. An absolute time means little on a shared CPU: read the ratios to `avg_pool2d` of the same run.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import diffstride as ds
from diffstride.training.callbacks import provenance

SHAPES = [(64, 64, 32, 32), (16, 64, 56, 56), (16, 64, 112, 112)]


def contestants(shape: tuple[int, ...], device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    def layer(**options) -> torch.nn.Module:
        return ds.DiffStride2d(2.0, **options).to(device)

    return {
        "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
        "SpectralPool2d": ds.SpectralPool2d(2),
        "DiffStride2d inner": layer(window="inner"),
        "DiffStride2d R=1": layer(smoothness=1.0),
        "DiffStride2d R=4": layer(smoothness=4.0),
        "DiffStride2d R=4 fft": layer(smoothness=4.0, backend="fft"),
    }


def step(f: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    f(x).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    rows = []
    cases = [(shape, dtype) for dtype in options.dtypes for shape in SHAPES]
    for shape, dtype in track(cases, "timing"):
        x = torch.randn(shape, device=device, dtype=getattr(torch, dtype), requires_grad=True)
        times: dict[str, list[float]] = {name: [] for name in contestants(shape, device)}
        entries = list(contestants(shape, device).items())
        for _ in range(options.repeats + 2):
            random.shuffle(entries)
            for name, f in entries:
                times[name].append(step(f, x))
        medians = {name: statistics.median(t[2:]) for name, t in times.items()}
        for name, median in medians.items():
            quartiles = statistics.quantiles(times[name][2:], n=4)
            rows.append({
                "shape": shape, "dtype": dtype, "name": name, "ms": 1e3 * median,
                "spread": (quartiles[2] - quartiles[0]) / median, "ratio": median / medians["avg_pool2d"],
            })  # fmt: skip

    table = Table(title=f"Time over avg_pool2d's, forward and backward, stride 2, {device}")
    table.add_column("layer")
    for shape, dtype in cases:
        table.add_column(f"{dtype}\n{'x'.join(map(str, shape))}", justify="right")
    for name in contestants(SHAPES[0], device):
        cells = [
            next(r["ratio"] for r in rows if (r["name"], r["shape"], r["dtype"]) == (name, shape, dtype))
            for shape, dtype in cases
        ]
        table.add_row(name, *(f"{cell:.2f}" for cell in cells))
    Console(width=max(110, Console().width)).print(table)
    if options.out:
        malloc = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}
        facts = {**provenance(torch.device(device)), "repeats": options.repeats, "malloc": malloc, "rows": rows}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
