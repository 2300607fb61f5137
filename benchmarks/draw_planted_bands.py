"""Draw the strides of the study `planted-bands` over what they do to the band that matters.

python benchmarks/draw_planted_bands.py runs/planted-bands docs/images/planted-bands
"""

from pathlib import Path

from command_line import Parser, pictures, planted_bands, runs_of

from diffstride.errors import UsageError
from diffstride.experiments.figures.style import save
from diffstride.experiments.figures.training import Line, lines_of, strides_over_bands
from diffstride.experiments.history import read_rows
from diffstride.experiments.studies.results import groups, statistic


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("out", type=pictures, help="pictures to write, without suffix")
    options = parser.parse_args()
    with parser.mistakes():
        rows = runs_of(options.study, "strides")
        _, limits = planted_bands(options.study / rows[0].name)
        lines: dict[str, dict[str, Line]] = {f"along the {axis}": {} for axis in limits}
        for group in groups(rows).values():
            ((height, width),) = group[0].axes["strides"]
            accuracy = statistic(group, lambda result: result["accuracy"])
            for (_, axis), line in lines_of(read_rows(options.study / group[0].name / "strides.csv")).items():
                lines[f"along the {axis}"][f"from ({height}, {width}): accuracy {accuracy.mean:.2f}"] = line
        if not all(lines.values()):
            raise UsageError(f"{options.study} must have runs with a strides.csv, got none")
        save(strides_over_bands(lines, dict(zip(lines, limits.values(), strict=True))), options.out)


if __name__ == "__main__":
    main()
