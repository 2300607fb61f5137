"""Compare the measured loss of strides on a budget with the accuracy that fine-tuning reaches with them.

Strides of 1 are inserted into the network of a run. Allocations of strides are settled on a budget: the input alone,
all alike, and random ones. For each, the loss is measured without and with some steps of adaptation, and a copy is
fine-tuned. The rank correlation says how good a guide the measured loss is.

    python benchmarks/compare_allocations.py runs/cifar --budget 0.45 --out results/allocations-small.json
"""

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

import diffstride as ds
from diffstride.experiments.data.base import as_dataset
from diffstride.experiments.provenance import provenance
from diffstride.experiments.training.measured import recalibrated_loss
from diffstride.experiments.training.runs import build_data, load
from diffstride.nn.strides import learnable_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--budget", type=float, default=0.45)
    parser.add_argument("--random", type=int, default=10, help="random allocations")
    parser.add_argument("--steps", type=int, default=500, help="steps of fine-tuning")
    parser.add_argument("--adapt", type=int, default=50, help="steps of adaptation before the loss is measured")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    run = load(options.run)
    data = build_data(run.config["data"])
    network, shape = run.network, data.sample_shape
    ds.insert(network, torch.zeros(2, *shape))
    losses = {
        "recalibrated": recalibrated_loss(data, torch.device("cpu")),
        "adapted": recalibrated_loss(data, torch.device("cpu"), steps=options.adapt),
    }
    names = [name for name, _ in learnable_layers(network)]
    torch.manual_seed(options.seed)
    draws = torch.distributions.Dirichlet(torch.full((len(names),), 0.7)).sample((options.random,)).tolist()
    weights = {"input": [1.0] + [0.0] * (len(names) - 1), "even": [1.0] * len(names)}
    weights |= {f"random {i}": draw for i, draw in enumerate(draws)}
    rows = []
    for name, own in weights.items():
        model = copy.deepcopy(network)
        for (_, layer), weight in zip(learnable_layers(model), own, strict=True):
            layer.write_strides([math.exp(weight)])
        cost = ds.CostModel(model, torch.zeros(1, *shape))
        cost.budget(options.budget).settle()
        with torch.no_grad():
            row = {key: float(loss(copy.deepcopy(model))) for key, loss in losses.items()}
        row |= {
            "name": name,
            "macs": cost.exact() / cost.baseline(),
            "strides": {key: strides[0] for key, strides in ds.strides(model).items()},
            "accuracy": fine_tuned(model, data, options),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    accuracies = [row["accuracy"] for row in rows]
    report = {
        **provenance(torch.device("cpu")),
        "command": " ".join(["python", *sys.argv]),
        "budget": options.budget,
        "rank_correlation": {key: spearmanr([row[key] for row in rows], accuracies).statistic for key in losses},
        "rows": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(report["rank_correlation"])


def fine_tuned(model, data, options) -> float:
    """Return the accuracy on the test split after fine-tuning with the strides held."""
    strides = {id(layer.stride) for _, layer in learnable_layers(model)}
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if id(p) not in strides], options.lr, momentum=0.9, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps, pct_start=0.1)
    train, test = as_dataset(data.train_set), as_dataset(data.test_set)
    drawn = torch.Generator().manual_seed(options.seed)
    model.train()
    for step in range(options.steps):
        indices = torch.randint(len(train), (data.batch_size,), generator=drawn).tolist()
        inputs, labels = data.prepare_batch(train.__getitems__(indices), step=step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    correct = 0
    with torch.no_grad():
        for first in range(0, len(test), 500):
            inputs, labels = data.prepare_batch(test.__getitems__(list(range(first, min(first + 500, len(test))))))
            correct += int((model(inputs).argmax(-1) == labels).sum())
    return correct / len(test)


if __name__ == "__main__":
    main()
