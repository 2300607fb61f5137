"""Draw learned strides, and those that training used in their place, from the study `exploration`.

python benchmarks/draw_exploration.py runs/exploration docs/images/exploration
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from command_line import Parser, pictures, planted_bands, runs_of

from diffstride.errors import UsageError
from diffstride.experiments.figures.style import save
from diffstride.experiments.figures.training import Line, lines_of, strides_over_bands
from diffstride.experiments.history import read_rows
from diffstride.experiments.training.runs import build_classifier
from diffstride.geometry import AXIS_NAMES

# From a start that sees the band of neither axis; the band along the width is the one further away.
WAYS, BAND, START, AXIS = ("none", "Jitter 0.15", "Jitter 0.5", "Sweep"), "8x10", [[6, 6]], "width"
AXES = "exploration", "band", "strides"


def used(config: dict[str, Any], learned: Line, axis: int) -> Sequence[float]:
    """Return the strides that training used of one axis, from the learned ones and the schedule."""
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


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("out", type=pictures, help="pictures to write, without suffix")
    options = parser.parse_args()
    with parser.mistakes():
        rows, panels, limits = runs_of(options.study, *AXES), {}, {}
        for way in WAYS:
            group = [row for row in rows if [row.axes[axis] for axis in AXES] == [way, BAND, START]]
            if not group:
                raise UsageError(f"{options.study} must have runs with the exploration {way}, got none that is done")
            config, bands = planted_bands(options.study / group[0].name)
            histories = [lines_of(read_rows(options.study / row.name / "strides.csv")) for row in group]
            learned = [line for lines in histories for (_, axis), line in lines.items() if axis == AXIS]
            of_first = used(config, learned[0], AXIS_NAMES[2].index(AXIS))
            accuracy = sum(row.result["accuracy"] for row in group) / len(group)
            title = f"{way}: accuracy {accuracy:.2f}"
            panels[title] = {
                f"learned, seed {row.axes['seed']}": line for row, line in zip(group, learned, strict=True)
            }
            panels[title]["used in training, first seed"] = learned[0][0], of_first
            limits[title] = bands[AXIS]
        save(strides_over_bands(panels, limits, ylabel=f"stride along the {AXIS}"), options.out)


if __name__ == "__main__":
    main()
