"""The history of a model's strides as rows; no drawing."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from torch import nn

from diffstride._files import PATH_ERRORS, atomic_path, describe_os_error, open_text
from diffstride._text import csv_cell, short_repr
from diffstride.errors import UsageError
from diffstride.geometry import AXIS_NAMES
from diffstride.nn.strides import learnable_layers


def axis_names(ndim: int, given: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of `ndim` spatial axes: those given, where they are as many, else those of an image."""
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
    """A row per learnable layer and axis (named as in `axis_names`), for the layers whose input size is known."""
    for name, layer in learnable_layers(model):
        if name in input_sizes:
            new_sizes = layer.output_size(input_sizes[name])
            for axis, stride, size in zip(axis_names(layer.ndim, axes), layer.strides, new_sizes, strict=True):
                yield StrideRow(step, name, axis, stride, size)


History = dict[tuple[str, str], list[StrideRow]]  # by layer and axis


def append_rows(path: str | Path, rows: Iterable[StrideRow]) -> None:
    """Append to a CSV file, with a header if it is new.

    Raises:
        UsageError: no folder to write to, or a folder in place of the file.
    """
    path = Path(path)
    new = not path.exists()
    with _named_errors(path), path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(StrideRow._fields)
        writer.writerows((r.step, csv_cell(r.layer), csv_cell(r.axis), f"{r.stride:.6g}", r.size) for r in rows)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in PATH_ERRORS:
            raise
        raise UsageError(describe_os_error(error, path)) from error


def read_rows(path: str | Path) -> list[StrideRow]:
    """Read what `append_rows` wrote.

    Raises:
        UsageError: a file that is something else.
    """
    rows = read_dicts(path)
    try:
        return [_row(r) for r in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged, it has rows that are no strides: remove it ({error})") from error


def _row(texts: Mapping[str, str]) -> StrideRow:
    step, size = (whole_number(texts[name]) for name in ("step", "size"))
    return StrideRow(step, texts["layer"], texts["axis"], float(texts["stride"]), size)


def whole_number(text: str | None) -> int:
    """Return the whole number that a cell of a table has: digits, of at most 64 bits.

    Raises:
        ValueError: any other text.
    """
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"a whole number must have 1 to 18 digits, got {short_repr(text)}")
    return int(text)


def read_history(path: str | Path) -> History:
    """Return the strides in a file that may just be written, or be damaged.

    Of each layer, only those steps are returned that have the axes of its first one. A layer has one to three axes.

    Raises:
        UsageError: a file that is no table.
    """
    layers: dict[str, list[dict[str, StrideRow]]] = {}
    for texts in read_dicts(path):
        with suppress(KeyError, TypeError, ValueError):
            row = _row(texts)
            steps = layers.setdefault(row.layer, [])
            if not steps or next(iter(steps[-1].values())).step != row.step:
                steps.append({})
            steps[-1][row.axis] = row
    return {
        (layer, axis): [step[axis] for step in steps if step.keys() == steps[0].keys()]
        for layer, steps in layers.items()
        if len(steps[0]) in AXIS_NAMES
        for axis in steps[0]
    }


def read_dicts(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of any CSV file with a header; none where there is no file. A line without its end is torn.

    Raises:
        UsageError: a file that is no table.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        with _named_errors(path), open_text(path) as file:
            return list(csv.DictReader(line for line in file if line.endswith(("\n", "\r"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is damaged, no table can be read from it: remove it ({error})") from error


def drop_rows_from(path: str | Path, step: int) -> None:
    """Drop the rows of a CSV file from `step` on, which a resumed run writes again, and those without a step."""
    path = Path(path)
    rows = read_dicts(path)
    if rows and "step" not in rows[0]:
        raise UsageError(f"{path} is damaged, its rows have no step: remove it")
    if not rows:  # what may be there is a torn line, behind which nothing can be written
        path.unlink(missing_ok=True)
        return
    kept = [row for row in rows if None not in row.values() and _is_before(row["step"], step)]
    with atomic_path(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name is not None], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)


def _is_before(cell: str, step: int) -> bool:
    """Return whether a cell has a step, and one before `step`."""
    try:
        return whole_number(cell) < step
    except ValueError:
        return False
