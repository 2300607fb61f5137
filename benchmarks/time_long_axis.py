"""Time the operator of a long axis as products with small matrices, beside an FFT, and count its numbers.

python benchmarks/time_long_axis.py --out results/long-axis.json
"""

import argparse
import json
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import fx

from diffstride.backends.fft import SpectralOperator
from diffstride.experiments.benchmark.measure import Candidate, alternate
from diffstride.experiments.provenance import provenance
from diffstride.export.long_axis import LongAxis
from diffstride.options import LayerOptions

AXES = [(1600, 2.0), (4000, 2.0), (3199, 2.0), (16000, 2.0), (15991, 5.0), (32000, 4.0)]


def measured(n: int, stride: float, channels: int) -> dict[str, float]:
    """Return what the operator of an axis takes, and its error in float32, relative to the FFT in float64."""
    options = LayerOptions(window="inner")
    (size,) = options.output_sizes((n,), (stride,))
    axis = options.axis(0, n, size)
    assert axis is not None
    weights = axis.weights(axis.clamp(stride), torch.empty((), dtype=torch.float64))
    started = time.perf_counter()
    operator = LongAxis(axis, weights)
    seconds = time.perf_counter() - started
    numbers = sum(buffer.numel() for buffer in operator.buffers() if buffer.is_floating_point())
    small, fft = fx.symbolic_trace(operator.float()), SpectralOperator(axis, weights)
    x = torch.randn(channels, n)
    with torch.inference_mode():
        exact = fft.apply(x.double(), -1)
        error = float((small(x) - exact).norm() / exact.norm())
        times = alternate(
            {"small": Candidate(partial(small, x)), "fft": Candidate(partial(fft.apply, x, -1))}, 20, random.Random(0)
        )
    return {
        "samples": n, "new_samples": size, "channels": channels, "rank": operator.rank, "numbers": numbers,
        "numbers_of_one_matrix": n * size, "seconds_to_build": seconds, "error": error,
        **{f"{name}_ms": 1e3 * statistics.median(own) for name, own in times.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for n, stride in AXES:
        rows.append(measured(n, stride, options.channels))
        print(json.dumps(rows[-1]), flush=True)
    report = {**provenance(torch.device("cpu")), "command": " ".join(["python", *sys.argv]), "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
