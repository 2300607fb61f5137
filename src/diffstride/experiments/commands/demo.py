"""`diffstride demo`: compare three ways to downsample on planted bands, from a good and a poor initial stride."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from diffstride import functional
from diffstride._files import atomic_write_text
from diffstride.errors import InterruptedRunError, UsageError
from diffstride.experiments.console import PlainConsole, make_table
from diffstride.experiments.data import PlantedBands
from diffstride.experiments.data.base import Batch
from diffstride.experiments.figures.layer import before_and_after
from diffstride.experiments.figures.style import save
from diffstride.experiments.figures.training import (
    Line,
    WindowPanel,
    lines_of,
    strides_over_bands,
    windows_over_spectrum,
)
from diffstride.experiments.history import read_rows
from diffstride.experiments.models.downsample import METHODS
from diffstride.experiments.parser import CommandParser
from diffstride.experiments.studies.probes import input_windows
from diffstride.experiments.training.documents import read_json
from diffstride.experiments.training.fit import has_several_processes, parse, train
from diffstride.experiments.training.schema import total_macs

CONFIG = str(Path(__file__).with_name("demo.yaml"))
COMPARED = ("conv", "spectral", "diffstride")
# (4, 2) are the largest strides that keep the whole default bands, N / (2 b); (3, 3) suits neither axis.
STARTS = {"good": (4, 2), "poor": (3, 3)}
AXES = ("height", "width")
Limits = dict[str, tuple[float, float]]


class Run(NamedTuple):
    """A finished run of the demo. `layer` is the one that downsamples."""

    method: str
    start: tuple[int, int]
    folder: Path
    layer: Any
    result: dict[str, Any]


def demo(arguments: Sequence[str]) -> None:
    """Train the networks, print a table and draw the figures."""
    parser = CommandParser(
        prog="diffstride demo",
        description="Compare strided convolution, spectral pooling and DiffStride on generated images.\n"
        "Each trains one small network from a good and one from a poor initial stride. The command prints a table\n"
        "and draws figures. It takes about half a minute on two cores.",
    )
    parser.add_argument("config", nargs="?", default=CONFIG, help="YAML file of one run (default: that of the package)")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    options = parser.parse_args(arguments)
    config = parse(["--config", options.config])
    if [config[key].class_path.rsplit(".", 1)[-1] for key in ("data", "model.network")] != ["PlantedBands", "TinyCNN"]:
        raise UsageError("the demo needs PlantedBands and TinyCNN: leave the file out, or use `diffstride fit`")
    if has_several_processes(config.trainer):
        raise UsageError(f"{options.config}: the demo trains on one device: set trainer.devices to 1")
    folder = Path(options.runs).expanduser() / datetime.now().strftime("demo-%Y%m%d-%H%M%S")

    console = PlainConsole()
    runs = []
    with console.progress() as progress:
        task = progress.add_task("", total=len(COMPARED) * len(STARTS))
        for start_name, start in STARTS.items():
            for method in COMPARED:
                progress.update(task, description=f"{METHODS[method]} from {start}")
                given = [
                    "--config", options.config, "--runs", str(folder), "--name", f"{start_name}-{method}",
                    "--model.network.downsample", method, "--model.network.strides", str([list(start)]),
                    "--trainer.enable_progress_bar", "false",
                ]  # fmt: skip
                try:
                    cli = train(given)
                except InterruptedRunError as error:
                    raise InterruptedRunError("interrupted: start the demo again, its runs are short") from error
                result = read_json(cli.run_folder / "result.json")
                runs.append(Run(method, start, cli.run_folder, cli.model.network.down, result))
                progress.advance(task)
    rows = [{"method": run.method, "start": run.start, **run.result} for run in runs]
    atomic_write_text(folder / "results.json", json.dumps(rows, indent=1) + "\n")
    data: Any = cli.datamodule
    limits = data.stride_limits(runs[-1].layer.smoothness)
    _print(runs, data, limits, console)
    _draw(runs, data, limits, folder)
    console.say(f"Results, figures and runs are in {folder}/ (see strides.png, windows.png, example.png).")


def _print(runs: Sequence[Run], data: PlantedBands, limits: Limits, console: PlainConsole) -> None:
    title = "Planted bands: the right stride is known"
    table = make_table(title, "method", "start", "end", "accuracy", "MACs/image", "time")
    for run in runs:
        (end,) = run.result["strides"].values() or [run.start]
        table.add_row(
            METHODS[run.method],
            f"({run.start[0]}, {run.start[1]})",
            "({:.2f}, {:.2f})".format(*end) if run.method == "diffstride" else "fixed",
            f"{run.result['accuracy']:.3f}",
            f"{total_macs(run.result) / 1e6:.2f} M",
            f"{run.result['train_seconds']:.0f} s",
            end_section=run.method == COMPARED[-1],
        )
    console.print(table)
    b, (height, width) = data.band, limits.values()
    console.say(
        f"The class is at up to {b[0]} cycles along the height and {b[1]} along the width, which strides up to "
        f"({height[0]:g}, {width[0]:g}) keep whole. A learned window has a ramp: larger strides keep a part of it."
    )
    console.say("Losing one axis leaves an accuracy of 0.5, losing both 0.25.")


def _draw(runs: Sequence[Run], data: PlantedBands, limits: Limits, folder: Path) -> None:
    learned = {f"DiffStride from {run.start}": run for run in runs if run.method == "diffstride"}
    lines: dict[str, dict[str, Line]] = {f"along the {axis}": {} for axis in AXES}
    for name, run in learned.items():
        for (_, axis), line in lines_of(read_rows(run.folder / "strides.csv")).items():
            lines[f"along the {axis}"][name] = line
    save(strides_over_bands(lines, {f"along the {axis}": both for axis, both in limits.items()}), folder / "strides")
    images = cast(Batch, data.test_set)[0]
    windows = {name: input_windows(run.layer, images) for name, run in learned.items()}
    panels = [
        WindowPanel(
            title=f"along the {axis}",
            spectrum=next(iter(windows.values()))[i].spectrum,
            windows={name: found[i].windows["learned window"] for name, found in windows.items()},
            band=data.band[i],
        )
        for i, axis in enumerate(AXES)
    ]
    save(windows_over_spectrum(panels), folder / "windows")
    poor = learned[f"DiffStride from {STARTS['poor']}"]
    image = images[0]
    sh, sw = poor.start
    with torch.no_grad():
        pictures = {
            "image": image[0],
            f"one of every {sh} x {sw} pixels": image[0, ::sh, ::sw],
            f"spectral pooling {poor.start}": functional.spectral_pool(image, poor.start)[0],
            "DiffStride ({:.1f}, {:.1f})".format(*poor.layer.strides): poor.layer(image)[0],
        }
    save(before_and_after(pictures), folder / "example")
