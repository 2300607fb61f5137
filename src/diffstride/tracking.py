"""The history of a model's strides as rows; no drawing."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from diffstride._check import UserError
from diffstride._files import whole
from diffstride.nn.strides import learnable_layers

AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


def axis_names(ndim: int, given: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of `ndim` spatial axes: those given, where they are as many, else those of an image."""
    return tuple(given) if len(given) == ndim else AXES[ndim]


class StrideRow(NamedTuple):
    """One stride at one moment. `size` is the output size of the layer along the axis."""

    step: int
    layer: str
    axis: str
    stride: float
    size: int


class InputSizes:
    """Watches the spatial sizes that reach each learnable layer of a model, until it is closed.

    Where another layer is under jitter, what it sees may not be what it sees without: such sizes are kept only as long
    as nothing better is known.

    The sizes are kept here, in hooks: the layers' `forward` changes no state.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sizes: dict[str, tuple[int, ...]] = {}
        self._sure: set[str] = set()
        self._layers = dict(learnable_layers(model))
        self._handles = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self._layers.items()
        ]

    def _hook(self, name: str) -> Any:
        ndim = self._layers[name].ndim

        def remember(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            (x,) = args or kwargs.values()
            sizes = tuple(x.shape[-ndim:])
            if not all(type(n) is int for n in sizes):  # a trace runs the model with symbols
                return
            sure = not any(layer.is_jittered for layer in self._layers.values() if layer is not module)
            if sure or name not in self._sure:
                self.sizes[name] = sizes
            if sure:
                self._sure.add(name)

        return remember

    def close(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()


def stride_rows(
    model: nn.Module, step: int, input_sizes: dict[str, tuple[int, ...]], axes: Sequence[str] = ()
) -> Iterator[StrideRow]:
    """A row per learnable layer and axis (named as in `axis_names`), for the layers whose input size is known."""
    for name, layer in learnable_layers(model):
        if name in input_sizes:
            new_sizes = layer.output_size(input_sizes[name])
            for axis, stride, size in zip(axis_names(layer.ndim, axes), layer.strides, new_sizes, strict=True):
                yield StrideRow(step, name, axis, stride, size)


def append_rows(path: Path, rows: Iterable[StrideRow]) -> None:
    """Append to a CSV file, with a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(StrideRow._fields)
        writer.writerows((r.step, r.layer, r.axis, f"{r.stride:.6g}", r.size) for r in rows)


def read_rows(path: Path) -> list[StrideRow]:
    """Read what `append_rows` wrote.

    Raises:
        UserError: a file that is something else.
    """
    rows = read_dicts(path)
    try:
        return [StrideRow(int(r["step"]), r["layer"], r["axis"], float(r["stride"]), int(r["size"])) for r in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, it has rows that are no strides: remove it ({error})") from error


def read_dicts(path: Path) -> list[dict[str, str]]:
    """The rows of any CSV file with a header; none where there is no file.

    Raises:
        UserError: a file that is no table.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is damaged, no table can be read from it: remove it ({error})") from error


def drop_rows_from(path: Path, step: int) -> None:
    """Forget the rows of a CSV file of `step` and later: a resumed run writes them again. A torn last row goes too."""
    rows = read_dicts(path)
    if rows and "step" not in rows[0]:
        raise UserError(f"{path} is damaged, its rows have no step: remove it")
    if rows:
        complete = [row for row in rows if None not in row.values() and row["step"].isdigit()]
        with whole(path) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in complete if int(row["step"]) < step)
