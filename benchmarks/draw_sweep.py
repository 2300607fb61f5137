"""Draw the strides of a sweep over planted bands from its run folders.

python benchmarks/draw_sweep.py results/planted-bands.json runs/sweep docs/images/planted-bands
"""

import argparse
import json
from pathlib import Path

import yaml

from diffstride import plotting, tracking
from diffstride.data import PlantedBands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="JSON file that sweep.py wrote")
    parser.add_argument("runs", type=Path, help="folder of its runs")
    parser.add_argument("out", type=Path, help="pictures to write, without suffix")
    options = parser.parse_args()
    rows = json.loads(options.table.read_text())["rows"]
    folders = [options.runs / f"{options.table.stem}-{i}" for i in range(len(rows))]
    config = yaml.safe_load((folders[0] / "config.yaml").read_text())
    smoothness = config["model"]["network"]["init_args"]["downsample_options"]["smoothness"]
    limits = PlantedBands(**config["data"]["init_args"]).stride_limits(smoothness)
    histories = {
        f"from ({row['start'].strip('[]').replace(',', ', ')}): accuracy {row['accuracy']:.2f}": tracking.read_rows(
            folder / "strides.csv"
        )
        for row, folder in zip(rows, folders, strict=True)
        if row["seed"] == rows[0]["seed"]
    }
    plotting.trajectories_to_bands(histories, limits, options.out)


if __name__ == "__main__":
    main()
