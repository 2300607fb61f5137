"""Draw the strides of the study `planted-bands` over what they do to the band that matters.

python benchmarks/draw_planted_bands.py runs/planted-bands docs/images/planted-bands
"""

from pathlib import Path

from command_line import Parser, pictures, planted_bands, runs_of

from diffstride.errors import UsageError
from diffstride.experiments import history
from diffstride.experiments.figures import plots
from diffstride.experiments.studies.results import groups, statistic


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("out", type=pictures, help="pictures to write, without suffix")
    options = parser.parse_args()
    with parser.mistakes():
        rows = runs_of(options.study, "strides")
        _, limits = planted_bands(options.study / rows[0].name)
        histories = {}
        for group in groups(rows).values():
            ((height, width),) = group[0].axes["strides"]
            accuracy = statistic(group, lambda result: result["accuracy"])
            if rows := history.read_rows(options.study / group[0].name / "strides.csv"):
                histories[f"from ({height}, {width}): accuracy {accuracy.mean:.2f}"] = rows
        if not histories:
            raise UsageError(f"{options.study} must have runs with a strides.csv, got none")
        plots.trajectories_to_bands(histories, limits, options.out)


if __name__ == "__main__":
    main()
