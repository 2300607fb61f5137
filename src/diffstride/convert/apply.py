"""Carry out a plan: replace and extend modules, all or none."""

from __future__ import annotations

import math
import operator
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffstride import _validation
from diffstride._text import one_line, short_repr
from diffstride.convert import handlers
from diffstride.convert.lengths import methods
from diffstride.convert.records import Resize, Site
from diffstride.convert.watch import warn_of_missing_strides
from diffstride.errors import UsageError
from diffstride.nn._parameter import StrideParameter
from diffstride.nn.attach import attach, attached
from diffstride.nn.diffstride import DiffStrideNd
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.lengths import OutputLengths
from diffstride.nn.resize import ResizeTo
from diffstride.options import LayerOptions
from diffstride.tracing import preserved

if TYPE_CHECKING:
    from diffstride.convert.plan import Plan

OPTIONS = {field.name for field in fields(LayerOptions)}
"""The options of the layers. A plan has all of them."""
LARGEST_SIZE = 1 << 20
"""The largest size of an axis to which a plan may resize."""


@torch.inference_mode(False)  # in which strides could not learn
def apply(model: nn.Module, plan: Plan) -> None:
    """Carry out `plan` on `model`, in place. A failure leaves the model as it was."""
    try:
        check(model, plan)
        with preserved(model, only_on_error=True):
            edit(model, plan)
        if plan.options["window"] != "hard":  # whose strides have no gradient
            warn_of_missing_strides(model, [layer_of(model, site) for site in plan.sites])
    except UsageError:
        raise
    except Exception as error:  # a plan from a file may hold any values
        raise UsageError(f"model cannot be converted: {one_line(error)}") from error


def check(model: nn.Module, plan: Plan) -> None:
    """Check that a plan fits the model, since it may come from a file.

    Raises:
        UsageError: modules are missing or of another kind, sites of a group differ, a size offset is larger than any
            model needs, or options are missing or unknown.
    """
    modules = dict(model.named_modules())
    parts: list[Site | Resize] = [*plan.sites, *plan.resizes]
    for part in parts:
        kind = type(modules[part.name]).__name__ if part.name in modules else "none"
        if kind != part.kind:
            raise UsageError(f"model must have the modules of the plan: {part.name} must be a {part.kind}, got {kind}")
    followers = (part.name for part in plan.resizes if not part.size)
    names = [*(site.key for site in plan.sites), *followers, *plan.global_poolings]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"a plan must have each module once, but has {short_repr(twice[0])} twice")
    groups: dict[int, Site] = {}
    for site in plan.sites:
        _check_site(site, modules[site.name])
        first = groups.setdefault(site.group, site)
        agree = operator.attrgetter("stride", "shared", "size_multiple", "fixed_axes")
        if agree(site) != agree(first):
            raise UsageError(f"sites of a group must have the same strides, but {first.name} and {site.name} differ")
    for resize in plan.resizes:
        if resize.ndim not in {len(site.stride) for site in plan.sites}:
            raise UsageError(f"ndim of {resize.name} must be that of a site, got {short_repr(resize.ndim)}")
        whole = all(n is None or (type(n) is int and 0 < n <= LARGEST_SIZE) for n in resize.size)
        if len(resize.size) not in ((0,) if resize.source else (resize.ndim,)) or not whole:
            raise UsageError(f"size of {resize.name} must be {resize.ndim} numbers, got {short_repr(resize.size)}")
    for method in plan.lengths:
        known = method.module in modules and method.method in methods(modules[method.module])
        if not known or len(method.frames) != len(method.layers):
            raise UsageError(f"lengths must be methods of the model, got {method.module}.{method.method}")
    if set(plan.options) != OPTIONS:
        raise UsageError(f"options must be {', '.join(sorted(OPTIONS))}, got {short_repr(sorted(plan.options))}")


