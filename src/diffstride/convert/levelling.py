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

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import sympy
import torch
from sympy import Expr, Symbol

from diffstride import tracing
from diffstride.convert import apply
from diffstride.convert.grouping import Group, Key, Search, trial_sizes
from diffstride.convert.plan import Plan
from diffstride.convert.records import Site
from diffstride.cost import program, stand_ins
from diffstride.cost.stand_ins import Record
from diffstride.errors import UsageError
from diffstride.nn.conv import is_plain_convolution
from diffstride.nn.learnable import LearnableStrides
from diffstride.nn.strides import learnable_layers
from diffstride.tracing import Session, TraceError

LARGEST_TRIED = 8
"""The largest multiple of sizes that is tried where the model does not say what it needs."""
MOVED = 0.07
"""Part by which the strides of the first group move in the trial; those of the n-th move n times as far."""


def try_out(search: Search, before: Session, groups: list[Group], options: dict[str, Any]) -> Plan | None:
    """Return the plan for these groups, tried on the model. Return None if the search must go on instead.

    Args:
        search: the search that has found the groups. It learns from a trial that does not fit.
        before: the run of the model at its own sizes.
        groups: the sites that share a stride.
        options: options of the layers.

    Raises:
        UsageError: the converted model cannot run the example.
    """
    for fuse in (True, False):
        plan = _draft(search, before, groups, options, fuse)
        try:
            with tracing.preserved(search.model):
                apply.edit(search.model, plan, device=torch.device("cpu"))  # strides have values there
                return _levelled(search, plan)
        except TraceError as error:
            if any(site.fused for site in plan.sites):
                continue  # the model's code may read attributes of the convolutions that it had
            multiples = {site.key: 2 * site.size_multiple for site in plan.sites}
            added = {site.key: multiples[site.key] // options["size_multiple"] for site in plan.sites}
            whole = all(n % added[site.key] == 0 for site in plan.sites for n in site.size_before)
            if max(multiples.values()) <= LARGEST_TRIED and whole:
                search.multiples |= multiples  # some code asks no question about sizes, and reshapes
            elif not _leave_what_cannot_move(search, plan, error):
                raise UsageError(f"the converted model cannot run the example: {error}") from error
            break
    return None


def _leave_what_cannot_move(search: Search, plan: Plan, error: TraceError) -> bool:
    """Leave alone the groups that break the model when they move alone. Return whether others remain."""
    broken = []
    with tracing.preserved(search.model):
        apply.edit(search.model, plan, device=torch.device("cpu"))
        for number, names in enumerate(plan.groups):
            layers = [apply.layer_of(search.model, site) for site in plan.sites if site.key in names]
            try:
                _run_with_moved_strides(search, dict.fromkeys(layers, number))
            except TraceError:
                broken += names
    if not 0 < len(broken) < len(plan.sites):
        return False
    for name in broken:
        search.candidates.leave(name, f"the model does not run where it has another stride: {error}")
    return True


def _draft(search: Search, before: Session, groups: list[Group], options: dict[str, Any], fuse: bool) -> Plan:
    """Return the plan without offsets that level maps, and without figures of the converted model."""
    candidates = search.candidates
    calls = {call.module: call for call in before.calls}
    macs = program.macs_at_present(search.model, before)
    numbered = {name: (number, group) for number, group in enumerate(groups) for name in group.names}
    sites = []
    for key, site in candidates.sites.items():
        name = candidates.module_name(key)
        module, call = candidates.modules[name], calls[name]
        number, group = numbered[key]
        replaceable = is_plain_convolution(module) and name not in search.strides_read
        resampled = call.input if site.placement == "before" and site.kept else call.output
        assert resampled is not None
        sites.append(
            Site(
                name=name,
                kind=type(module).__name__,
                fused=fuse
                and bool(name)
                and replaceable
                and site.placement == "after"
                and not (site.kept or site.fixed_axes),
                kept=site.kept,
                placement=site.placement,
                fixed_axes=site.fixed_axes,
                stride=site.initial_strides,
                group=number,
                shared=group.square,
                size_multiple=group.multiple,
                size_offset=(0,) * site.ndim if site.kept or not site.size_offset else site.size_offset,
                input_size=tuple(map(before.value, call.input[-site.ndim :])) if call.input else (),
                size_before=tuple(map(before.value, resampled[-site.ndim :])),
                macs_before=macs.get(name, 0),
            )
        )
    resized = {resize.name for resize in search.resizes if not resize.size}
    return Plan(
        model=type(search.model).__name__,
        sites=tuple(sites),
        resizes=tuple(search.resizes),
        global_poolings=tuple(candidates.global_poolings),
        left_alone={name: reason for name, reason in candidates.left_alone.items() if name not in resized},
        macs_before=sum(macs.values()),
        macs_after=0,
        resampling_macs=0,
        macs_least=0,
        examples=_examples(search, calls),
        options=options,
    )


def _examples(search: Search, calls: Mapping[str, Any]) -> int:
    """Return the number of examples if the maps at the sites have as many, or a multiple of it; otherwise 1."""
    number = search.example.examples
    for key, site in search.candidates.sites.items():
        shape = calls[search.candidates.module_name(key)].input
        if shape and (len(shape) != site.ndim + 2 or shape[0] % number):
            return 1
    return number


def _levelled(search: Search, plan: Plan) -> Plan | None:
    """Return the plan with offsets and figures, given the model that it has changed; None if the groups must change."""
    model, example = search.model, search.example
    layers = {site.key: apply.layer_of(model, site) for site in plan.sites}
    several = {name for group in plan.groups if len(group) > 1 for name in group}
    with ExitStack() as stack:
        for site in plan.sites:
            if site.key in several:  # not levelled yet; the sizes that the model had fit together
                stack.enter_context(layers[site.key].pinned(output_size=site.size_before))
        records, session = stand_ins.records_of(model, example)
    if missing := [name for name, layer in layers.items() if layer not in {r.layer for r in records}]:
        raise TraceError(f"{missing[0]} is reached in another way than as a module of its parent", session)
    maps = _maps(plan, layers, records)
    if not _differences_are_constant(search, plan, maps):
        return None
    offsets = {site.key: _size_offset(plan, site, maps) for site in plan.sites}
    for name, layer in layers.items():
        layer.size_offset = offsets[name]
    costs = program.Program(model, example, "macs")
    _run_with_moved_strides(search, {layers[site.key]: site.group for site in plan.sites})
    if _leave_what_saves_nothing(search, layers, costs):
        return None
    macs, sizes = costs.by_module(), {id(record.layer): record.sizes for record in costs.records}
    sites = tuple(
        replace(
            site,
            size_offset=offsets[site.key],
            size_after=sizes[id(layers[site.key])],
            macs_after=sum(v for k, v in macs.items() if k == site.name or k.startswith(f"{site.name}.")),
        )
        for site in plan.sites
    )
    return replace(
        plan,
        sites=sites,
        macs_after=sum(macs.values()),
        resampling_macs=costs.resampling_macs(),
        macs_least=costs.count(costs.largest_strides()),
    )


def _leave_what_saves_nothing(search: Search, layers: dict[str, LearnableStrides], costs: program.Program) -> bool:
    """Leave out inserted layers that no multiply-accumulates follow. Return whether there were some."""
    strides = {layer.stride_id: layer.stride for _, layer in learnable_layers(search.model)}
    grads = dict(zip(strides, costs.gradient(strides, resampling=False).grads, strict=True))
    useless = [
        key
        for key, layer in layers.items()
        if search.candidates.sites[key].kept
        and key not in search.candidates.included
        and not grads[layer.stride_id].any()
    ]
    for key in useless:
        search.candidates.leave(key, "no multiply-accumulates follow it")
    return bool(useless)


class _Maps(NamedTuple):
    """The maps that the sites' windows see."""

    sizes: dict[str, list[Expr]]
    """Sizes by site, in symbols that the sites of a group share."""
    keys: dict[Symbol, Key]
    """One of the sizes that each symbol stands for."""
    multiples: dict[Symbol, int]
    """The numbers of which the sizes are multiples."""

    def difference(self, a: Expr, b: Expr) -> int | None:
        """Return `a - b` if it is a constant; else None."""
        return _constant(a - b, {symbol: self.multiples[symbol] for symbol in (a - b).free_symbols})


def _constant(expression: Expr, multiples: Mapping[Symbol, int]) -> int | None:
    """Return the value of an expression if it is the same wherever the sizes in it are these multiples; else None."""
    if expression.is_Integer:
        return int(expression)
    found = {expression.xreplace(sizes) for sizes in trial_sizes(multiples)}
    return int(found.pop()) if len(found) == 1 else None


def _maps(plan: Plan, layers: dict[str, LearnableStrides], records: list[Record]) -> _Maps:
    sites = {id(layers[site.key]): site for site in plan.sites}
    maps, shared = _Maps({}, {}, {}), dict[Symbol, Symbol]()
    for record in records:
        site = sites.get(id(record.layer))
        if site is None:  # learnable before
            continue
        maps.sizes.setdefault(site.key, [n.xreplace(shared) for n in record.sampled])
        for axis, (symbol, size) in enumerate(zip(record.symbols, record.sizes, strict=True)):
            shared[symbol] = common = sympy.Symbol(f"{site.group}_{axis}_{size}")
            maps.keys.setdefault(common, (site.key, 0, axis))
            maps.multiples[common] = site.size_multiple
    return maps


def _differences_are_constant(search: Search, plan: Plan, maps: _Maps) -> bool:
    """Return whether the maps of each group differ by constants. If not, learn from that."""
    for group in plan.groups:
        first, *others = (maps.sizes[name] for name in group)
        fixed = search.candidates.sites[group[0]].fixed_axes
        for a, b in (
            (a, b) for sizes in others for i, (a, b) in enumerate(zip(first, sizes, strict=True)) if i not in fixed
        ):
            if maps.difference(a, b) is not None:
                continue
            keys = {symbol: maps.keys[symbol] for symbol in (a - b).free_symbols}
            if search.raise_multiples(keys, lambda n: _constant(a - b, n) is not None):  # noqa: B023  # at once
                return False
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
    offsets = []
    for axis, own in enumerate(maps.sizes[site.key]):
        largest = 0
        for other in group if axis not in site.fixed_axes else ():
            more = maps.difference(maps.sizes[other.key][axis], own)
            assert more is not None
            largest = max(largest, more + other.size_offset[axis])
        offsets.append(largest)
    return tuple(offsets)


def _run_with_moved_strides(search: Search, groups: dict[LearnableStrides, int]) -> None:
    """Run the converted model with strides that have moved, those of each group by another factor."""
    moved = {}
    for module in search.model.modules():
        if isinstance(module, LearnableStrides):
            factor = 1 + MOVED * (groups[module] + 1) if module in groups else 1.0
            moved[module] = tuple(s * factor for s in module.initial_strides)
    with stand_ins.pinned(moved):
        tracing.run(search.model, search.example, lambda *_: None)
