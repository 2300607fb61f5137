"""Train one configuration in several ways, one after another, and write a table with its provenance.

python benchmarks/sweep.py configs/demo.yaml --starts '[[1,1]]' '[[3,3]]' --seeds 0 1 --out results/planted.json
"""

import argparse
import itertools
import json
from pathlib import Path

from diffstride.training.fit import train

KEYS = (
    "accuracy",
    "strides",
    "macs",
    "macs_budget",
    "resampling_macs",
    "steps",
    "step_time_ms",
    "train_seconds",
    "peak_memory_mb",
)
PROVENANCE = ("commit", "versions", "hardware", "data", "data_fingerprint", "parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of `diffstride fit`")
    parser.add_argument("--methods", nargs="+", default=["diffstride"], help="ways to downsample")
    parser.add_argument("--starts", nargs="+", required=True, help="initial strides, as in YAML")
    parser.add_argument("--rates", nargs="+", type=float, default=[None], help="stride_lr, if not the configuration's")
    parser.add_argument("--budgets", nargs="+", type=float, default=[None], help="model.budget, if there is one")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", default="runs/sweep", help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options, more = parser.parse_known_args()

    rows = []
    cases = itertools.product(options.methods, options.starts, options.rates, options.budgets, options.seeds)
    for i, (method, start, rate, budget, seed) in enumerate(cases):
        cli = train([
            "--config", options.config, "--runs", options.runs, "--name", f"{options.out.stem}-{i}",
            "--model.network.downsample", method, "--model.network.strides", start, "--seed_everything", str(seed),
            *([] if rate is None else ["--model.stride_lr", str(rate)]),
            *([] if budget is None else ["--model.budget", str(budget)]), *more,
        ])  # fmt: skip
        result = json.loads((cli.run_folder / "result.json").read_text())
        row = {"method": method, "start": start, "stride_lr": cli.model.stride_lr, "budget": budget, "seed": seed}
        rows.append(row | {key: result[key] for key in KEYS})
        print(rows[-1], flush=True)
        table = {"config": options.config, "more": more} | {key: result[key] for key in PROVENANCE} | {"rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