def _check_site(site: Site, module: nn.Module) -> None:
    if site.kept:
        _validation.one_of(f"placement of {site.name}", site.placement, ("after", "before"))
        if site.fused or any(site.size_offset) or set(site.stride) != {1} or len(site.stride) not in handlers.LAYERS:
            raise UsageError(f"{site.key} must start at stride 1, with size_offset 0, got {site.stride}")
        return
    found = handlers.downsampling(module)
    both = not site.fused and handlers.takes_layer_before(module)
    _validation.one_of(f"placement of {site.name}", site.placement, ("after", "before") if both else ("after",))
    got = None if found is None else replace(found, fixed_axes=site.fixed_axes).initial_strides
    if found is None or got != site.stride:
        raise UsageError(f"model must be as it was planned for: {site.name} must have stride {site.stride}, got {got}")
    # At stride 1, maps of a group differ by less than a stride and the extent of a kernel. `ceil_mode` adds less than
    # a stride more.
    most = [2 * (s - 1) + extent for s, extent in zip(site.stride, found.extent, strict=True)]
    if len(site.size_offset) != len(most) or not all(
        type(n) is int and 0 <= n <= limit for n, limit in zip(site.size_offset, most, strict=True)
    ):
        raise UsageError(f"size_offset of {site.name} must be from 0 to {most}, got {short_repr(site.size_offset)}")


def edit(model: nn.Module, plan: Plan, *, device: torch.device | None = None) -> None:
    """Change the model. The caller undoes what a failure leaves half-done.

    Args:
        model: the model that was planned for.
        plan: the changes.
        device: device of the strides; None: that of the weights.
    """
    modules = dict(model.named_modules())
    default = next((p.device for p in model.parameters()), torch.device("cpu"))
    for site in plan.sites:
        module = modules[site.name]
        layer = _layer(site, plan, device or next((p.device for p in module.parameters()), default))
        if site.fused:
            _replace(model, module, handlers.fuse(module, layer))
        else:
            attach(module, layer.train(module.training), site.placement)
            if not site.kept and (found := handlers.downsampling(module)):
                stride = tuple(s if i in site.fixed_axes else 1 for i, s in enumerate(found.stride))
                module.stride = stride
    share_strides(model, plan)
    for name in plan.global_poolings:
        _replace(model, modules[name], handlers.global_pooling(modules[name]))
    basis, norm = plan.options["basis"], plan.options["norm"]
    resizes = [
        ResizeTo(r.ndim, size=r.size, basis=basis, norm=norm).train(modules[r.name].training) for r in plan.resizes
    ]
    for link, resize in zip(plan.resizes, resizes, strict=True):
        if isinstance(modules[link.name], nn.Upsample) and not link.kept:
            _replace(model, modules[link.name], resize)
        else:
            attach(attached(modules[link.name]) or modules[link.name], resize)
    for link, resize in zip(plan.resizes, resizes, strict=True):
        if link.source:
            resize.follow(model.get_submodule(link.source))  # which may be resized, too
    for method in plan.lengths:
        if method.layers:
            layers = [model.get_submodule(name) for name in method.layers]
            owner = model.get_submodule(method.module)
            counted = OutputLengths(owner, method.method, layers, method.axis, method.size, method.frames)
            setattr(owner, method.method, counted)  # as an attribute, which hides the method of the class


def share_strides(model: nn.Module, plan: Plan) -> None:
    """Give the layers of each group one parameter, that of the first. Some loaders give every layer its own."""
    strides: dict[int, nn.Parameter] = {}
    for site in plan.sites:
        layer = layer_of(model, site)
        own = layer._parameters["stride"]
        assert own is not None
        if not isinstance(own, StrideParameter):
            own = StrideParameter(own.detach(), own.requires_grad)
        # By assignment, accelerate's `init_empty_weights` would make a new parameter each time.
        layer._parameters["stride"] = strides.setdefault(site.group, own)


def layer_of(model: nn.Module, site: Site) -> LearnableStrides:
    """Return the layer that a site has become."""
    module = model.get_submodule(site.name)
    layer = module if isinstance(module, LearnableStrides) and not site.kept else attached(module, site.placement)
    assert isinstance(layer, LearnableStrides)
    return layer


def _layer(site: Site, plan: Plan, device: torch.device) -> DiffStrideNd:
    multiple = math.lcm(plan.options["size_multiple"], site.size_multiple)
    options = {**plan.options, "shared": plan.options["shared"] or site.shared, "size_multiple": multiple}
    if site.fixed_axes:
        limits = LayerOptions(**plan.options).limits
        axes = range(len(site.stride))
        options["bounds"] = tuple((1.0, 1.0) if axis in site.fixed_axes else limits(axis) for axis in axes)
    layer = handlers.LAYERS[len(site.stride)](tuple(map(float, site.stride)), device=device, **options)
    layer.size_offset = site.size_offset
    return layer


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module wherever it is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
