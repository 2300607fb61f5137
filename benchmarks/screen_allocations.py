"""Compare strides on budgets with and without steps that adapt the weights: is the best the same?

    python benchmarks/screen_allocations.py RUN [--budgets 0.3 0.5 0.8] [--out results/screened-allocations.json]

RUN is a trained network without learned strides, such as `runs/trained-0` of the study `compress-small`. Strides of 1
are inserted, and every combination that `CostModel.find_strides` tries is measured both ways.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

import diffstride as ds
from diffstride.experiments.provenance import provenance
from diffstride.experiments.training.measured import recalibrated_loss
from diffstride.experiments.training.runs import build_data, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5, 0.8])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("results/screened-allocations.json"))
    options = parser.parse_args()
    run = load(options.run)
    data = build_data(run.config["data"])
    loss = recalibrated_loss(data, torch.device("cpu"), steps=options.steps)
    rows = []
    for budget in options.budgets:
        model = copy.deepcopy(run.network)
        ds.insert(model, torch.zeros(2, *data.sample_shape), window="hard")

        def both(network: nn.Module, budget: float = budget) -> float:
            quick = loss(copy.deepcopy(network), adapt=False).item()
            strides = {name: own[0] for name, own in ds.strides(network).items()}
            rows.append({"budget": budget, "unadapted": quick, "adapted": loss(network).item(), "strides": strides})
            print(rows[-1], flush=True)
            return rows[-1]["adapted"]

        ds.CostModel(model, torch.zeros(1, *data.sample_shape)).find_strides(both, budget)
    facts = {**provenance(torch.device("cpu")), "command": " ".join(["python", *sys.argv]), "steps": options.steps}
    options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
