"""Which learning rate strides want: `python benchmarks/stride_lr.py configs/demo.yaml --starts '[[1,1]]' '[[3,3]]'`.

Trains one configuration at several stride rates, initial strides and seeds, and writes a table with its provenance.
"""

import argparse
import itertools
import json
from pathlib import Path

from diffstride.training.fit import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--starts", nargs="+", required=True, help="initial strides, as in YAML")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
    parser.add_argument("--clips", nargs="+", default=["1.0"], help="stride_clip; null for none")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", default="runs/stride_lr")
    parser.add_argument("--out", type=Path, required=True)
    options, more = parser.parse_known_args()

    rows = []
    cases = itertools.product(options.rates, options.clips, options.starts, options.seeds)
    for i, (rate, clip, start, seed) in enumerate(cases):
        cli = train([
            "--config", options.config, "--runs", options.runs, "--name", f"{options.out.stem}-{i}",
            "--model.network.strides", start, "--model.stride_lr", str(rate), "--model.stride_clip", clip,
            "--seed_everything", str(seed), *more,
        ])  # fmt: skip
        result = json.loads((cli.run_folder / "result.json").read_text())
        row = {"stride_lr": rate, "stride_clip": clip, "start": start, "seed": seed}
        row |= {key: result[key] for key in ("accuracy", "strides", "macs", "steps")}
        rows.append(row)
        print(row, flush=True)
        provenance = {key: result[key] for key in ("commit", "versions", "hardware", "data_fingerprint")}
        command = {"config": options.config, "more": more}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**command, **provenance, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
