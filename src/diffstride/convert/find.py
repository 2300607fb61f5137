"""Finds the downsamplings of a model and which of them must agree: the model is run with symbols for their sizes.

The output of every downsampling is given a size of its own, none what it was. Where two maps then meet that had the
same size before, the run fails, at a comparison of two symbols: these two downsamplings belong together. Where it
fails at anything else (a flatten that needs so many features), the sizes involved cannot change. So it is run again
until it succeeds, which also proves that the model works at other sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, nn

from diffstride import tracing
from diffstride.convert import apply, handlers, lengths
from diffstride.convert.handlers import Look
from diffstride.convert.plan import Plan, patterns
from diffstride.convert.records import Resize, Site
from diffstride.cost import program
from diffstride.errors import UsageError
from diffstride.nn._tracers import Traceable
from diffstride.nn.conv import is_plain_convolution
from diffstride.nn.learnable import LearnableStrides
from diffstride.tracing import ExampleInputs, Session, TraceError, described

Key = tuple[str, int, int]
"""A size of an output: module, number of its call, axis."""


class Finder:
    """The search for one plan."""

    def __init__(
        self,
        model: nn.Module,
        example: ExampleInputs,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        upsample: bool,
        options: dict[str, Any],
    ) -> None:
        self.model, self.example, self.upsample, self.options = model, example, upsample, options
        self.modules = dict(model.named_modules())
        self.learned = {m: program.in_use(m) for m in self.modules.values() if isinstance(m, LearnableStrides)}
        self.sites: dict[str, Look] = {}
        self.left_alone: dict[str, str] = {}
        self.global_poolings: list[str] = []
        self.upsamplings: dict[str, int] = {}
        self.links: dict[Key, Any] = {}
        """What the sizes of upsamplings must be, in symbols named by their keys."""
        self.resizes: list[Resize] = []
        self.read: set[str] = set()
        """Convolutions whose stride is read by the model's code."""
        self.ties = _Classes()
        self.naturals: dict[Any, int] = {}
        self.fuse = True
        """Whether `DiffStrideConv`s may take the places of convolutions."""
        self._look(patterns("include", include), patterns("exclude", exclude))

    def _look(self, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
        """Sort the modules by type and name."""
        for name, module in self.modules.items():
            look = handlers.look(module)
            if look is None or (look.reason is None and not look.pooling and max(look.stride) == 1):
                continue
            if look.reason:
                self.left_alone[name] = look.reason
            else:
                self.sites[name] = look
        for name, module in self.modules.items():
            if handlers.is_upsampling(module):
                self.upsamplings[name] = self._ndim(name)
        for what, given in (("include", include), ("exclude", exclude)):
            for pattern in given or ():
                if not any(fnmatchcase(name, pattern) for name in self.sites):
                    known = ", ".join(self.sites) or "none"
                    raise UsageError(f"{what} must match a downsampling (there are: {known}), got {pattern!r}")
        for name in list(self.sites):
            if include is not None and not any(fnmatchcase(name, p) for p in include):
                self._leave(name, "not among those to include")
            elif any(fnmatchcase(name, p) for p in exclude or ()):
                self._leave(name, "excluded")

    def _leave(self, name: str, reason: str) -> None:
        del self.sites[name]
        self.left_alone[name] = reason

    def find(self) -> Plan:
        """The plan.

        Raises:
            UsageError: nothing can be converted, or the model cannot be run so.
        """
        session = self._run()
        self._sort_out(session)
        self.naturals = {
            key: int(session.hints[s]) for s, key in session.keys.items() if key[0] in {*self.sites, *self.upsamplings}
        }
        while True:
            self._resolve()
            groups = self._groups()
            if groups is not None:
                plan = self._draft(session, groups)
                if plan is not None:
                    plan = replace(plan, lengths=tuple(lengths.find(self.model, session, self.sites)))
                    apply.check(self.model, plan)
                    return plan

    def _run(self, values: dict[Key, int] | None = None) -> Session:
        """Run the model with symbols for the sizes of the sites' outputs: those they have, or these values."""
        with program.pinned(self.learned):
            return tracing.run(
                self.model,
                self.example,
                lambda session, name, module: self._forward(session, name, module, values or {}),
                symbolic_inputs=True,
            )

    def _forward(
        self, session: Session, name: str, module: nn.Module, values: dict[Key, int]
    ) -> tracing.Forward | None:
        if isinstance(module, LearnableStrides):
            return program.unchanged(session, module)
        if (stand_in := program.fixed(module)) is not None:
            return stand_in
        if name in self.global_poolings:
            ndim = self._ndim(name)
            return lambda x: x.new_empty([*x.shape[:-ndim], *[1] * ndim])
        resized = self.upsample and name in self.upsamplings
        if name not in self.sites and not resized:
            return None
        if is_plain_convolution(module):
            module.stride = _Watched(module.stride, name, self.read)  # type: ignore[assignment, arg-type]
        original = module.forward
        seen: dict[Any, int] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            ndim = self._ndim(name) or output.ndim - 2
            if not isinstance(output, Tensor) or not inputs or output.ndim < ndim:
                return output
            call = seen.setdefault(tracing.shape(inputs[0])[-ndim:], len(seen))  # type: ignore[index]
            sizes = []
            for axis, natural in enumerate(output.shape[-ndim:]):
                key = (name, call, axis)
                if key in self.links:
                    sizes.append(session.sized(self.links[key].xreplace(_by_name(session))))
                else:
                    hint = session.value(tracing.expression(natural))
                    sizes.append(session.size(key, values.get(key, hint)))
            return output.new_empty([*output.shape[:-ndim], *sizes])

        return forward

    def _ndim(self, name: str) -> int:
        look = self.sites.get(name) or handlers.look(self.modules[name])
        return look.ndim if look else 0

    def _sort_out(self, session: Session) -> None:
        """After a run as the model is: global poolings, what did not run, and downsampling that is no module's."""
        shapes: dict[str, tuple[Any, ...]] = {}
        for call in session.calls:
            if call.output is not None:
                shapes.setdefault(call.module, call.output)
        for name, look in list(self.sites.items()):
            if name not in shapes:
                self._leave(name, "it does not run on the example inputs, or returns no tensor")
                continue
            single = all(session.value(n) == 1 for n in shapes[name][-look.ndim :])
            if single and look.pooling:
                del self.sites[name]
                self.global_poolings.append(name)
            elif max(look.stride) == 1:
                del self.sites[name]
            elif single:
                self._leave(name, "its output is a single sample")
        known = {*self.sites, *self.left_alone, *self.global_poolings}
        for name, operation in session.strided:
            if name not in known:
                self.left_alone[name or "(the model)"] = (
                    f"{type(self.modules[name]).__name__} downsamples in its own code ({operation}), not by a module "
                    "such as nn.MaxPool2d or nn.Conv2d"
                )
        if not self.sites:
            raise self._nothing()

    def _nothing(self) -> UsageError:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left_alone.items())
        return UsageError(
            "model must have a downsampling that can be converted (a strided convolution, a max or average pooling), "
            f"got none{': ' + reasons if reasons else ''}"
        )

    def _resolve(self) -> None:
        """Run at other sizes until that succeeds, learning something from every failure."""
        while True:
            if not self.sites:
                raise self._nothing()
            keys = [key for key in self.naturals if key[0] in {*self.sites, *self.upsamplings}]
            classes = {self.ties.of(key): i for i, key in enumerate(keys)}
            values = {key: 2 * self.naturals[key] + sympy.prime(classes[self.ties.of(key)] + 2) for key in keys}
            try:
                session = self._run(values)
            except TraceError as error:
                self._learn(error)
            else:
                if self._link(session):
                    return

    def _learn(self, error: TraceError) -> None:
        session = error.session
        natural = {s: sympy.Integer(self.naturals.get(key, session.hints[s])) for s, key in session.keys.items()}
        for relation in reversed(session.relations):
            expression = session.expanded(relation.expression)
            if sympy.sympify(expression.xreplace(natural)) != relation.truth:
                break
        else:
            raise UsageError(
                f"model must work at other sizes than those of the example: {error}: leave out with exclude= what must "
                "keep its size"
            ) from error
        left, right = (*expression.args, None, None)[:2]
        pair = self._same_function(left, right, session)
        if pair is not None:
            self._tie(*pair)
            return
        for side, other in ((left, right), (right, left)):
            key = session.keys.get(side)
            if self.upsample and key is not None and key[0] in self.upsamplings:
                self.links[key] = other.xreplace({s: _named(k) for s, k in session.keys.items()})
                return
        names = {session.keys[s][0] for s in expression.free_symbols}
        bound = [name for name in self.sites if name in names]
        where = f"{described(self.model, relation.module)}, at {relation.function or 'its own code'}"
        if not bound:
            raise UsageError(f"model must work at other sizes than those of the example: {error}") from error
        advice = " (upsample=True lets the upsampling follow)" if self.upsamplings and not self.upsample else ""
        needed = f", which needs {right} features" if relation.function == "linear" and right.is_Integer else ""
        for name in bound:
            self._leave(name, f"its map must keep its size for {where}{needed}{advice}")

    def _tie(self, one: Key, other: Key) -> None:
        """Two sizes agree; so do those of the other axes, where they were the same: the sites share their strides."""
        self.ties.join(one, other)
        if one[2] == other[2]:
            for axis in range(self.sites[one[0]].ndim):
                pair = (*one[:2], axis), (*other[:2], axis)
                if self.naturals.get(pair[0]) == self.naturals.get(pair[1]):
                    self.ties.join(*pair)

    def _same_function(self, left: Any, right: Any, session: Session) -> tuple[Key, Key] | None:
        """The two sizes that must agree, if an equation says no more than that."""
        symbols = [list(getattr(side, "free_symbols", ())) for side in (left, right)]
        if [len(found) for found in symbols] != [1, 1]:
            return None
        a, b = symbols[0][0], symbols[1][0]
        keys = session.keys[a], session.keys[b]
        if all(key[0] in self.sites for key in keys) and left.xreplace({a: b}) == right:
            return keys
        return None

    def _link(self, session: Session) -> bool:
        """Find the modules whose outputs have the sizes that upsamplings must take; False if one has none."""
        self.resizes = []
        counts: dict[str, int] = {}
        for call in session.calls:
            counts[call.module] = counts.get(call.module, 0) + 1
        for name in {key[0]: None for key in self.links}:
            at = next(i for i, call in enumerate(session.calls) if call.module == name)
            output = session.calls[at].output
            assert output is not None
            ndim = len(output) - 2
            sizes = list(map(session.expanded, output[-ndim:]))
            sources = [
                call.module
                for call in reversed(session.calls[:at])
                if call.output is not None
                and len(call.output) == len(output)
                and list(map(session.expanded, call.output[-ndim:])) == sizes
                and counts[call.module] == 1
            ]
            # One that `torch.fx` calls as a module: it writes out what others do, without their hooks.
            leaf = next((source for source in sources if _is_leaf(self.modules[source])), None)
            source = leaf or next(iter(sources), None)
            if source is None:  # it stays as it is, and so do the sites that it binds
                del self.upsamplings[name]
                self.links = {key: size for key, size in self.links.items() if key[0] != name}
                self.left_alone[name] = "it must take a size that no module's output has (one that is called once)"
                return False
            self.resizes.append(Resize(name, type(self.modules[name]).__name__, source, ndim))
        return True

    def _groups(self) -> list[_Group] | None:
        """The sites that share a stride; None if some cannot, which are then left alone."""
        joined = _Classes()
        square: set[str] = set()
        axes: dict[Any, list[Key]] = {}
        for key in self.naturals:
            if key[0] in self.sites:
                axes.setdefault(self.ties.of(key), []).append(key)
        for keys in axes.values():
            for key in keys[1:]:
                joined.join(keys[0][0], key[0])
                if key[2] != keys[0][2]:
                    square.add(keys[0][0])
        groups: dict[str, _Group] = {}
        for name in self.sites:
            group = groups.setdefault(joined.of(name), _Group([], False))
            groups[joined.of(name)] = _Group([*group.names, name], group.square or name in square)
        for group in groups.values():
            strides = {self.sites[name].stride for name in group.names}
            if len(strides) > 1 or (group.square and len(set(*strides)) > 1):
                shown = ", ".join(f"{name} {self.sites[name].stride}" for name in group.names)
                for name in group.names:
                    self._leave(name, f"outputs of different strides meet: {shown}")
                return None
        return list(groups.values())

    def _draft(self, before: Session, groups: list[_Group]) -> Plan | None:
        """The plan with its figures, tried on the model; None if more was learned instead."""
        drafted = []
        shapes = {call.module: call for call in before.calls}
        macs = program.by_module(before)
        for number, group in enumerate(groups):
            for name in group.names:
                module, look = self.modules[name], self.sites[name]
                size = [before.value(n) for n in shapes[name].output[-look.ndim :]]  # type: ignore[index]
                given = shapes[name].input
                drafted.append(
                    Site(
                        name,
                        type(module).__name__,
                        self.fuse and bool(name) and is_plain_convolution(module) and name not in self.read,
                        look.stride,
                        number,
                        group.square,
                        look.size_offset or (0,) * look.ndim,
                        tuple(before.value(n) for n in given[-look.ndim :]) if given else (),
                        tuple(size),
                        macs_before=macs.get(name, 0),
                    )
                )
        order = list(self.sites)
        drafted.sort(key=lambda site: order.index(site.name))
        plan = Plan(
            model=type(self.model).__name__,
            sites=tuple(drafted),
            resizes=tuple(self.resizes),
            global_poolings=tuple(self.global_poolings),
            left_alone={k: why for k, why in self.left_alone.items() if k not in {r.name for r in self.resizes}},
            macs_before=sum(macs.values()),
            macs_after=0,
            resampling_macs=0,
            options=self.options,
        )
        try:
            with tracing.preserved(self.model):
                apply.edit(self.model, plan, device=torch.device("cpu"))  # strides have values there
                return self._tried(plan)
        except (TraceError, _ElsewhereError) as error:
            if self.fuse and any(site.fused for site in plan.sites):
                self.fuse = False  # its code may ask for the modules that it had
                return None
            raise UsageError(f"the converted model cannot run the example: {error}") from error

    def _tried(self, plan: Plan) -> Plan | None:
        """The plan with its figures, on the model that it has changed; None if more was learned instead."""
        layers = {site.name: apply.layer_of(self.model, site) for site in plan.sites}
        grouped = {name for group in plan.groups if len(group) > 1 for name in group}
        with ExitStack() as stack:
            for site in plan.sites:
                if site.name in grouped:  # sizes are levelled below; these are known to fit
                    stack.enter_context(layers[site.name].pinned(output_size=site.size_before))
            costs = program.Program(self.model, self.example, "macs")
        if missing := [name for name, layer in layers.items() if layer not in {r.layer for r in costs.records}]:
            raise _ElsewhereError(f"{missing[0]} is reached in another way than as a module of its parent")
        if not self._level(plan, costs):
            return None
        leveled = self._with_offsets(plan, costs)
        for site in leveled.sites:
            layers[site.name].size_offset = site.size_offset
        costs = program.Program(self.model, self.example, "macs")
        self._try(leveled)
        return self._with_figures(leveled, costs)

    def _level(self, plan: Plan, costs: program.Program) -> bool:
        """Whether the sites of each group see maps of one size but for a sample or so; what these depend on is tied."""
        seen = self._seen(plan, costs)
        for group in plan.groups:
            first, *others = (seen[name] for name in group)
            for sizes in others:
                for a, b in zip(first, sizes, strict=True):
                    if (a - b).is_Integer:
                        continue
                    upstream = [{s.name for s in (a - b).free_symbols & set(x.free_symbols)} for x in (a, b)]
                    if all(len(names) == 1 for names in upstream):
                        one, other = (self._of_name[names.pop()] for names in upstream)
                        if self.naturals[one] == self.naturals[other] and self.ties.join(one, other):
                            return False
                    for member in group:
                        self._leave(member, f"maps that meet differ by a varying number of samples: {', '.join(group)}")
                    return False
        return True

    def _seen(self, plan: Plan, costs: program.Program) -> dict[str, list[Any]]:
        """The sizes that each site's window sees, in symbols that sites of a group share."""
        name_of = {id(layer): site.name for site in plan.sites for layer in [apply.layer_of(self.model, site)]}
        group_of = {site.name: site.group for site in plan.sites}
        self._of_name: dict[str, Key] = {}
        shared: dict[Any, Any] = {}
        seen: dict[str, list[Any]] = {}
        for record in costs.records:
            name = name_of.get(id(record.layer))
            if name is None:  # learnable before
                continue
            seen.setdefault(name, [n.xreplace(shared) for n in record.sampled])
            for axis, (symbol, value) in enumerate(zip(record.symbols, record.sizes, strict=True)):
                common = f"{group_of[name]}_{axis}_{value}"
                self._of_name.setdefault(common, (name, 0, axis))
                shared[symbol] = sympy.Symbol(common)
        return seen

    def _with_offsets(self, plan: Plan, costs: program.Program) -> Plan:
        seen = self._seen(plan, costs)
        by_name = {site.name: site for site in plan.sites}
        leveled = []
        for site in plan.sites:
            group = [name for name, other in by_name.items() if other.group == site.group]
            more = [
                max(int(seen[name][i] - seen[site.name][i]) + by_name[name].size_offset[i] for name in group)
                for i in range(len(site.stride))
            ]
            leveled.append(replace(site, size_offset=tuple(more)))
        return replace(plan, sites=tuple(leveled))

    def _with_figures(self, plan: Plan, costs: program.Program) -> Plan:
        macs = costs.by_module()
        sizes = {id(record.layer): record.sizes for record in costs.records}
        filled = tuple(
            replace(
                site,
                size_after=sizes[id(apply.layer_of(self.model, site))],
                macs_after=sum(v for k, v in macs.items() if k == site.name or k.startswith(f"{site.name}.")),
            )
            for site in plan.sites
        )
        return replace(plan, sites=filled, macs_after=sum(macs.values()), resampling_macs=costs.resampling_macs())

    def _try(self, plan: Plan) -> None:
        """Run the converted model, as it starts and with strides that have moved, each in its own way."""
        layers = {apply.layer_of(self.model, site): site for site in plan.sites}
        for spread in (0.0, 0.07):
            moved = {}
            for module in self.model.modules():
                if isinstance(module, LearnableStrides):
                    factor = 1 + spread * (layers[module].group + 1) if module in layers else 1.0
                    moved[module] = tuple(s * factor for s in module.initial_strides)
            with program.pinned(moved):
                tracing.run(self.model, self.example, lambda *_: None)


