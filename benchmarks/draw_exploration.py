"""Draw learned strides, and those that training used in their place, from the study `exploration`.

python benchmarks/draw_exploration.py runs/exploration docs/images/exploration
"""

from pathlib import Path
from typing import Any

import torch
from command_line import Parser, pictures, planted_bands, runs_of

from diffstride.errors import UsageError
from diffstride.experiments import history
from diffstride.experiments.figures import plots
from diffstride.experiments.studies.results import Row
from diffstride.experiments.training.runs import build_classifier

# From a start that sees the band of neither axis; the band along the width is the one further away.
WAYS, BAND, START, AXIS = ("none", "Jitter 0.15", "Jitter 0.5", "Sweep"), "8x10", [[6, 6]], "width"
AXES = "exploration", "band", "strides"


def used(config: dict[str, Any], learned: tuple[list[int], list[float]], axis: int) -> list[float]:
    """The strides that training used of one axis, from those that were learned and the schedule."""
    model = build_classifier(config["model"])
    if model.explorer is None:
        return learned[1]
    layer, size = model.network.down, config["data"]["init_args"]["size"][axis]
    strides = []
    for step, stride in zip(*learned, strict=True):
        with torch.no_grad():
            layer.stride[axis] = stride
        steps = config["trainer"]["max_steps"]
        model.explorer.exploration.set_strides(model, step, steps, seed=config["seed_everything"])
        strides.append(min(max(1.0, stride * (layer.stride_scale[axis] if layer.stride_scale else 1.0)), size / 2))
    return strides


def line(folder: Path, row: Row) -> tuple[list[int], list[float]]:
    """Steps and strides of a run along the axis."""
    rows = [r for r in history.read_rows(folder / row.name / "strides.csv") if r.axis == AXIS]
    return [r.step for r in rows], [r.stride for r in rows]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("out", type=pictures, help="pictures to write, without suffix")
    options = parser.parse_args()
    with parser.mistakes():
        rows, panels = runs_of(options.study, *AXES), {}
        groups = {way: [row for row in rows if [row.axes[axis] for axis in AXES] == [way, BAND, START]] for way in WAYS}
        if missing := [way for way, group in groups.items() if not group]:
            raise UsageError(f"{options.study} must have runs with the exploration {missing[0]}, got none that is done")
        for way, group in groups.items():
            config, limits = planted_bands(options.study / group[0].name)
            learned = [line(options.study, row) for row in group]
            of_first = used(config, learned[0], history.AXES[2].index(AXIS))
            accuracy = sum(row.result["accuracy"] for row in group) / len(group)
            panels[f"{way}: accuracy {accuracy:.2f}"] = plots.Explored(learned, (learned[0][0], of_first))
        plots.explored_strides(panels, limits[AXIS][1], options.out, axis=AXIS)


if __name__ == "__main__":
    main()
