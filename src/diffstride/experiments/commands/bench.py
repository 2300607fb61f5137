"""`diffstride bench`: speed and memory against the alternatives, side by side in one run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from diffstride.experiments.benchmark.measure import WARMUP, Row, measure
from diffstride.experiments.benchmark.suites import DTYPES, SUITES, Settings, calibration, crossovers
from diffstride.experiments.benchmark.tables import case_name, sheets
from diffstride.experiments.console import PlainConsole, make_table
from diffstride.experiments.parser import CommandParser, at_least, check_file
from diffstride.experiments.provenance import write_report

DESCRIPTION = """Measure time and peak memory of forward and backward passes against the alternatives.

  diffstride bench --out results.json           every suite; many minutes on a CPU
  diffstride bench layers --dtypes float32      one suite, one dtype
  diffstride bench --quick                      tiny shapes, only to see that it runs
  diffstride bench --calibrate                  up to which length dense products beat FFTs on this machine

suites:
  host           tiny maps on one thread: processor time and operations, over average pooling
  layers         downsampling layers alone, over average pooling
  convolutions   convolution and DiffStride as one operator, over one after the other
  steps          whole training steps of a ResNet-18, over one with strided convolutions

Times mean little on a shared machine: read the ratios and the distance of their quartiles."""

# With these, glibc keeps the memory of large maps instead of returning it, so that pages are not faulted in again.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def bench(arguments: Sequence[str]) -> None:
    """Measure, print the tables, write the JSON."""
    options = _options(arguments)
    device = torch.device(options.device)
    repeats = options.repeats or (2 if options.quick else 20)
    settings = Settings(tuple(dict.fromkeys(options.dtypes)), options.quick, options.full)
    chosen = [suite for name, suite in SUITES.items() if name in options.suites] or [*SUITES.values()]
    suites = [calibration] if options.calibrate else chosen
    cases = [case for suite in suites for case in suite(settings)]

    console = PlainConsole(width=120)
    malloc = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    if device.type == "cpu" and not ALLOCATOR.keys() <= malloc.keys():
        advice = " ".join(f"{name}={value}" for name, value in ALLOCATOR.items())
        console.say(f"Page faults can double the time of large maps on a CPU. Better: {advice} diffstride bench")
    rows: list[Row] = []
    missing: list[Row] = []
    with console.progress() as progress:
        task = progress.add_task("", total=sum(WARMUP + repeats * case.rounds for case in cases))
        for case in cases:
            name = case_name({"suite": case.suite, "case": case.facts})
            progress.update(task, description=f"{name}, {case.facts['dtype']}")
            found, absent = measure(case, repeats, options.seed, device, lambda: progress.advance(task))
            rows += found
            missing += absent
    for suite in dict.fromkeys(row["suite"] for row in rows):
        for sheet in sheets(rows, suite):
            table = make_table(sheet.title, *sheet.header)
            for dtype, lines in sheet.sections.items():
                table.add_section()
                table.add_row(Text(dtype, style="bold"))
                for line in lines:
                    table.add_row(*line)
            console.print(table)
    report: dict[str, Any] = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "allocator": malloc or "default",
        "repeats": repeats,
        "seed": options.seed,
        "rows": rows,
        "missing": missing,
    }
    if options.calibrate:
        report["crossover"] = crossovers(rows)
        literal = ", ".join(f"torch.{dtype}: {length}" for dtype, length in report["crossover"].items())
        console.say(f"For diffstride.backends.resample: DENSE_UP_TO = {{{literal}}}")
    if options.out:
        write_report(options.out, ["bench", *arguments], device, report)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="diffstride bench", description=DESCRIPTION)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} (default: all)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], metavar="DTYPE",
        help="float32, bfloat16, float16 (default: the first two)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=at_least(2), metavar="N", help="measured rounds, at least 2 (default: 20)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and 2 rounds, which do not measure speed")
    parser.add_argument("--full", action="store_true", help="steps: the full width too, slow on a CPU")
    parser.add_argument("--calibrate", action="store_true", help="dense products against FFTs, instead of the suites")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=devices, default="cpu", help="cpu, or cuda where there is a GPU")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of the order (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="file for all results")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.suites if name not in SUITES]:
        parser.error(f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    if options.out:
        check_file(options.out)
    return options