class _ElsewhereError(UsageError):
    """A module that took the place of another is not the one that runs."""


class _Group(NamedTuple):
    names: list[str]
    square: bool


class _Classes:
    """Things that belong together."""

    def __init__(self) -> None:
        self._parent: dict[Any, Any] = {}

    def of(self, item: Any) -> Any:
        while item in self._parent:
            item = self._parent[item]
        return item

    def join(self, a: Any, b: Any) -> bool:
        """Put two together; return whether they were apart."""
        a, b = self.of(a), self.of(b)
        if a == b:
            return False
        self._parent[b] = a
        return True


class _Watched(tuple):  # type: ignore[type-arg]
    """A convolution's stride that tells whether Python code reads it; torch itself reads past these methods."""

    def __new__(cls, stride: tuple[int, ...], name: str, read: set[str]) -> _Watched:
        made = super().__new__(cls, stride)
        made.name, made.read = name, read  # type: ignore[attr-defined]
        return made

    def _note(self) -> None:
        self.read.add(self.name)  # type: ignore[attr-defined]

    def __iter__(self) -> Any:
        self._note()
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self._note()
        return super().__getitem__(index)

    def __eq__(self, other: object) -> bool:
        self._note()
        return super().__eq__(other)

    __hash__ = tuple.__hash__


def _is_leaf(module: nn.Module) -> bool:
    return not module._modules and (type(module).__module__.startswith("torch.nn") or isinstance(module, Traceable))


def _named(key: Any) -> Any:
    return sympy.Symbol(repr(key), integer=True, positive=True)


def _by_name(session: Session) -> dict[Any, Any]:
    return {_named(key): symbol for symbol, key in session.keys.items()}
