"""`diffstride export`: a trained run as an ONNX file, what was learned, and how fast it runs."""

from __future__ import annotations

import argparse
import inspect
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from diffstride._check import UserError
from diffstride.export import OnnxFile, freeze, onnx_session, require_onnx, to_onnx
from diffstride.nn import learnable_layers
from diffstride.studies.bench import WARMUP, Contestant, alternate
from diffstride.studies.parser import CommandParser, by, check_new_file
from diffstride.tracking import InputSizes
from diffstride.training.callbacks import provenance
from diffstride.training.fit import quiet
from diffstride.training.saved import Run, build_classifier, build_data, load_run, one_line

DESCRIPTION = """Write a trained network as an ONNX file, with its learned strides fixed, ready for onnxruntime.

  diffstride export runs/NAME model.onnx
  diffstride export runs/NAME/checkpoints/last.ckpt model.onnx --batch 8

The file takes any batch size, and maps of the size that the network was trained on. Before it is put in its place it is
run on random inputs and compared with the network. Then times are measured: of the network as trained, with its strides
fixed, and in onnxruntime; and of the same network with strided convolutions (random weights), where there is one."""


class Contender(NamedTuple):
    """Something whose latency is measured."""

    model: str
    runtime: str
    step: Callable[[], object]


def export(arguments: Sequence[str]) -> None:
    """Load the run, write the file, print what was learned, measure."""
    options = _options(arguments)
    require_onnx()
    console = Console(width=max(100, Console().width))
    with console.status("loading the run"), quiet():
        run = load_run(options.run)
        shape = options.input or _sample_shape(run.config)
        example = torch.randn(options.batch, *shape)
        learned = _learned(run.network, example)
    if learned.row_count:
        console.print(learned)
    else:
        console.print("The network has no learned strides: it is exported as it is.")
    with console.status(f"writing {options.target}"):
        written = to_onnx(run.network, example, options.target)
    console.print(
        f"{written.path}: {written.bytes / 1e6:.3g} MB, for batches of {by(shape)}; on random inputs onnxruntime "
        f"differs from the network by {written.error:.0e}, relative",
        soft_wrap=True,
        highlight=False,
    )
    if options.repeats:
        _compare(run, written, example, options.repeats, console)


# The run


def _sample_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """That of the run's data."""
    try:
        return build_data(config["data"]).sample_shape
    except Exception as error:  # of libraries that read files, images or the hub
        raise UserError(
            "the run's data, which would tell the shape of a sample, cannot be loaded: give the shape, as in "
            f"--input 3,32,32 ({one_line(error)})"
        ) from error


@torch.no_grad()
def _learned(network: nn.Module, example: Tensor) -> Table:
    """The layers' strides at the start and at the end, and the sizes of their maps."""
    sizes = InputSizes(network)
    try:
        network(example)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the network cannot take inputs of {by(example.shape[1:])} (--input says another shape): {one_line(error)}"
        ) from error
    finally:
        sizes.close()
    table = Table(title="Learned strides")
    for heading in ("layer", "start", "end", "map"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for name, layer in learnable_layers(network):
        size = sizes.sizes.get(name)
        maps = "not reached" if size is None else f"{by(size)} → {by(layer.output_size(size))}"
        table.add_row(name, _list(layer.initial_strides), _list(layer.strides), maps)
    return table


# Latency


def _compare(run: Run, written: OnnxFile, example: Tensor, repeats: int, console: Console) -> None:
    """Measure, and print the table."""
    contenders = [
        Contender("as trained", "PyTorch", _eager(run.network, example)),
        Contender("strides fixed", "PyTorch", _eager(freeze(run.network, example), example)),
        Contender("strides fixed", "onnxruntime", _onnxruntime(written.path, example)),
    ]
    with console.status("building the strided model"), tempfile.TemporaryDirectory() as folder, quiet():
        strided = _strided(run)
        if isinstance(strided, nn.Module):
            path = to_onnx(strided, example, Path(folder) / "strided.onnx").path
            contenders += [
                Contender("strided convolutions", "PyTorch", _eager(strided, example)),
                Contender("strided convolutions", "onnxruntime", _onnxruntime(path, example)),
            ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, torch.inference_mode():
        task = progress.add_task("measuring", total=WARMUP + repeats)
        seconds = alternate(
            {str(i): Contestant(contender.step) for i, contender in enumerate(contenders)},
            repeats,
            random.Random(0),
            after_round=lambda: progress.advance(task),
        )
    table = Table(title=f"Latency of a batch of {by(example.shape)}: median and quartiles")
    for heading in ("model", "runtime", "ms", "over as trained"):
        table.add_column(heading, justify="right" if heading in ("ms", "over as trained") else "left")
    reference = statistics.median(seconds["0"])
    for i, contender in enumerate(contenders):
        low, middle, high = (1e3 * q for q in statistics.quantiles(seconds[str(i)], n=4, method="inclusive"))
        table.add_row(
            contender.model,
            contender.runtime,
            f"{middle:.3g} ({low:.3g}–{high:.3g})",
            f"{middle / 1e3 / reference:.2f}",
        )
    console.print(table)
    if isinstance(strided, str):
        console.print(f"No strided model beside it: {strided}.", soft_wrap=True, highlight=False)
    facts = provenance(example.device)
    console.print(
        f"{repeats} repeats in turns, on {facts['hardware']}; torch {version('torch')}, "
        f"onnxruntime {version('onnxruntime')}.",
        soft_wrap=True,
        highlight=False,
    )


def _eager(model: nn.Module, example: Tensor) -> Callable[[], object]:
    return lambda: model(example)


def _onnxruntime(path: Path, example: Tensor) -> Callable[[], object]:
    session = onnx_session(path)
    inputs = {session.get_inputs()[0].name: example.numpy()}
    return lambda: session.run(None, inputs)


def _strided(run: Run) -> nn.Module | str:
    """The run's network with strided convolutions of the initial strides, or why there is none."""
    kind = type(run.network)
    if "downsample" not in inspect.signature(kind).parameters:
        return f"{kind.__name__} has no argument `downsample`"
    network = run.config["model"]["network"]
    options = network.get("init_args", {})
    if options.get("downsample") == "conv":
        return "the network has strided convolutions itself"
    strided = network | {"init_args": options | {"downsample": "conv"}}
    model = run.config["model"] | {"network": strided, "budget": None}  # which needs learnable strides
    try:
        return build_classifier(model).network.eval()
    except (ValueError, ArgumentError) as error:  # fractional strides, for example
        return one_line(error)


# The command


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="diffstride export", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of `diffstride fit`, or a checkpoint")
    parser.add_argument("target", type=Path, metavar="FILE.onnx", help="file to write")
    parser.add_argument(
        "--input",
        type=_shape,
        metavar="C,H,W",
        help="shape of one sample (default: that of the run's data, which is loaded for that)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="samples at a time when timed (default: 1)")
    parser.add_argument(
        "--repeats", type=int, default=50, metavar="N", help="times that each is timed; 0: none (default: 50)"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        raise UserError(f"--batch must be at least 1, got {options.batch}")
    if options.repeats < 0 or options.repeats == 1:
        raise UserError(f"--repeats must be at least 2, for quartiles, or 0, got {options.repeats}")
    check_new_file(options.target, options.force)
    return options


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas, as in 3,32,32, got {text!r}")
    return shape


def _list(strides: Sequence[float]) -> str:
    return ", ".join(f"{stride:.4g}" for stride in strides)
