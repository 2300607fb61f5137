"""Draw the strides of the study `planted-bands` over what they do to the band that matters.

python benchmarks/draw_planted_bands.py runs/planted-bands docs/images/planted-bands
"""

from pathlib import Path

from command_line import Parser, output, planted_bands

from diffstride import plotting, tracking
from diffstride.data import PlantedBands
from diffstride.studies.results import groups, statistic


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("out", type=output, help="pictures to write, without suffix")
    options = parser.parse_args()
    with parser.mistakes():
        rows, config = planted_bands(options.study, "strides")
    smoothness = config["model"]["network"]["init_args"]["downsample_options"]["smoothness"]
    limits = PlantedBands(**config["data"]["init_args"]).stride_limits(smoothness)
    histories = {}
    for group in groups(rows).values():
        ((height, width),) = group[0].axes["strides"]
        accuracy = statistic(group, lambda result: result["accuracy"])
        name = f"from ({height}, {width}): accuracy {accuracy.mean:.2f}"
        histories[name] = tracking.read_rows(options.study / group[0].name / "strides.csv")
    plotting.trajectories_to_bands(histories, limits, options.out)


if __name__ == "__main__":
    main()
