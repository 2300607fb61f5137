"""Make the strides of a model learnable, whoever wrote it: plan (find, group, level), print, apply."""

from __future__ import annotations

import inspect
from dataclasses import asdict, replace
from typing import Any, get_args

import torch
from torch import nn

from diffstride import _validation
from diffstride.backends import Backend
from diffstride.convert import apply, candidates, lengths
from diffstride.convert.candidates import Candidates, Patterns
from diffstride.convert.plan import Plan
from diffstride.geometry import Basis, Norm, Window
from diffstride.nn.attach import Placement
from diffstride.options import Bounds, LayerOptions
from diffstride.tracing import ExampleInputs

__all__ = ["Plan", "convert", "insert", "plan"]


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    upsample: bool = False,
    placement: Placement = "after",
    smoothness: float = 4.0,
    shared: bool = False,
    bounds: Bounds = (1.0, None),
    window: Window = "inner",
    basis: Basis = "dft",
    norm: Norm = "forward",
    size_multiple: int = 1,
    backend: Backend = "auto",
) -> Plan:
    """Return the plan by which `convert` would change a model. The model is left as found.

    Every strided convolution and every max or average pooling becomes its stride-1 self followed by a learnable stride
    that starts at the old one. A plain convolution becomes a `DiffStrideConv`. A pooling, a class with a forward of its
    own, and a convolution whose `stride` the model's code reads stay what they are, at stride 1, with a `DiffStride`
    layer behind (`module.diffstride`). So does a convolution with a layer before it (`placement`). Poolings of whole
    maps get no stride. Those with a fixed kernel become adaptive.

    Downsamplings whose outputs meet share one stride and one output size. They are found by running the model's own
    code with symbols for sizes (`diffstride.tracing`), on tensors without values. This takes little compute and memory,
    whatever the model's size. `convert.candidates`, `convert.grouping` and `convert.levelling` explain the steps.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or
            `diffstride.ExampleInputs(*args, **kwargs)` for both.
        include: patterns (`fnmatch`) on the names of the modules to convert; None: all.
        exclude: patterns on the names of modules to leave alone.
        upsample: change upsampling by a fixed factor whose output meets a skip connection (U-Net).
            `nn.Upsample` becomes `spectral_resize` to the skip's size, which follows a transposed convolution.
        placement: `"after"` (the paper): a layer resamples the output of its convolution. `"before"`: it resamples the
            input, and the convolution works on the small map, which costs what the strided convolution costs. This
            holds for plain convolutions whose padding keeps the size of a map at stride 1. Other modules keep the layer
            behind them; a printed plan shows where it is.
        smoothness: as in `DiffStride2d`, like all options below. On long axes choose it in proportion to them.
        shared: one stride for all axes of a layer.
        bounds: `(lower, upper)` of the strides.
        window: `"inner"`: the converted model starts with the sizes that the model had. `"outer"`: the paper's window,
            with maps larger by `2 smoothness` samples. `"hard"`: no ramp, for strides that no gradient is to move.
        basis: `"dft"` or `"dct"`.
        norm: `"forward"`, `"ortho"` or `"backward"`.
        size_multiple: round output sizes up to a multiple of this.
        backend: `"fft"`, `"matmul"` or `"auto"`.

    Returns:
        A `Plan`: `print` it, `apply` it, `save` it.

    Raises:
        UsageError: a ValueError that names the module. There is nothing to convert, a pattern matches nothing, or the
            model raises, decides by the values of tensors, or works at its own sizes only.
        ValueError: an option that no layer takes.
    """
    _validation.one_of("placement", placement, get_args(Placement))
    options = LayerOptions(
        smoothness=smoothness, shared=shared, bounds=bounds, window=window, basis=basis, norm=norm,
        size_multiple=size_multiple, backend=backend,
    )  # fmt: skip
    return _search(model, example_inputs, candidates.find(model, include, exclude, placement), upsample, options)


