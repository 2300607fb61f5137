"""Tables of a run as CSV files: the history of its strides, and the metrics that Lightning logs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from diffstride._files import atomic_path, open_text
from diffstride._text import csv_cell
from diffstride.errors import UsageError
from diffstride.geometry import AXIS_NAMES
from diffstride.nn.strides import learnable_layers


def axis_names(ndim: int, given: Sequence[str] = ()) -> tuple[str, ...]:
    """Return names of `ndim` spatial axes: those given, where they are as many, else those of an image."""
    return tuple(given) if len(given) == ndim else AXIS_NAMES[ndim]


class StrideRow(NamedTuple):
    """One stride at one moment. `size` is the output size of the layer along the axis."""

    step: int
    layer: str
    axis: str
    stride: float
    size: int


def stride_rows(
    model: nn.Module, step: int, input_sizes: Mapping[str, tuple[int, ...]], axes: Sequence[str] = ()
) -> Iterator[StrideRow]:
    """Return a row per learnable layer and axis (see `axis_names`), for layers whose input size is known."""
    for name, layer in learnable_layers(model):
        if name in input_sizes:
            new_sizes = layer.output_size(input_sizes[name])
            for axis, stride, size in zip(axis_names(layer.ndim, axes), layer.strides, new_sizes, strict=True):
                yield StrideRow(step, name, axis, stride, size)


def append_rows(path: Path, rows: Iterable[StrideRow]) -> None:
    """Append to a CSV file, with a header if it is new."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(StrideRow._fields)
        writer.writerows((r.step, csv_cell(r.layer), csv_cell(r.axis), f"{r.stride:.6g}", r.size) for r in rows)


def read_rows(path: Path) -> list[StrideRow]:
    """Return what `append_rows` wrote; nothing where there is no file.

    Raises:
        UsageError: a file with other content.
    """
    rows = read_dicts(path)
    try:
        return [StrideRow(int(r["step"]), r["layer"], r["axis"], float(r["stride"]), int(r["size"])) for r in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged, it has rows that are no strides: remove it ({error})") from error


def read_dicts(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header; nothing where there is no file. A line without its end is left out.

    Raises:
        UsageError: a file that is no table.
    """
    if not path.exists():
        return []
    try:
        with open_text(path) as file:
            return list(csv.DictReader(line for line in file if line.endswith(("\n", "\r"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is damaged, no table can be read from it: remove it ({error})") from error


def drop_rows_from(path: Path, step: int) -> None:
    """Drop the rows of a CSV file from `step` on, which a resumed run writes again, and rows without a step."""
    rows = read_dicts(path)
    if not rows:  # a line without its end may be there, and nothing can be written after it
        path.unlink(missing_ok=True)
        return
    whole = (row for row in rows if None not in row.values() and row["step"].isdecimal())
    kept = [row for row in whole if int(row["step"]) < step]
    with atomic_path(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name is not None], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
