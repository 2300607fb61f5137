"""`diffstride bench`: speed and memory against the alternatives, side by side in one run.

How it is measured: all contestants of a case take turns, in a new random order every round, after rounds of warm-up. A
ratio is that of the medians; its spread are the quartiles of the ratios within each round. Strides move a little before
every step, as they do in training, so that nothing that depends on them is found ready-made.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kornia.filters import BlurPool2D
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffstride as ds
from diffstride._files import atomic_write_text
from diffstride._text import did_you_mean
from diffstride.errors import UsageError
from diffstride.experiments.benchmark.baselines import AxisByAxisFFT, DataMovement, JointFFT, NaiveFFT
from diffstride.experiments.console import PlainConsole
from diffstride.experiments.models import ResNet
from diffstride.experiments.parser import CommandParser, check_file
from diffstride.experiments.provenance import provenance

DESCRIPTION = """Measure time and peak memory of forward and backward passes against the alternatives.

  diffstride bench --out results.json           every suite; many minutes on a CPU
  diffstride bench layers --dtypes float32      one suite, one type of numbers
  diffstride bench --quick                      tiny shapes, only to see that it runs
  diffstride bench --calibrate                  up to which length dense products beat FFTs on this machine

suites:
  layers         downsampling layers alone, over average pooling
  convolutions   convolution and DiffStride as one operator, over one after the other
  steps          whole training steps of a ResNet-18, over one with strided convolutions

Times mean little on a shared machine: read the ratios, and how far their quartiles lie apart."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WARMUP = 3
# How far strides move before a step, relative: too little for another output size on axes of some thousand samples.
DRIFT = 2e-4
# With these, glibc keeps large maps instead of handing them back and having every page faulted in anew.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}

Row = dict[str, Any]


class Settings(NamedTuple):
    """What the command line asks for."""

    dtypes: Sequence[str]
    device: torch.device
    repeats: int
    seed: int
    quick: bool
    full: bool


class Candidate:
    """Something to measure.

    Args:
        step: one forward and backward.
        module: whose strides move before each step.
    """

    def __init__(self, step: Callable[[], object], module: nn.Module | None = None) -> None:
        self.step = step
        parameters = [] if module is None else list(module.named_parameters())
        strides = [p for name, p in parameters if name.rpartition(".")[-1] in ("stride", "strides")]
        self._start = [(stride, stride.tolist()) for stride in strides]
        # Sizes are rounded down with the outer window, up with the inner one. A start on the brink keeps its size if
        # strides shrink from there in the one case, and grow in the other.
        inner = module is not None and any(getattr(m, "window", None) == "inner" for m in module.modules())
        self._reach = DRIFT if inner else -DRIFT

    def drift(self, rng: random.Random) -> None:
        """Move the strides to somewhere near their start."""
        with torch.no_grad():
            for stride, start in self._start:
                stride.copy_(torch.tensor([s * (1 + self._reach * rng.random()) for s in start]))


class Case(NamedTuple):
    """What is measured together."""

    suite: str
    facts: dict[str, Any]
    contestants: Callable[[], dict[str, Candidate]]  # called when the turn of the case comes
    comparisons: Mapping[str, Sequence[str] | None]  # reference: who is compared with it; None: everyone


# Measuring


class StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensor storage that operators make, until they are freed: `alive` now, `peak` at most.

    Backward passes are seen too where they run in the same thread, as they do on a CPU. What a kernel allocates for its
    own use and frees again is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and count the storages of its results that are new."""
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._counted:
                self._counted.add(key)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                # PyTorch keeps the Python object of a storage for as long as anything, also in C++, holds the storage.
                weakref.finalize(storage, self._freed, key, size).atexit = False
        return result

    def _freed(self, key: int, size: int) -> None:
        self._counted.remove(key)
        self.alive -= size


def _storages(tree: Any) -> Iterator[Any]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors alive at the peak of a step, above what was alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    meter = StorageMeter()
    with meter:
        step()
    return meter.peak


def alternate(
    contestants: Mapping[str, Candidate],
    repeats: int,
    rng: random.Random,
    *,
    synchronise: Callable[[], object] = lambda: None,
    after_round: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds that every contestant takes in each round after the warm-up; within a round the order is random."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(WARMUP + repeats):
        rng.shuffle(order)
        for name in order:
            contestants[name].drift(rng)
            synchronise()
            start = clock()
            contestants[name].step()
            synchronise()
            seconds[name].append(clock() - start)
        after_round()
    return {name: values[WARMUP:] for name, values in seconds.items()}


def compare(
    seconds: Mapping[str, Sequence[float]], peaks: Mapping[str, int], reference: str, names: Iterable[str]
) -> list[Row]:
    """A row for the reference, then one for each of the others: times, and their ratios to the reference's."""
    rows = []
    for name in [reference, *(name for name in names if name != reference)]:
        median = statistics.median(seconds[name])
        ratios = [own / other for own, other in zip(seconds[name], seconds[reference], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(
            {
                "name": name,
                "ms": 1e3 * median,
                "ratio": median / statistics.median(seconds[reference]),
                "ratio_low": low,
                "ratio_high": high,
                "reference": reference,
                "peak_mb": peaks[name] / 2**20,
                "peak_ratio": peaks[name] / peaks[reference],
            }
        )
    return rows


def measure(case: Case, settings: Settings, after_round: Callable[[], object]) -> tuple[list[Row], list[Row]]:
    """The rows of a case, and what does not run in its dtype."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    contestants, missing = {}, []
    for name, contestant in case.contestants().items():
        try:
            contestant.step()
        except RuntimeError as error:
            if "not implemented for" not in str(error):
                raise
            missing.append({"suite": case.suite, "case": case.facts, "name": name, "error": str(error).splitlines()[0]})
        else:
            contestants[name] = contestant
    synchronise = torch.cuda.synchronize if settings.device.type == "cuda" else lambda: None
    seconds = alternate(contestants, settings.repeats, rng, synchronise=synchronise, after_round=after_round)
    peaks = {}
    for name, contestant in contestants.items():
        contestant.drift(rng)
        peaks[name] = peak_bytes(contestant.step, settings.device)
    rows = [
        {"suite": case.suite, "case": case.facts, **row}
        for reference, names in case.comparisons.items()
        for row in compare(seconds, peaks, reference, contestants if names is None else names)
    ]
    return rows, missing


def layer_step(layer: Callable[[Tensor], Tensor], x: Tensor) -> Candidate:
    """Forward and backward with the gradients of the input and of all parameters, from a random gradient above."""
    module = layer if isinstance(layer, nn.Module) else None
    inputs = [x, *(module.parameters() if module else ())]
    above: list[Tensor] = []

    def step() -> object:
        y = layer(x)
        if not above:  # in the first step of all: like the result in size and memory format
            above.append(torch.randn_like(y))
        return torch.autograd.grad(y, inputs, above)

    return Candidate(step, module)


# Suites


def layers(settings: Settings) -> Iterator[Case]:
    """Layers alone, stride 2."""
    shapes = [(2, 4, 12, 12)] if settings.quick else [(64, 64, 32, 32), (16, 64, 56, 56), (16, 64, 112, 112)]
    for dtype in settings.dtypes:
        for shape, memory_format in [*((shape, "contiguous") for shape in shapes), (shapes[0], "channels_last")]:
            facts = {"shape": list(shape), "stride": 2, "dtype": dtype, "memory_format": memory_format}
            yield Case("layers", facts, partial(_layers, facts, settings.device), {"avg_pool2d": None})


def _layers(facts: Mapping[str, Any], device: torch.device) -> dict[str, Candidate]:
    x = _input(facts, device)
    channels, size = x.shape[1], [n // 2 for n in x.shape[2:]]
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "data movement": DataMovement(),
        "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
        "blur pooling": BlurPool2D(3, 2),
        "antialiased bilinear": lambda x: F.interpolate(x, size, mode="bilinear", antialias=True),
        "strided convolution": nn.Conv2d(channels, channels, 3, stride=2, padding=1, dtype=x.dtype),
        "FFT, naive port, R=4": NaiveFFT(smoothness=4),
        "FFT, axis by axis, R=1": AxisByAxisFFT(smoothness=1),
        "FFT, axis by axis, R=4": AxisByAxisFFT(smoothness=4),
        "FFT, joint, R=1": JointFFT(smoothness=1),
        "FFT, joint, R=4": JointFFT(smoothness=4),
        "DiffStride, R=1": ds.DiffStride2d(2, 1),
        "DiffStride, R=4": ds.DiffStride2d(2, 4),
        "DiffStride, inner window": ds.DiffStride2d(2, window="inner"),
        "DiffStride, DCT, R=4": ds.DiffStride2d(2, 4, basis="dct"),
        "DiffStride, by FFT, R=4": ds.DiffStride2d(2, 4, backend="fft"),
        "SpectralPool": ds.SpectralPool2d(2),
    }
    for function in functions.values():
        if isinstance(function, nn.Module):
            _move(function, facts["memory_format"], device)
    return {name: layer_step(function, x) for name, function in functions.items()}


def convolutions(settings: Settings) -> Iterator[Case]:
    """A convolution and its downsampling."""
    shapes = [((2, 4, 12, 12), 8)] if settings.quick else [((32, 64, 32, 32), 128), ((32, 128, 16, 16), 256)]
    for dtype in settings.dtypes:
        for shape, channels in shapes:
            for stride, smoothness, window in [(2, 1, "outer"), (2, 4, "outer"), (3, 1, "outer"), (2, 4, "inner")]:
                facts = {
                    "shape": list(shape),
                    "channels": [shape[1], channels],
                    "stride": stride,
                    "smoothness": smoothness,
                    "window": window,
                    "dtype": dtype,
                    "memory_format": "channels_last",
                }
                make = partial(_convolutions, facts, settings.device)
                yield Case("convolutions", facts, make, {"convolution, then layer": None})


def _convolutions(facts: Mapping[str, Any], device: torch.device) -> dict[str, Candidate]:
    x = _input(facts, device)
    (cin, cout), stride = facts["channels"], facts["stride"]
    options: dict[str, Any] = {"smoothness": facts["smoothness"], "window": facts["window"]}
    modules: dict[str, nn.Module] = {
        "convolution, then layer": nn.Sequential(
            nn.Conv2d(cin, cout, 3, padding=1), ds.DiffStride2d(stride, **options)
        ),
        "one operator": ds.DiffStrideConv2d(cin, cout, 3, stride, padding=1, **options),
        "strided convolution": nn.Conv2d(cin, cout, 3, stride, padding=1),
    }
    for module in modules.values():
        _move(module, facts["memory_format"], device, x.dtype)
    return {name: layer_step(module, x) for name, module in modules.items()}


# Name: the network's downsampling and its options.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "strided convolution": ("conv", {}),
    "average pooling": ("avg", {}),
    "blur pooling": ("blur", {}),
    "spectral pooling": ("spectral", {}),
    "DiffStride, inner window": ("diffstride", {"smoothness": 4, "window": "inner"}),
    "DiffStride, R=1": ("diffstride", {"smoothness": 1}),
    "DiffStride, R=4": ("diffstride", {"smoothness": 4}),
}
# The same network with average pooling to maps of the same sizes, so that the ratio is that of the layers alone.
CONTROLS = {
    "average pooling to sizes of inner window": "DiffStride, inner window",
    "average pooling to sizes of R=4": "DiffStride, R=4",
}


def steps(settings: Settings) -> Iterator[Case]:
    """Training steps of a ResNet-18 on images of CIFAR's size."""
    shape = (4, 3, 16, 16) if settings.quick else (128, 3, 32, 32)
    # Not narrower: of 4 channels, torch 2.13's strided 1x1 convolutions in channels_last crash on CPUs without AVX-512.
    widths = [1 / 8 if settings.quick else 1 / 4, *([1.0] if settings.full else [])]
    comparisons = {"strided convolution": None, **{control: [name] for control, name in CONTROLS.items()}}
    for dtype in settings.dtypes:
        for width in widths:
            facts = {"width": width, "shape": list(shape), "dtype": dtype, "memory_format": "channels_last"}
            yield Case("steps", facts, partial(_steps, facts, settings.device), comparisons)


def _steps(facts: Mapping[str, Any], device: torch.device) -> dict[str, Candidate]:
    # Half precision is autocast's: images and weights stay float32.
    images = _input({**facts, "dtype": "float32"}, device).detach()

    def network(downsample: Any, options: dict[str, Any]) -> ResNet:
        made = ResNet(width=facts["width"], downsample=downsample, strides=(2, 2, 2), downsample_options=options)
        _move(made, facts["memory_format"], device)
        return made

    networks = {name: network(*arguments) for name, arguments in NETWORKS.items()}
    for control, name in CONTROLS.items():
        networks[control] = network(partial(_pooling_to_the_next, iter(stage_sizes(networks[name], images))), {})
    return {name: training_step(made, images, DTYPES[facts["dtype"]]) for name, made in networks.items()}


def stage_sizes(network: ResNet, images: Tensor) -> list[tuple[int, ...]]:
    """Height and width of the maps of the stages that downsample: all but the first."""
    sizes: list[tuple[int, ...]] = []
    handles = [
        stage.register_forward_hook(lambda _module, _inputs, y: sizes.append(tuple(y.shape[-2:])))
        for stage in list(network.stages)[1:]
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return sizes


def _pooling_to_the_next(sizes: Iterator[tuple[int, ...]], _stride: object) -> nn.Module:
    return nn.AdaptiveAvgPool2d(next(sizes))


def training_step(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Candidate:
    """Forward, cross-entropy, backward and a step of SGD; half precision by autocast."""
    labels = torch.randint(10, (len(images),), device=images.device)
    optimizer = torch.optim.SGD(ds.param_groups(network, lr=1e-3, weight_decay=5e-4), momentum=0.9)

    def step() -> None:
        with nullcontext() if dtype == torch.float32 else torch.autocast(images.device.type, dtype):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return Candidate(step, network)


def calibration(settings: Settings) -> Iterator[Case]:
    """Axes of growing length, as dense products and as FFTs: signals (R = N/16) and images (R = 4), ours and equal."""
    lengths = (16, 32) if settings.quick else (64, 128, 192, 256, 384, 512, 768, 1024)
    elements = 1 << (12 if settings.quick else 21)
    for dtype in settings.dtypes:
        for n in lengths:
            for shape in ([elements // (16 * n), 16, n], [max(1, elements // (16 * n * n)), 16, n, n]):
                facts = {"shape": shape, "dtype": dtype, "memory_format": "contiguous"}
                yield Case("calibrate", facts, partial(_backends, facts, settings.device), {"fft": None})


def _backends(facts: Mapping[str, Any], device: torch.device) -> dict[str, Candidate]:
    x = _input(facts, device)
    signal = x.ndim == 3
    make = ds.DiffStride1d if signal else ds.DiffStride2d
    smoothness = x.shape[-1] / 16 if signal else 4.0
    return {name: layer_step(make(2, smoothness, backend=name, device=device), x) for name in ("fft", "matmul")}


def crossovers(rows: Iterable[Row]) -> dict[str, int]:
    """For each dtype the largest length up to which the median ratio of dense products to FFTs is at most 1, or 0."""
    ratios: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["name"] == "matmul":
            by_length = ratios.setdefault(row["case"]["dtype"], {})
            by_length.setdefault(row["case"]["shape"][-1], []).append(row["ratio"])
    return {
        dtype: max((length for length, values in by_length.items() if statistics.median(values) <= 1), default=0)
        for dtype, by_length in ratios.items()
    }


def _input(facts: Mapping[str, Any], device: torch.device) -> Tensor:
    x = torch.randn(facts["shape"], device=device, dtype=DTYPES[facts["dtype"]])
    return x.contiguous(memory_format=MEMORY_FORMATS[facts["memory_format"]]).requires_grad_()


def _move(module: nn.Module, memory_format: str, *where: torch.device | torch.dtype) -> None:
    module.to(*where, memory_format=MEMORY_FORMATS[memory_format])  # type: ignore[call-overload]


SUITES = {"layers": layers, "convolutions": convolutions, "steps": steps}


# Tables


class Sheet(NamedTuple):
    """A table for the terminal or for a page: one section of rows for each dtype."""

    title: str
    header: list[str]
    sections: dict[str, list[list[str]]]


def sheets(rows: Iterable[Row], suite: str) -> list[Sheet]:
    """A suite's ratios of time with their quartiles, and its ratios of peak memory; of the reference the values."""
    rows = [row for row in rows if row["suite"] == suite]
    main = rows[0]["reference"]
    # Any other reference has its row where it is compared with the first.
    rows = [row for row in rows if row["reference"] == main or row["name"] != row["reference"]]
    names, cases = list(dict.fromkeys(_name(row, main) for row in rows)), list(dict.fromkeys(map(_case, rows)))
    found = []
    for quantity, cell in (("time", _time), ("peak memory", _memory)):
        header, sections = [""], {}
        for dtype in dict.fromkeys(row["case"]["dtype"] for row in rows):
            cells = {(_name(row, main), _case(row)): cell(row) for row in rows if row["case"]["dtype"] == dtype}
            grid = [["", *cases], *([name, *(cells.get((name, case), "-") for case in cases)] for name in names)]
            if len(cases) > len(names):  # the longer list goes down the page
                grid = [list(column) for column in zip(*grid, strict=True)]
            header, *sections[dtype] = grid
        found.append(Sheet(f"{suite}: {quantity}, over that of {main}", header, sections))
    return found


def _name(row: Row, main: str) -> str:
    return str(row["name"]) if row["reference"] == main else f"{row['name']}, over {row['reference']}"


def _case(row: Row) -> str:
    case, shape = row["case"], row["case"]["shape"]
    text = "×".join(map(str, shape))
    if row["suite"] == "layers":
        return text if case["memory_format"] == "contiguous" else f"{text}, {case['memory_format']}"
    if row["suite"] == "convolutions":
        cin, cout = case["channels"]
        window = "inner window" if case["window"] == "inner" else f"R={case['smoothness']}"
        return f"{cin}→{cout} at {shape[2]}×{shape[3]}, S={case['stride']}, {window}"
    if row["suite"] == "steps":
        return f"width {case['width']:g}, {text}"
    return f"signals of {shape[-1]}" if len(shape) == 3 else f"images of {shape[-2]}×{shape[-1]}"


def _time(row: Row) -> str:
    if row["name"] == row["reference"]:
        return f"{row['ms']:.3g} ms"
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})"


def _memory(row: Row) -> str:
    return f"{row['peak_mb']:.3g} MB" if row["name"] == row["reference"] else f"{row['peak_ratio']:.2f}"


def _print(console: PlainConsole, sheet: Sheet) -> None:
    table = Table(title=sheet.title)
    for i, heading in enumerate(sheet.header):
        table.add_column(heading, justify="right" if i else "left")
    for dtype, rows in sheet.sections.items():
        table.add_section()
        table.add_row(Text(dtype, style="bold"))
        for row in rows:
            table.add_row(*row)
    console.print(table)


# The command


def bench(arguments: Sequence[str]) -> None:
    """Measure, print the tables, write the JSON."""
    options = _options(arguments)
    quick = options.quick
    settings = Settings(
        dtypes=tuple(dict.fromkeys(options.dtypes)),
        device=torch.device(options.device),
        repeats=options.repeats or (2 if quick else 20),
        seed=options.seed,
        quick=quick,
        full=options.full,
    )
    suites = [name for name in SUITES if not options.suites or name in options.suites]
    cases = list(calibration(settings)) if options.calibrate else [c for name in suites for c in SUITES[name](settings)]

    # Tables have their own width where the output is no terminal.
    console = PlainConsole(width=120)
    malloc = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    if settings.device.type == "cpu" and not ALLOCATOR.keys() <= malloc.keys():
        advice = " ".join(f"{name}={value}" for name, value in ALLOCATOR.items())
        console.say(
            "Large maps on a CPU lose up to half their time to page faults; the allocator's settings are recorded. "
            f"Better: {advice} diffstride bench"
        )
    rows: list[Row] = []
    missing: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases) * (WARMUP + settings.repeats))
        for case in cases:
            progress.update(
                task, description=f"{_case({'suite': case.suite, 'case': case.facts})}, {case.facts['dtype']}"
            )
            found, absent = measure(case, settings, lambda: progress.advance(task))
            rows += found
            missing += absent
    for suite in dict.fromkeys(row["suite"] for row in rows):
        for sheet in sheets(rows, suite):
            _print(console, sheet)
    report = {
        **provenance(settings.device),
        "device": str(settings.device),
        "threads": torch.get_num_threads(),
        "allocator": malloc or "default",
        "repeats": settings.repeats,
        "seed": settings.seed,
        "command": shlex.join(["diffstride", "bench", *arguments]),
        "rows": rows,
        "missing": missing,
    }
    if options.calibrate:
        report["crossover"] = crossovers(rows)
        literal = ", ".join(f"torch.{dtype}: {length}" for dtype, length in report["crossover"].items())
        console.say(f"For diffstride.backends.resample: DENSE_UP_TO = {{{literal}}}")
    if options.out:
        atomic_write_text(options.out, json.dumps(report, indent=1) + "\n")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="diffstride bench", description=DESCRIPTION)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="layers, convolutions, steps (default: all)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["float32", "bfloat16"],
        metavar="DTYPE",
        help="float32, bfloat16, float16 (default: the first two)",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds that count (default: 20)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 2 rounds: says nothing about speed")
    parser.add_argument("--full", action="store_true", help="steps: the full width too, slow on a CPU")
    parser.add_argument("--calibrate", action="store_true", help="in place of the suites: dense products against FFTs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the order (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="file for all results")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.suites if name not in SUITES]:
        raise UsageError(
            f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}{did_you_mean(unknown[0], SUITES.keys())}"
        )
    if options.calibrate and (options.suites or options.full):
        raise UsageError("--calibrate takes the place of the suites: leave out their names and --full")
    if options.repeats is not None and options.repeats < 2:
        raise UsageError(f"--repeats must be at least 2, for a spread, got {options.repeats}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no GPU here")
    if options.out:
        check_file(options.out)
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"--seed must be between 0 and {2**63 - 1}, got {options.seed}")
    return options
