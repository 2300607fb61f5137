"""Measure torch.compile: its cost while strides change sizes, the effect of `size_multiple`, and the final gain.

python benchmarks/time_compile.py --out results/compile.json

The first part is the training of configs/demo.yaml from strides (2, 2), in eager mode and compiled, for several
`size_multiple`. A graph is made for each new size. The second part is single steps of the network of
configs/cifar10-small.yaml at constant sizes, in turns. Strides still move within their sizes.
"""

import json
import random
import statistics
import time
from functools import partial

import torch
from command_line import Parser, at_least, output
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

import diffstride as ds
from diffstride.experiments.benchmark.measure import alternate, ratios, synchronise
from diffstride.experiments.data import PlantedBands
from diffstride.experiments.models import TinyCNN
from diffstride.experiments.provenance import provenance
from time_steps import CASES, Images, Training
from train_precisions import BATCH, COST_WEIGHT, MILESTONES, RATES, STEPS, STRIDE_LR

MULTIPLES = (1, 2, 4, 8)
NETWORKS = ("strided convolutions", "DiffStride", "DiffStride, inner window")


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def train(data: PlantedBands, multiple: int, compiled: bool, device: torch.device) -> dict:
    """Train once; return the sizes met, the graphs made, and the seconds of steps with a new graph and without."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = TinyCNN(strides=[(2.0, 2.0)], downsample_options={"smoothness": 4, "size_multiple": multiple}).to(device)
    if compiled:
        network.compile(fullgraph=True)
    optimizer = torch.optim.SGD(
        ds.param_groups(network, max(RATES), stride_lr=STRIDE_LR, weight_decay=5e-4), momentum=0.9
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: RATES[sum(step >= m for m in MILESTONES)] / max(RATES)
    )
    images, labels = (part.to(device) for part in data.train_set)
    order = torch.Generator().manual_seed(0)
    sizes, making, others, last_new, graphs_made = [], [], [], 0, 0
    batches: list[torch.Tensor] = []
    for step in range(STEPS):
        batches = batches or list(torch.randperm(len(images), generator=order).to(device).split(BATCH))
        batch = batches.pop()
        sizes.append(network.down.output_size(tuple(images.shape[-2:])))
        synchronise(device)
        start = time.perf_counter()
        loss = F.cross_entropy(network(images[batch]), labels[batch]) + COST_WEIGHT * ds.stride_cost(network)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.down.stride, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ds.clamp_strides_(network)
        schedule.step()
        synchronise(device)
        seconds = time.perf_counter() - start
        if compiled and graphs() > graphs_made:
            graphs_made, last_new = graphs(), step
            making.append(seconds)
        else:
            others.append(seconds)
    network.eval()
    images, labels = (part.to(device) for part in data.test_set)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        accuracy = (network(images).argmax(-1) == labels).float().mean().item()
    return {
        "compiled": compiled, "size_multiple": multiple, "steps": STEPS, "sizes": len(set(sizes)),
        "graphs": graphs_made, "last_new_graph_at_step": last_new,
        "seconds_making_graphs": sum(making), "step_ms": 1e3 * statistics.median(others),
        "strides": ds.strides(network)["down"], "maps": sizes[-1], "accuracy": accuracy,
    }  # fmt: skip


def step(training: Training) -> None:
    ds.refresh_sizes(training.network)  # after the strides were put back to near their start
    training.step()


def constant_sizes(device: torch.device, repeats: int) -> list[dict]:
    """Return times of steps of the larger network, over those of its strided convolutions in eager mode."""
    torch.manual_seed(0)
    case = CASES["cifar10-small"]
    data = Images(case)
    trainings = {}
    for way in NETWORKS:
        trainings[way, False] = Training(way, case, data, device)
        trainings[way, True] = Training(way, case, data, device)
        trainings[way, True].network.compile(fullgraph=True)
    candidates = {name: training.candidate(partial(step, training)) for name, training in trainings.items()}
    torch._dynamo.utils.counters.clear()
    seconds = alternate(candidates, repeats, random.Random(0), device=device)
    assert graphs() == len(NETWORKS), "a graph was made at constant sizes"
    reference = seconds[NETWORKS[0], False]
    rows = []
    for (way, compiled), own in seconds.items():
        row = ratios(own, reference)
        rows.append({"network": way, "compiled": compiled, "step_ms": row.pop("ms"), **row})
        print(*(f"{key} {value}" for key, value in rows[-1].items()), sep=", ", flush=True)
    return rows


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=output, required=True, help="JSON file to write")
    parser.add_argument("--device", type=torch.device, default="cpu", help="default: cpu")
    parser.add_argument(
        "--repeats", type=at_least(2), default=20, help="rounds of steps at constant sizes (default: 20)"
    )
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    data = PlantedBands(seed=0)
    data.setup()
    trainings = []
    for compiled, multiple in [(False, 1), *((True, m) for m in MULTIPLES)]:
        with fresh_cache():  # graphs of an earlier training are not reused
            trainings.append(train(data, multiple, compiled, options.device))
        print(*(f"{key} {value}" for key, value in trainings[-1].items()), sep=", ", flush=True)
    facts = {
        "command": f"python benchmarks/time_compile.py --device {options.device}", "repeats": options.repeats,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    rows = constant_sizes(options.device, options.repeats)
    report = {**provenance(options.device), **facts, "trainings": trainings, "settled": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