@torch.inference_mode(False)
def _search(model: nn.Module, example_inputs: Any, found: Candidates, upsample: bool, options: LayerOptions) -> Plan:
    """Return the plan for candidates: tie those that must agree, and leave alone those that must keep their size."""
    from diffstride.convert import grouping, levelling  # these import sympy

    search = grouping.Search(
        model, ExampleInputs.of(example_inputs), found, follow_upsampling=upsample, multiple=options.size_multiple
    )
    session = search.start()
    drafted = None
    while drafted is None:
        drafted = levelling.try_out(search, session, search.groups(), asdict(options))
    drafted = replace(drafted, lengths=lengths.find(model, session, found.sites))
    apply.check(model, drafted)
    return drafted


def convert(model: nn.Module, example_inputs: Any, **options: Any) -> Plan:
    """Make a model's strides learnable, in place, all or nothing. This makes a `plan` and applies it.

    The parameters stay the same tensors under the same names. So an old checkpoint loads with `strict=False`, and only
    strides are missing. Before a converted model's checkpoint is loaded, a fresh model needs the same conversion:
    `plan.save(path)` here, `diffstride.Plan.load(path).apply(model)` there.

    Args:
        model: any module.
        example_inputs: as in `plan`.
        options: as in `plan`.

    Returns:
        The plan that was carried out.

    Raises:
        UsageError: as in `plan`, and so is ValueError; the model is as before.
    """
    made = plan(model, example_inputs, **options)
    made.apply(model)
    return made


def insert(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    smoothness: float = 4.0,
    shared: bool = True,
    bounds: Bounds = (1.0, None),
    window: Window = "inner",
    basis: Basis = "dft",
    norm: Norm = "forward",
    size_multiple: int = 1,
    backend: Backend = "auto",
) -> Plan:
    """Insert learnable strides into a trained model, in place, all or nothing. It computes what it computed.

    Each inserted layer starts at stride 1, where the inner window is the identity, and every other module stays as it
    is. Under a cost or a budget the strides grow, and the model becomes cheaper. By default the layers are

    - before the first convolution (the site `"(input)"`), which then works on a smaller input,
    - behind every strided convolution and every max or average pooling, which keep their strides.

    Outputs that meet share one stride and one size, as in `plan`. Upsampling by a fixed factor is followed by resizing
    to the size that it meets. Poolings of whole maps by a kernel of fixed size become adaptive.

    Args:
        model: any module.
        example_inputs: as in `plan`.
        include: patterns on the names of other modules, whose outputs may shrink. Networks without any downsampling
            need it.
        exclude: patterns on the names of sites to leave out, `"(input)"` among them.
        smoothness: as in `DiffStride2d`, like all options below. On long axes choose it in proportion to them.
        shared: one stride for all axes of a layer. Under a budget the two axes of an image wander apart by noise.
        bounds: `(lower, upper)` of the strides.
        window: `"inner"` and `"hard"` are the identity at stride 1. The hard one keeps the most detail, where strides
            are found by measured losses. `"outer"` is the identity to 1e-3, and small maps do not shrink at once.
        basis: `"dft"` or `"dct"`.
        norm: `"forward"`, `"ortho"` or `"backward"`.
        size_multiple: round output sizes up to a multiple of this.
        backend: `"fft"`, `"matmul"` or `"auto"`.

    Returns:
        The plan that was carried out.

    Raises:
        UsageError: as in `plan`; the model is as before.
        ValueError: an option that no layer takes.
    """
    options = LayerOptions(
        smoothness=smoothness, shared=shared, bounds=bounds, window=window, basis=basis, norm=norm,
        size_multiple=size_multiple, backend=backend,
    )  # fmt: skip
    made = _search(model, example_inputs, candidates.find_places(model, include, exclude), True, options)
    made.apply(model)
    return made


convert.__signature__ = inspect.signature(plan)  # type: ignore[attr-defined]  # for help()
