"""Measure the effect of exploration on training time, at steps spread evenly over its schedule.

python benchmarks/time_exploration.py --out results/exploration-time.json
"""

import json
import random
import statistics

import torch
from command_line import Parser, at_least, output
from torch import nn

import diffstride as ds
from diffstride.experiments.benchmark.measure import WARMUP, Candidate, alternate
from diffstride.experiments.models import ResNet
from diffstride.experiments.provenance import provenance
from diffstride.integrations.input_sizes import InputSizes

WAYS = {"none": None, "Jitter": ds.Jitter(), "Sweep": ds.Sweep(), "Sweep, until 0.2": ds.Sweep(until=0.2)}
STARTS = ([2, 2, 3], [3, 1, 2])  # those of the study exploration-cifar10
BATCH, SIZE = 64, 32


def training(exploration: ds.Exploration | None, strides: list[int], rounds: int) -> Candidate:
    """Return steps of the network of table3-small; each call is the step of the next moment of the schedule."""
    network = ResNet(
        depth=18, width=0.125, preactivation=True, strides=strides, downsample_options={"smoothness": 1}
    ).to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    optimizer = torch.optim.SGD(ds.param_groups(network, lr=1e-3, weight_decay=5e-4), momentum=0.9)
    inputs = InputSizes(network)
    network(images)
    inputs.close()
    done = -WARMUP

    def step() -> None:
        nonlocal done
        samples = BATCH
        if exploration is not None:
            exploration.set_strides(network, max(done, 0), rounds)
            samples = round(BATCH * exploration.batch_fraction(network, inputs.sizes))
        done += 1
        loss = nn.functional.cross_entropy(network(images[:samples]), labels[:samples])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Candidate(step, network)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=output, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=at_least(1), default=60, help="moments of the schedule (default: 60)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for strides in STARTS:
        candidates = {name: training(way, strides, options.rounds) for name, way in WAYS.items()}
        seconds = alternate(candidates, options.rounds, random.Random(0))
        for name, own in seconds.items():
            ratios = [a / b for a, b in zip(own, seconds["none"], strict=True)]
            rows.append({
                "strides": strides,
                "name": name,
                "total_ratio": sum(own) / sum(seconds["none"]),
                "median_ratio": statistics.median(ratios),
                "largest_ratio": max(ratios),
                "ms": [round(1e3 * s, 1) for s in own],
            })  # fmt: skip
            print(strides, name, *(f"{rows[-1][key]:.3f}" for key in ("total_ratio", "median_ratio", "largest_ratio")))
    report = provenance(torch.device("cpu")) | {"rounds": options.rounds, "batch": BATCH, "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
