"""Predict how the loss changes with each stride by other means than the gradient of the window, beside measured ones.

    python benchmarks/predict_changes.py RUN [--steps 50] [--out results/predicted-changes.json]

RUN is a trained network without learned strides, such as `runs/trained-0` of the study `compress-small`. Strides of 1
are inserted and changed alone. "Measured" is the change after some steps that adapt the weights. The predictors:

- window: the gradient of the stride, which sees what the window removes (`CostModel.sensitivity`);
- grid: the gradient of the positions of the samples. A layer becomes `y_j = x(c + (j - c) S)`, with `x` interpolated by
  its Fourier series and `c` the middle, which is differentiable in `S`. The size of the map stays;
- both: their sum;
- one size: the measured change of one sample less, without steps, times the number of samples removed;
- no steps: the measured change without steps, which is not a prediction from the present strides alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffstride.convert import insert
from diffstride.cost import CostModel
from diffstride.experiments.provenance import provenance
from diffstride.experiments.training.measured import recalibrated_loss
from diffstride.experiments.training.runs import build_data, load
from diffstride.nn.strides import learnable_layers


class Zoom(nn.Module):
    """Sample planes at positions `c + (j - c) S` along both axes, differentiably in `S`, which is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self._matrix(n).to(x) for n in x.shape[-2:])
        return rows @ x @ columns.mT

    def _matrix(self, n: int) -> Tensor:
        samples = torch.arange(n, dtype=torch.float64)
        middle = (n - 1) / 2
        distance = (middle + (samples - middle) * self.scale)[:, None] - samples
        f = torch.arange(n // 2 + 1, dtype=torch.float64)
        weights = torch.full_like(f, 2.0)
        weights[0] = 1.0
        if n % 2 == 0:
            weights[-1] = 1.0
        return (weights * torch.cos(2 * math.pi / n * f * distance[..., None])).sum(-1) / n


def grid_slopes(network: nn.Module, loss: Any) -> dict[str, float]:
    """Return the derivative of the loss by the scale of each layer's grid, at strides of 1."""
    model = copy.deepcopy(network)
    names = [name for name, _ in learnable_layers(model)]
    for name in names:
        model.set_submodule(name, Zoom())
    scales = [model.get_submodule(name).scale for name in names]
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(model), scales)
    return dict(zip(names, (gradient.item() for gradient in gradients), strict=True))


def rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = torch.tensor([a, b], dtype=torch.float64).argsort(1).argsort(1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("results/predicted-changes.json"))
    options = parser.parse_args()
    run = load(options.run)
    data = build_data(run.config["data"])
    insert(run.network, torch.zeros(2, *data.sample_shape))
    cost = CostModel(run.network, torch.zeros(1, *data.sample_shape))
    cpu = torch.device("cpu")
    plain = recalibrated_loss(data, cpu, samples=options.samples)
    adapted = recalibrated_loss(data, cpu, samples=options.samples, steps=options.steps)
    slopes = grid_slopes(run.network, plain)
    raw, measured = cost.sensitivity(plain), cost.sensitivity(adapted)
    sizes = {name: max(c.size for c in raw.changes if c.layer == name) + 1 for name in slopes}
    first = {name: next(c.loss for c in raw.changes if c.layer == name) for name in slopes}
    changes = []
    for change, unadapted in zip(measured.changes, raw.changes, strict=True):
        grid = slopes[change.layer] * (change.stride - 1)
        changes.append({
            "layer": change.layer, "size": change.size, "saved": -change.cost / measured.cost,
            "measured": change.loss, "window": unadapted.predicted, "grid": grid, "both": unadapted.predicted + grid,
            "one size": first[change.layer] * (sizes[change.layer] - change.size), "no steps": unadapted.loss,
        })  # fmt: skip
    summary = {}
    for predictor in ("window", "grid", "both", "one size", "no steps"):
        predicted, truth = [c[predictor] for c in changes], [c["measured"] for c in changes]
        per_cost = [[c[kind] / c["saved"] for c in changes] for kind in (predictor, "measured")]
        summary[predictor] = {
            "rank_correlation": rank_correlation(predicted, truth),
            "rank_correlation_per_cost": rank_correlation(*per_cost),
            "sign_agreement": sum((p > 0) == (t > 0) for p, t in zip(predicted, truth, strict=True)) / len(changes),
            "ratio": sorted(p / t for p, t in zip(predicted, truth, strict=True))[len(changes) // 2],
        }
        print(predictor, {key: round(value, 3) for key, value in summary[predictor].items()})
    report = {
        **provenance(cpu), "command": " ".join(["python", *sys.argv]), "steps": options.steps,
        "samples": options.samples, "summary": summary, "changes": changes,
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
