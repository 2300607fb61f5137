"""Third phase of a plan: draft it, try it on the model, and level the maps that meet.

Sites of a group share a stride, but their maps at stride 1 may differ by a sample or so. For the block with two
branches of `candidates`, on 32 samples:

    conv at stride 1: 32 samples    # kernel 3, padding 1
    pool at stride 1: 31 samples    # kernel 2
    sizes at stride 1.6: 20 and 20    at stride 3.1: 11 and 10, which do not fit together
    size_offset of pool: 1            it gives as many samples as a map of 31 + 1 would

The offset is right at every input size if the difference of the two sizes is a constant. So the drafted plan is applied
to the model for a moment, which then runs with symbols for the learnable layers' sizes. If the difference varies with
the sizes of sites upstream, these are tied, and the search for groups goes on. At the end the converted model is tried
with strides that have moved, and its figures are filled in.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import sympy
import torch
from sympy import Expr, Symbol

from diffstride import tracing
from diffstride.convert import apply, handlers
from diffstride.convert.grouping import Group, Key, Search
from diffstride.convert.plan import Plan
from diffstride.convert.records import Site
from diffstride.cost import program, stand_ins
from diffstride.cost.stand_ins import Record
from diffstride.errors import UsageError
from diffstride.nn.attach import Placement
from diffstride.nn.conv import is_plain_convolution
from diffstride.nn.learnable import LearnableStrides
from diffstride.tracing import Session, TraceError

MOVED = 0.07
"""Part by which the strides of the first group move in the trial; those of the n-th move n times as far."""


def try_out(
    search: Search, before: Session, groups: list[Group], placement: Placement, options: dict[str, Any]
) -> Plan | None:
    """Return the plan for these groups, tried on the model. Return None if the search must go on instead.

    Args:
        search: the search that has found the groups. It learns from a trial that does not fit.
        before: the run of the model at its own sizes.
        groups: the sites that share a stride.
        placement: the side of a convolution on which its layer is to be.
        options: options of the layers.

    Raises:
        UsageError: the converted model cannot run the example.
    """
    fuse = True
    while True:
        plan = _draft(search, before, groups, placement, options, fuse)
        try:
            with tracing.preserved(search.model):
                apply.edit(search.model, plan, device=torch.device("cpu"))  # strides have values there
                return _levelled(search, plan)
        except TraceError as error:
            if not any(site.fused for site in plan.sites):
                raise UsageError(f"the converted model cannot run the example: {error}") from error
        fuse = False  # the model's code may read attributes of the convolutions that it had


def _draft(
    search: Search, before: Session, groups: list[Group], placement: Placement, options: dict[str, Any], fuse: bool
) -> Plan:
    """Return the plan without offsets that level maps, and without figures of the converted model."""
    candidates = search.candidates
    calls = {call.module: call for call in before.calls}
    macs = stand_ins.macs_by_module(before)
    numbered = {name: (number, group) for number, group in enumerate(groups) for name in group.names}
    sites = []
    for name, site in candidates.sites.items():
        module, call = candidates.modules[name], calls[name]
        first = placement == "before" and handlers.takes_layer_before(module)
        fused = not first and fuse and bool(name) and is_plain_convolution(module) and name not in search.strides_read
        number, group = numbered[name]
        assert call.output is not None
        sites.append(
            Site(
                name=name,
                kind=type(module).__name__,
                fused=fused,
                placement="before" if first else "after",
                stride=site.stride,
                group=number,
                shared=group.square,
                size_offset=site.size_offset or (0,) * site.ndim,
                input_size=tuple(map(before.value, call.input[-site.ndim :])) if call.input else (),
                size_before=tuple(map(before.value, call.output[-site.ndim :])),
                macs_before=macs.get(name, 0),
            )
        )
    resized = {resize.name for resize in search.resizes}
    return Plan(
        model=type(search.model).__name__,
        sites=tuple(sites),
        resizes=tuple(search.resizes),
        global_poolings=tuple(candidates.global_poolings),
        left_alone={name: reason for name, reason in candidates.left_alone.items() if name not in resized},
        macs_before=sum(macs.values()),
        macs_after=0,
        resampling_macs=0,
        options=options,
    )


def _levelled(search: Search, plan: Plan) -> Plan | None:
    """Return the plan with offsets and figures, given the model that it has changed; None if the groups must change."""
    model, example = search.model, search.example
    layers = {site.name: apply.layer_of(model, site) for site in plan.sites}
    several = {name for group in plan.groups if len(group) > 1 for name in group}
    with ExitStack() as stack:
        for site in plan.sites:
            if site.name in several:  # not levelled yet; the sizes that the model had fit together
                stack.enter_context(layers[site.name].pinned(output_size=site.size_before))
        records, session = stand_ins.records_of(model, example)
    if missing := [name for name, layer in layers.items() if layer not in {r.layer for r in records}]:
        raise TraceError(f"{missing[0]} is reached in another way than as a module of its parent", session)
    maps = _maps(plan, layers, records)
    if not _differences_are_constant(search, plan, maps):
        return None
    offsets = {site.name: _size_offset(plan, site, maps) for site in plan.sites}
    for name, layer in layers.items():
        layer.size_offset = offsets[name]
    costs = program.Program(model, example, "macs")
    _run_with_moved_strides(search, {layers[site.name]: site.group for site in plan.sites})
    macs, sizes = costs.by_module(), {id(record.layer): record.sizes for record in costs.records}
    sites = tuple(
        replace(
            site,
            size_offset=offsets[site.name],
            size_after=sizes[id(layers[site.name])],
            macs_after=sum(v for k, v in macs.items() if k == site.name or k.startswith(f"{site.name}.")),
        )
        for site in plan.sites
    )
    return replace(plan, sites=sites, macs_after=sum(macs.values()), resampling_macs=costs.resampling_macs())


class _Maps(NamedTuple):
    """The maps that the sites' windows see."""

    sizes: dict[str, list[Expr]]
    """Sizes by site, in symbols that the sites of a group share."""
    keys: dict[Symbol, Key]
    """One of the sizes that each symbol stands for."""


