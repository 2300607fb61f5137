"""Train on planted bands in float32, and under autocast in bfloat16 and float16 (with a GradScaler).

python benchmarks/train_precisions.py --out results/precision.json
python benchmarks/train_precisions.py --device cuda --out results/precision-cuda.json

The training is that of configs/demo.yaml from strides (2, 2), as a loop in plain PyTorch. The noise keeps the accuracy
below 1, so that an effect of precision would be visible. A seed sets the images, their order and the initial weights.
"""

import contextlib
import json
import statistics
import time

import torch
from command_line import Parser, at_least, output
from torch.nn import functional as F

import diffstride as ds
from diffstride.experiments.data import PlantedBands
from diffstride.experiments.models import TinyCNN
from diffstride.experiments.provenance import provenance

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOISE = 3.5  # ten times that of the demo; at 4 some seeds lose an axis, in every precision
BATCH, STEPS, RATES, MILESTONES = 64, 320, (0.01, 0.1, 0.01, 0.001), (20, 200, 280)
STRIDE_LR, COST_WEIGHT = 0.1, 0.3


def autocast(device, dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def train(data, seed, dtype, device):
    """Train once; return the accuracy, the loss and the strides."""
    torch.manual_seed(seed)
    network = TinyCNN(strides=[(2.0, 2.0)], downsample_options={"smoothness": 4}).to(device)
    groups = ds.param_groups(network, max(RATES), stride_lr=STRIDE_LR, weight_decay=5e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: RATES[sum(step >= m for m in MILESTONES)] / max(RATES)
    )
    # The scale grows sooner than by default, so that gradients overflow in a training as short as this one.
    scaler = torch.amp.GradScaler(device.type, growth_interval=20, enabled=dtype is torch.float16)
    images, labels = (part.to(device) for part in data.train_set)
    order = torch.Generator().manual_seed(seed)
    skipped, start = 0, time.perf_counter()
    batches: list[torch.Tensor] = []
    for _ in range(STEPS):
        batches = batches or list(torch.randperm(len(images), generator=order).to(device).split(BATCH))
        batch = batches.pop()
        with autocast(device, dtype):
            loss = F.cross_entropy(network(images[batch]), labels[batch]) + COST_WEIGHT * ds.stride_cost(network)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.down.stride, 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before  # by a gradient that was not finite
        optimizer.zero_grad()
        ds.clamp_strides_(network)
        schedule.step()
    seconds = time.perf_counter() - start
    network.eval()
    images, labels = (part.to(device) for part in data.test_set)
    with torch.no_grad(), autocast(device, dtype):
        logits = network(images).float()
    return {
        "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
        "strides": ds.strides(network)["down"],
        "skipped_steps": skipped,
        "seconds": round(seconds, 1),
    }


def summary(rows):
    """Yield means and deviations over seeds by precision, and the mean difference from float32 of the same seed."""
    reference = [row for row in rows if row["precision"] == "float32"]
    for name in PRECISIONS:
        own = [row for row in rows if row["precision"] == name]
        line = {"precision": name, "seeds": len(own)}
        for figure in "accuracy", "loss":
            values = [row[figure] for row in own]
            apart = [value - row[figure] for value, row in zip(values, reference, strict=True)]
            line[figure] = statistics.mean(values)
            line[f"{figure}_deviation"] = statistics.stdev(values)
            line[f"{figure}_from_float32"] = statistics.mean(apart)
            line[f"{figure}_from_float32_error"] = statistics.stdev(apart) / len(apart) ** 0.5
        line["strides"] = [statistics.mean(axis) for axis in zip(*(row["strides"] for row in own), strict=True)]
        line["skipped_steps"] = sum(row["skipped_steps"] for row in own)
        yield line


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=output, required=True, help="JSON file to write")
    parser.add_argument("--device", type=torch.device, default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--seeds", type=at_least(2), default=5, help="trainings of each kind, at least 2 (default: 5)")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for seed in range(options.seeds):
        data = PlantedBands(noise=NOISE, seed=seed)
        data.setup()
        for name, dtype in PRECISIONS.items():
            rows.append({"precision": name, "seed": seed} | train(data, seed, dtype, options.device))
            print(*(f"{key} {value}" for key, value in rows[-1].items()), sep=", ", flush=True)
    report = provenance(options.device) | {"noise": NOISE, "steps": STEPS, "summary": list(summary(rows)), "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
