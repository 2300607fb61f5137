"""A model of any origin made to learn its strides: plan (find, tie, print), then apply."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from diffstride.backends import Backend
from diffstride.convert.plan import Plan
from diffstride.geometry import Basis, Norm, Window
from diffstride.tracing import ExampleInputs

__all__ = ["Plan", "convert", "plan"]


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    upsample: bool = False,
    smoothness: float = 4.0,
    shared: bool = False,
    bounds: tuple[float, float | None] = (1.0, None),
    window: Window = "inner",
    basis: Basis = "dft",
    norm: Norm = "forward",
    size_multiple: int = 1,
    backend: Backend = "auto",
) -> Plan:
    """What `convert` would do to a model, which is left as found.

    Every strided convolution and every max or average pooling becomes its stride-1 self followed by a learnable stride
    that starts at the old one. A plain convolution becomes a `DiffStrideConv`; a class with a forward of its own, one
    whose `stride` the model's code reads, and a pooling stay what they are, at stride 1, with a `DiffStride` layer
    behind (`module.diffstride`). Downsamplings whose outputs meet share one stride and one output size. Which these
    are is found by running the model's own code with symbols for sizes (`diffstride.tracing`), on fake tensors:
    no compute, no memory, whatever the model's size.

    Poolings of whole maps get no stride. Those with a fixed kernel follow the map's size from now on.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or
            `diffstride.ExampleInputs(*args, **kwargs)` for both.
        include: patterns (`fnmatch`) on module names: only these; None: all.
        exclude: patterns on module names to leave alone.
        upsample: whether upsampling by a fixed factor whose output meets a skip connection (U-Net) becomes
            `spectral_resize` to the skip's size (`nn.Upsample`) or is followed by one (transposed convolutions).
        smoothness: as in `DiffStride2d`, likewise all that follow. On long axes choose it in proportion to them.
        shared: one stride for all axes of a layer.
        bounds: `(lower, upper)` of the strides.
        window: `"inner"`: the converted model starts with the sizes that the model had; `"outer"` is the paper's, with
            maps larger by `2 smoothness` samples.
        basis: `"dft"` or `"dct"`.
        norm: `"forward"`, `"ortho"` or `"backward"`.
        size_multiple: round output sizes up to a multiple of this.
        backend: `"fft"`, `"matmul"` or `"auto"`.

    Returns:
        A `Plan`: `print` it, `apply` it, `save` it.

    Raises:
        UsageError: a ValueError. Nothing to convert; a model that raises, looks at the values of tensors, or needs maps
            of a fixed size everywhere; a pattern that matches nothing. The message names the module.
        TypeError: an argument of the wrong type.
        ValueError: an option that no layer takes.
    """
    from diffstride.convert.find import Finder

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    options = {
        "smoothness": smoothness, "shared": shared, "bounds": bounds, "window": window, "basis": basis, "norm": norm,
        "size_multiple": size_multiple, "backend": backend,
    }  # fmt: skip
    return Finder(model, ExampleInputs.of(example_inputs), include, exclude, upsample, options).find()


def convert(model: nn.Module, example_inputs: Any, **options: Any) -> Plan:
    """Make a model's strides learnable, in place, all or nothing: `plan`, applied.

    Weights stay the parameters that they are, under their names: an old checkpoint loads with `strict=False`, missing
    strides alone. Before a converted model's checkpoint is loaded, a fresh model needs the same conversion:
    `report.save(path)` here, `diffstride.Plan.load(path).apply(model)` there.

    Args:
        model: any module.
        example_inputs: as in `plan`.
        options: as in `plan`.

    Returns:
        The report, which is the plan that was carried out.

    Raises:
        UsageError: as `plan`, likewise TypeError and ValueError; the model is as before.
    """
    report = plan(model, example_inputs, **options)
    report.apply(model)
    return report


convert.__signature__ = inspect.signature(plan)  # type: ignore[attr-defined]  # for help()