def _maps(plan: Plan, layers: dict[str, LearnableStrides], records: list[Record]) -> _Maps:
    sites = {id(layers[site.name]): site for site in plan.sites}
    maps, shared = _Maps({}, {}), dict[Symbol, Symbol]()
    for record in records:
        site = sites.get(id(record.layer))
        if site is None:  # learnable before
            continue
        maps.sizes.setdefault(site.name, [n.xreplace(shared) for n in record.sampled])
        for axis, (symbol, size) in enumerate(zip(record.symbols, record.sizes, strict=True)):
            shared[symbol] = common = sympy.Symbol(f"{site.group}_{axis}_{size}")
            maps.keys.setdefault(common, (site.name, 0, axis))
    return maps


def _differences_are_constant(search: Search, plan: Plan, maps: _Maps) -> bool:
    """Return whether the maps of each group differ by constants. If not, learn from that."""
    for group in plan.groups:
        first, *others = (maps.sizes[name] for name in group)
        for a, b in ((a, b) for sizes in others for a, b in zip(first, sizes, strict=True)):
            if (a - b).is_Integer:
                continue
            upstream = [list((a - b).free_symbols & size.free_symbols) for size in (a, b)]
            if all(len(symbols) == 1 for symbols in upstream):
                one, other = (maps.keys[symbols[0]] for symbols in upstream)
                if search.sizes[one] == search.sizes[other] and search.ties.join(one, other):
                    return False
            for name in group:
                reason = f"maps that meet differ by a varying number of samples: {', '.join(group)}"
                search.candidates.leave(name, reason)
            return False
    return True


def _size_offset(plan: Plan, site: Site, maps: _Maps) -> tuple[int, ...]:
    """Return the extra samples that a site's layer counts, by axis.

    These are those that `ceil_mode` adds, plus the difference from the largest map of the group.
    """
    group = [other for other in plan.sites if other.group == site.group]
    own = maps.sizes[site.name]
    return tuple(
        max(int(maps.sizes[other.name][axis] - own[axis]) + other.size_offset[axis] for other in group)
        for axis in range(len(own))
    )


def _run_with_moved_strides(search: Search, groups: dict[LearnableStrides, int]) -> None:
    """Run the converted model with strides that have moved, those of each group by another factor."""
    moved = {}
    for module in search.model.modules():
        if isinstance(module, LearnableStrides):
            factor = 1 + MOVED * (groups[module] + 1) if module in groups else 1.0
            moved[module] = tuple(s * factor for s in module.initial_strides)
    with stand_ins.pinned(moved):
        tracing.run(search.model, search.example, lambda *_: None)
