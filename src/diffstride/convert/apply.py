"""The plan carried out: modules replaced and extended, all or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from diffstride._check import UserError
from diffstride.convert import sites
from diffstride.nn.attach import attach, attached
from diffstride.nn.diffstride import DiffStrideNd
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.resize import ResizeTo
from diffstride.trace import preserved

if TYPE_CHECKING:
    from diffstride.convert.plans import Plan, Site


def apply(model: nn.Module, plan: Plan) -> None:
    """Carry out `plan` on `model`, in place."""
    _check_modules(model, plan)
    try:
        with preserved(model):  # a first try on what is put back, so that a failure leaves nothing half-done
            edit(model, plan)
    except Exception as error:
        raise UserError(f"model cannot be converted: {error}") from error
    edit(model, plan)


def _check_modules(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules())
    kinds = {part.name: part.kind for part in plan.sites} | {part.name: part.kind for part in plan.resizes}
    for name, wanted in kinds.items():
        kind = type(modules[name]).__name__ if name in modules else "none"
        if kind != wanted:
            raise UserError(f"model must have the modules of the plan: {name} must be a {wanted}, got {kind}")
    for site in plan.sites:
        look = sites.look(modules[site.name])
        got = None if look is None else look.stride
        if got != site.stride:
            raise UserError(
                f"model must be as it was planned for: {site.name} must have stride {site.stride}, got {got}"
            )


def edit(model: nn.Module, plan: Plan) -> None:
    """Change the model; what fails half-way is the caller's to put back."""
    modules = dict(model.named_modules())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    strides: dict[int, nn.Parameter] = {}
    for site in plan.sites:
        module = modules[site.name]
        layer = _layer(site, plan, next((p.device for p in module.parameters()), device))
        # Not by assignment, for which accelerate's `init_empty_weights` makes a new parameter each time.
        layer._parameters["stride"] = shared = strides.setdefault(site.group, layer.stride)
        if site.fused:
            fused = sites.fuse(module, layer)
            fused._parameters["stride"] = shared
            fused.excess = layer.excess
            _replace(model, module, fused)
        else:
            sites.unstride(module, layer)
    for name in plan.global_poolings:
        _replace(model, modules[name], sites.global_pooling(modules[name]))
    now = dict(model.named_modules())
    basis, norm = plan.options.get("basis", "dft"), plan.options.get("norm", "forward")
    for link in plan.resizes:
        resize = ResizeTo(link.ndim, basis=basis, norm=norm).train(modules[link.name].training)
        resize.follow(now[link.source])
        if isinstance(modules[link.name], nn.Upsample):
            _replace(model, modules[link.name], resize)
        else:
            attach(modules[link.name], resize)


def layer_of(model: nn.Module, site: Site) -> LearnableStrides:
    """The layer that a site has become."""
    module = model.get_submodule(site.name)
    layer = module if isinstance(module, LearnableStrides) else attached(module)
    assert isinstance(layer, LearnableStrides)
    return layer


def _layer(site: Site, plan: Plan, device: torch.device) -> DiffStrideNd:
    options = {**plan.options, "shared": plan.options.get("shared", False) or site.shared}
    layer = sites.LAYERS[len(site.stride)](tuple(map(float, site.stride)), device=device, **options)
    layer.excess = site.excess or (0,) * len(site.stride)
    return layer


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever it is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
