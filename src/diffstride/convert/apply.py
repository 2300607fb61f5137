"""The plan carried out: modules replaced and extended, all or none."""

from __future__ import annotations

import torch
from torch import nn

from diffstride._text import one_line, short_repr
from diffstride.convert import handlers
from diffstride.convert.lengths import methods
from diffstride.convert.records import Edits, Resize, Site
from diffstride.errors import UsageError
from diffstride.functional import Settings
from diffstride.nn.attach import attach, attached
from diffstride.nn.diffstride import DiffStrideNd
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.lengths import OutputLengths
from diffstride.nn.resize import ResizeTo
from diffstride.tracing import preserved

OPTIONS = {*Settings._fields, "shared"}
"""Of the layers, which a plan has all."""


def apply(model: nn.Module, plan: Edits) -> None:
    """Carry out `plan` on `model`, in place; leave it as it is where that fails."""
    try:
        check(model, plan)
        with preserved(model, unless_it_succeeds=True):
            edit(model, plan)
    except UsageError:
        raise
    except Exception as error:  # of a plan from a file, whatever is in it
        raise UsageError(f"model cannot be converted: {one_line(error)}") from error


def check(model: nn.Module, plan: Edits) -> None:
    """Check a plan against the model, since it may come from a file.

    Raises:
        UsageError: modules that are missing or of another kind than planned, sites of a group that differ, offsets that
            no model needs, options that are missing or unknown.
    """
    modules = dict(model.named_modules())
    parts: list[Site | Resize] = [*plan.sites, *plan.resizes]
    kinds = {part.name: part.kind for part in parts}
    for name, wanted in kinds.items():
        kind = type(modules[name]).__name__ if name in modules else "none"
        if kind != wanted:
            raise UsageError(f"model must have the modules of the plan: {name} must be a {wanted}, got {kind}")
    names = [*(part.name for part in parts), *plan.global_poolings]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"a plan must have each module once, but has {short_repr(twice[0])} twice")
    groups: dict[int, Site] = {}
    for site in plan.sites:
        _check_site(site, modules[site.name])
        first = groups.setdefault(site.group, site)
        if (first.stride, first.shared) != (site.stride, site.shared):
            raise UsageError(
                f"sites of a group must be alike, but {first.name} and {site.name} differ in their strides"
            )
    for name in plan.global_poolings:
        look = handlers.look(modules[name]) if name in modules else None
        if look is None or not look.pooling:
            raise UsageError(f"global_poolings must be poolings of the model, got {short_repr(name)}")
    for resize in plan.resizes:
        if not handlers.is_upsampling(modules[resize.name]):
            raise UsageError(f"resizes must be upsamplings by a fixed factor, got {short_repr(resize.name)}")
        if resize.ndim not in {len(site.stride) for site in plan.sites}:
            raise UsageError(f"ndim of {resize.name} must be that of a site, got {short_repr(resize.ndim)}")
        if resize.source not in modules:
            raise UsageError(f"resizes must follow modules of the model, got {short_repr(resize.source)}")
    for method in plan.lengths:
        if method.module not in modules or method.method not in methods(modules[method.module]):
            raise UsageError(
                f"lengths must be methods of the model, got {short_repr(method.module)}.{short_repr(method.method)}"
            )
        if not set(method.layers) <= modules.keys() or len(method.frames) != len(method.layers):
            raise UsageError(f"layers of {method.method} must be modules of the model, got {short_repr(method.layers)}")
    if set(plan.options) != OPTIONS:
        raise UsageError(
            f"options must be {', '.join(sorted(OPTIONS))}, got {', '.join(map(short_repr, plan.options))}"
        )


def _check_site(site: Site, module: nn.Module) -> None:
    look = handlers.look(module)
    got = None if look is None else look.stride
    if look is None or got != site.stride:
        raise UsageError(f"model must be as it was planned for: {site.name} must have stride {site.stride}, got {got}")
    # Maps that meet at their strides differ by less than a stride before, and by what a module pads by its own stride.
    most = [2 * (s - 1) + extent for s, extent in zip(site.stride, look.extent, strict=True)]
    offsets = site.size_offset or (0,) * look.ndim
    if len(offsets) != look.ndim or not all(
        type(n) is int and 0 <= n <= limit for n, limit in zip(offsets, most, strict=True)
    ):
        raise UsageError(f"size_offset of {site.name} must be from 0 to {most}, got {short_repr(site.size_offset)}")


def edit(model: nn.Module, plan: Edits, *, device: torch.device | None = None) -> None:
    """Change the model; what fails half-way is the caller's to put back.

    Args:
        model: the model that was planned for.
        plan: what to change.
        device: of the strides; by default that of the weights.
    """
    modules = dict(model.named_modules())
    default = next((p.device for p in model.parameters()), torch.device("cpu"))
    strides: dict[int, nn.Parameter] = {}
    for site in plan.sites:
        module = modules[site.name]
        layer = _layer(site, plan, device or next((p.device for p in module.parameters()), default))
        # Not by assignment, for which accelerate's `init_empty_weights` makes a new parameter each time.
        layer._parameters["stride"] = shared = strides.setdefault(site.group, layer.stride)
        if site.fused:
            fused = handlers.fuse(module, layer)
            fused._parameters["stride"] = shared
            fused.size_offset = layer.size_offset
            _replace(model, module, fused)
        else:
            handlers.unstride(module, layer)
    for name in plan.global_poolings:
        _replace(model, modules[name], handlers.global_pooling(modules[name]))
    basis, norm = plan.options.get("basis", "dft"), plan.options.get("norm", "forward")
    resizes = [ResizeTo(r.ndim, basis=basis, norm=norm).train(modules[r.name].training) for r in plan.resizes]
    for link, resize in zip(plan.resizes, resizes, strict=True):
        if isinstance(modules[link.name], nn.Upsample):
            _replace(model, modules[link.name], resize)
        else:
            attach(modules[link.name], resize)
    now = dict(model.named_modules())
    for link, resize in zip(plan.resizes, resizes, strict=True):
        resize.follow(now[link.source])  # which may be a resized map, too
    for method in plan.lengths:
        if method.layers:
            layers = [now[name] for name in method.layers]
            owner = now[method.module]
            # As an attribute, which hides the method of the class.
            counted = OutputLengths(owner, method.method, layers, method.axis, method.size, method.frames)
            setattr(owner, method.method, counted)


def layer_of(model: nn.Module, site: Site) -> LearnableStrides:
    """The layer that a site has become."""
    module = model.get_submodule(site.name)
    layer = module if isinstance(module, LearnableStrides) else attached(module)
    assert isinstance(layer, LearnableStrides)
    return layer


def _layer(site: Site, plan: Edits, device: torch.device) -> DiffStrideNd:
    options = {**plan.options, "shared": plan.options.get("shared", False) or site.shared}
    layer = handlers.LAYERS[len(site.stride)](tuple(map(float, site.stride)), device=device, **options)
    layer.size_offset = site.size_offset or (0,) * len(site.stride)
    return layer


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever it is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
