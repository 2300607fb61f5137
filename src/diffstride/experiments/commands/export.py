"""`diffstride export`: write a trained run as an ONNX or a safetensors file, and measure its latency."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from rich.table import Table
from torch import Tensor, nn

from diffstride._text import one_line
from diffstride.errors import UsageError
from diffstride.experiments.benchmark.measure import WARMUP, Candidate, alternate
from diffstride.experiments.console import PlainConsole, make_table
from diffstride.experiments.data import MultiTask
from diffstride.experiments.parser import CommandParser, at_least, by, check_file
from diffstride.experiments.provenance import provenance
from diffstride.experiments.training.fit import quiet
from diffstride.experiments.training.runs import TrainedNetwork, build_classifier, load, read_result
from diffstride.export import OnnxFile, freeze, onnx_session, to_onnx, to_safetensors
from diffstride.integrations.input_sizes import InputSizes
from diffstride.nn import learnable_layers, strides

DESCRIPTION = """Write a trained network as one file, in the format that its suffix names.

  diffstride export runs/NAME model.onnx
  diffstride export runs/NAME/checkpoints/last.ckpt model.onnx --batch 8
  diffstride export runs/NAME model.safetensors

.onnx: the network with its learned strides fixed, for onnxruntime. The file accepts any batch size, and samples of the
size that the network was trained on. The command compares the file with the network on random inputs before it keeps
the file. It then measures the latency of the network as trained, with fixed strides, and in onnxruntime, and that of
the same network with strided convolutions (with random weights) if there is one.

.safetensors: the weights and strides, to use in PyTorch. Nothing in such a file is executed. Build the network that the
metadata describe, then

  from safetensors.torch import load_file
  network.load_state_dict(load_file("model.safetensors"))

Both formats have metadata, each a JSON text: network (class and arguments), strides, sample_shape, classes, mean and
std (if inputs are normalised), accuracy and versions. With several tasks, `tasks` has classes, mean and std of each."""


def export(arguments: Sequence[str]) -> None:
    """Load the run, print its learned strides, write the file, measure."""
    options = _options(arguments)
    console = PlainConsole(width=100)
    with console.status("loading the run"), quiet():
        run = load(options.run)
        known = _known(run, options.input)
        example = torch.randn(options.batch, *known["sample_shape"])
        learned = _learned(run.network, example)
        metadata = _metadata(run, known)
    if learned.row_count:
        console.print(learned)
    else:
        console.print("The network has no learned strides: it is exported as it is.")
    if options.target.suffix == ".safetensors":
        path = to_safetensors(run.network, options.target, metadata)
        console.say(f"{path}: {path.stat().st_size / 1e6:.3g} MB, weights and strides as trained")
        return
    with console.status(f"writing {options.target}"):
        written = to_onnx(run.network, example, options.target, metadata)
    console.say(
        f"{written.path}: {written.bytes / 1e6:.3g} MB, for batches of {by(example.shape[1:])}; on random inputs "
        f"onnxruntime differs from the network by {written.error:.0e}, relative"
    )
    if options.repeats:
        _compare(run, written, example, options.repeats, console)


def _known(run: TrainedNetwork, shape: tuple[int, ...] | None) -> dict[str, Any]:
    """Return the description of the data in the checkpoint, with the shape of a sample from --input if given."""
    try:
        data = run.data
    except UsageError as error:
        if shape is None:
            raise UsageError(
                f"the run has no shape of a sample: give it, as in --input 3,32,32 ({one_line(error)})"
            ) from error
        return {"sample_shape": shape}
    known = data.state_dict()
    if isinstance(data, MultiTask):
        known = {"tasks": known, "sample_shape": next(iter(known.values()))["sample_shape"]}
    return known if shape is None else known | {"sample_shape": shape}


def _metadata(run: TrainedNetwork, known: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of a file as JSON texts."""
    facts: dict[str, Any] = {
        "network": run.config["model"]["network"],
        "strides": strides(run.network),
        **known,
        "versions": provenance(torch.device("cpu"))["versions"],
    }
    result = read_result(run.folder)
    if result is not None and result["steps"] == run.saved["global_step"]:  # of this checkpoint
        facts["accuracy"] = result["accuracy"]
    return {name: json.dumps(fact, default=Tensor.tolist) for name, fact in facts.items()}


@torch.no_grad()
def _learned(network: nn.Module, example: Tensor) -> Table:
    """Return a table of the layers' initial and learned strides, and the sizes of their maps."""
    sizes = InputSizes(network)
    try:
        network(example)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the network cannot take inputs of {by(example.shape[1:])} (see --input): {one_line(error)}"
        ) from error
    finally:
        sizes.close()
    table = make_table("Learned strides", "layer", "start", "end", "map")
    for name, layer in learnable_layers(network):
        size = sizes.sizes.get(name)
        maps = "not reached" if size is None else f"{by(size)} → {by(layer.output_size(size))}"
        table.add_row(name, _list(layer.initial_strides), _list(layer.strides), maps)
    return table


def _compare(run: TrainedNetwork, written: OnnxFile, example: Tensor, repeats: int, console: PlainConsole) -> None:
    """Measure the latencies and print them as a table."""
    steps: dict[str, Callable[[], object]] = {
        "as trained, PyTorch": partial(run.network, example),
        "strides fixed, PyTorch": partial(freeze(run.network, example), example),
        "strides fixed, onnxruntime": _onnxruntime(written.path, example),
    }
    with console.status("building the strided model"), tempfile.TemporaryDirectory() as folder, quiet():
        strided = _strided(run)
        if isinstance(strided, nn.Module):
            path = to_onnx(strided, example, Path(folder) / "strided.onnx").path
            steps["strided convolutions, PyTorch"] = partial(strided, example)
            steps["strided convolutions, onnxruntime"] = _onnxruntime(path, example)
    with console.progress(transient=True) as progress, torch.inference_mode():
        task = progress.add_task("measuring", total=WARMUP + repeats)
        candidates = {name: Candidate(step) for name, step in steps.items()}
        seconds = alternate(candidates, repeats, random.Random(0), after_round=lambda: progress.advance(task))
    table = make_table(
        f"Latency of a batch of {by(example.shape)}: median and quartiles", "model", "ms", "over as trained"
    )
    reference = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        times_ms = f"{1e3 * middle:.3g} ({1e3 * low:.3g}–{1e3 * high:.3g})"
        table.add_row(name, times_ms, f"{middle / reference:.2f}")
    console.print(table)
    if isinstance(strided, str):
        console.say(f"No strided model beside it: {strided}.")
    console.say(
        f"{repeats} repeats in turns, on {provenance(example.device)['hardware']}; torch {version('torch')}, "
        f"onnxruntime {version('onnxruntime')}."
    )


def _onnxruntime(path: Path, example: Tensor) -> Callable[[], object]:
    session = onnx_session(path)
    return partial(session.run, None, {session.get_inputs()[0].name: example.numpy()})


def _strided(run: TrainedNetwork) -> nn.Module | str:
    """Return the run's network with strided convolutions of the initial strides, or the reason that there is none."""
    network = run.config["model"]["network"]
    options = network.get("init_args", {})
    if options.get("downsample") == "conv":
        return "the network has strided convolutions itself"
    strided = network | {"init_args": options | {"downsample": "conv"}}
    try:  # without the other settings, some of which need learnable strides
        return build_classifier({"network": strided}).network.eval()
    except (ValueError, ArgumentError) as error:  # fractional strides, or a class without `downsample`
        return one_line(error)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="diffstride export", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a checkpoint in it")
    parser.add_argument("target", type=Path, metavar="FILE", help="file to write: FILE.onnx or FILE.safetensors")
    parser.add_argument(
        "--input", type=_shape, metavar="C,H,W", help="shape of one sample (default: that of the run's data)"
    )
    parser.add_argument(
        "--batch", type=at_least(1), default=1, metavar="N", help=".onnx: samples per batch when timed (default: 1)"
    )
    parser.add_argument(
        "--repeats", type=at_least(2, or_zero=True), default=50, metavar="N",
        help=".onnx: number of timings of each model, or 0 (default: 50)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    options = parser.parse_args(arguments)
    check_file(options.target, force=options.force)
    if options.target.suffix not in (".onnx", ".safetensors"):
        raise UsageError(f"{options.target} must end in .onnx or .safetensors, which names the format")
    return options


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(at_least(1), text.split(",")))


def _list(strides: Sequence[float]) -> str:
    return ", ".join(f"{stride:.4g}" for stride in strides)
