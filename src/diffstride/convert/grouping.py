"""Second phase of a plan: the downsamplings that must have one stride, because their outputs meet.

Nothing is known about the model's code, but it can be run with symbols for sizes (`diffstride.tracing`). Each
candidate's output gets symbols of its own. For the block with two branches of `candidates`, on 32 samples:

    y = mix(conv(x) + pool(x))    # conv: size c, pool: size p
    return down(y).mean(-1)       # down: size d

The search runs the model again and again, and learns from the first comparison of sizes that fails:

    run 1: c = 16, p = 16, d = 8     the model's own sizes; `+` asks c == p, which is true
    run 2: c = 35, p = 37, d = 23    `+` asks c == p, which is false and was true: conv and pool are tied
    run 3: c = 37, p = 37, d = 23    nothing fails
    groups: [conv, pool], [down]     one stride and one size each

The sizes of later runs are `2 n + prime`, where `n` is the size in run 1, with another prime for each set of tied
sizes. So equal sizes are no coincidence. If a comparison fails that is no equality of two such sizes (`linear` asks
`8 c == 128`), the sizes involved cannot change, and their sites are left alone. The run that succeeds in the end shows
that the model works at other sizes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import sympy
from sympy import Expr, Symbol
from torch import Tensor, nn

from diffstride import tracing
from diffstride.convert.candidates import Candidates
from diffstride.convert.records import INPUT, Resize
from diffstride.cost import stand_ins
from diffstride.errors import UsageError
from diffstride.nn._tracers import Traceable
from diffstride.nn.conv import is_plain_convolution
from diffstride.nn.learnable import LearnableStrides
from diffstride.tracing import ExampleInputs, Forward, Session, TraceError, described
from diffstride.tracing._twins import tensors_in

Key = tuple[str, int, int]
"""A size of an output: module, number of the call, axis. Calls on inputs of one size have one number."""


class Group(NamedTuple):
    """Sites that share a stride."""

    names: list[str]
    square: bool
    """True: sizes of different axes must agree, so all axes share a stride too."""
    multiple: int
    """The number of which their sizes are multiples."""


class Ties:
    """Sets of things that belong together."""

    def __init__(self) -> None:
        self._parents: dict[Any, Any] = {}

    def of(self, item: Any) -> Any:
        """Return the item that represents the set of `item`."""
        while item in self._parents:
            item = self._parents[item]
        return item

    def join(self, a: Any, b: Any) -> bool:
        """Join two sets. Return whether they were apart."""
        a, b = self.of(a), self.of(b)
        if a == b:
            return False
        self._parents[b] = a
        return True


class Search:
    """The search for groups, and what it has learned so far.

    Args:
        model: the model to convert.
        example: the arguments of its call.
        candidates: what could be converted. The search leaves alone what cannot.
        follow_upsampling: let upsampling be followed by resizing to the size that its output meets.
        multiple: the number of which all sizes of sites are multiples.
    """

    def __init__(
        self,
        model: nn.Module,
        example: ExampleInputs,
        candidates: Candidates,
        *,
        follow_upsampling: bool,
        multiple: int,
    ) -> None:
        self.model, self.example, self.candidates = model, example, candidates
        self.follow_upsampling = follow_upsampling
        self.multiples: dict[str, int] = defaultdict(lambda: multiple)
        """The numbers of which sizes must be multiples, by site."""
        self.ties = Ties()
        """The sizes that must agree."""
        self.sizes: dict[Key, int] = {}
        """The sizes that the model has on the example inputs."""
        self.links: dict[Key, Expr] = {}
        """The sizes that upsamplings must have, in symbols named by keys."""
        self.constant: dict[str, dict[int, int]] = {}
        """The sizes that later modules need of a map, by module and axis."""
        self._own_sizes: dict[tuple[str, int], Expr] = {}
        """The sizes that such a map has before it is resized."""
        self._order: list[str] = []
        """The modules in the order of their first calls."""
        self.batched: list[int] = []
        """Indices of the outputs whose first axis is the batch."""
        self.resizes: list[Resize] = []
        self.strides_read: set[str] = set()
        """Convolutions whose `stride` the model's code reads. They must stay what they are."""
        self._learned = {m: stand_ins.raw_strides_of(m) for m in model.modules() if isinstance(m, LearnableStrides)}

    def start(self) -> Session:
        """Run the model at its own sizes. Keep the candidates that run."""
        session = self._run({})
        if INPUT in self.candidates.sites:
            self.candidates.find_first_convolution(session)
            session = self._run({})
        self._order = [INPUT, *dict.fromkeys(call.module for call in session.calls)]
        self.candidates.keep_usable(session)
        names = {*self.candidates.sites, *self.candidates.upsamplings}
        self.sizes = {key: int(session.hints[s]) for s, key in session.keys.items() if key[0] in names}
        batch = next((len(t) for t in tensors_in((self.example.args, self.example.kwargs)) if t.ndim), None)
        self.batched = [i for i, shape in enumerate(session.outputs) if shape and shape[0] == batch]
        return session

    def groups(self) -> list[Group]:
        """Return the sites that must share a stride.

        Raises:
            UsageError: nothing can be converted, or the model works at its own sizes only.
        """
        while True:
            self._run_at_other_sizes()
            groups = self._tied_sites()
            if self._fix_alike(groups):
                continue
            names = next((group.names for group in groups if not self._has_one_stride(group)), None)
            if names is None:
                return groups
            shown = ", ".join(f"{name} {self.candidates.sites[name].stride}" for name in names)
            for name in names:
                self.candidates.leave(name, f"outputs of different strides meet: {shown}")

    def _run_at_other_sizes(self) -> None:
        """Run until that succeeds, and learn from every failure."""
        while True:
            self.candidates.check_not_empty()
            keys = [key for key in self.sizes if self._is_free(key)]
            left = {_named(key) for key in self.sizes if not self._is_free(key)}  # whose sizes are no symbols any more
            self.links = {key: size for key, size in self.links.items() if left.isdisjoint(size.free_symbols)}
            number = {self.ties.of(key): i for i, key in enumerate(keys)}
            try:
                session = self._run({key: self._trial_size(key, number[self.ties.of(key)]) for key in keys})
            except TraceError as error:
                self._learn(error)
            else:
                if self._find_sources(session) and self._keeps_batch(session):
                    self._note_constant_sizes(session)
                    return

    def _is_free(self, key: Key) -> bool:
        return self.candidates.is_free(key[0], key[2])

    def _trial_size(self, key: Key, number: int) -> int:
        """Return a size for a trial: another one for each number, so that equal sizes are no coincidence."""
        tied = [other[0] for other in self.sizes if self.ties.of(other) == self.ties.of(key)]
        multiple = math.lcm(*(self.multiples[name] for name in tied))
        return multiple * (2 * self.sizes[key] // multiple + int(sympy.prime(number + 2)))

    def _run(self, values: dict[Key, int]) -> Session:
        """Run the model with symbols for the sites' sizes, of these values. Other sizes are those of the model."""
        with stand_ins.pinned(self._learned):
            return tracing.run(
                self.model,
                self.example,
                lambda session, name, module: self._forward(session, name, module, values),
                symbolic_inputs=True,
            )

    def _forward(self, session: Session, name: str, module: nn.Module, values: dict[Key, int]) -> Forward | None:
        """Return what runs in place of a module's forward; None for its own."""
        if isinstance(module, LearnableStrides):
            return stand_ins.stand_in_at_current_strides(session, module)
        if (stand_in := stand_ins.stand_in_for_fixed(module)) is not None:
            return stand_in
        if name in self.candidates.global_poolings:
            ndim = self.candidates.ndim(name)
            return lambda x: x.new_empty([*x.shape[:-ndim], *[1] * ndim])
        follows = self.follow_upsampling and name in self.candidates.upsamplings
        site = self.candidates.sites.get(name)
        at_input = name == self.candidates.first_convolution and INPUT in self.candidates.sites
        constant = self.constant.get(name, {})
        if site is None and not follows and not at_input and not constant:
            return None
        if is_plain_convolution(module) and site is not None and not site.kept:
            module.stride = _WatchedStride(module.stride, name, self.strides_read)  # type: ignore[assignment, arg-type]
        original = module.forward
        calls: dict[str, dict[Any, int]] = {INPUT: {}, name: {}}

        def resized(place: str, x: Tensor, ndim: int, shape: Any) -> Tensor:
            """Return an empty tensor like `x` with the sizes of a site, for a call of the module on this shape."""
            call = calls[place].setdefault(shape[-ndim:], len(calls[place]))
            sizes: list[tracing.session.Size] = []
            for axis, size in enumerate(x.shape[-ndim:]):
                key = (place, call, axis)
                if place == name and axis in constant:
                    self._own_sizes[name, axis] = tracing.expression(size)
                    sizes.append(constant[axis])
                elif not self._is_free(key):
                    sizes.append(size)
                elif key in self.links:
                    symbols = {_named(k): symbol for symbol, k in session.keys.items()}
                    sizes.append(session.sized(self.links[key].xreplace(symbols)))
                else:
                    sizes.append(session.size(key, values.get(key, session.value(tracing.expression(size)))))
            return x.new_empty([*x.shape[:-ndim], *sizes])

        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            shape = tracing.shape(inputs[0]) if inputs else None
            if at_input and args and isinstance(args[0], Tensor):
                ndim = self.candidates.sites[INPUT].ndim
                args = resized(INPUT, args[0], ndim, shape), *args[1:]
            output = original(*args, **kwargs)
            if (site is None and not follows and not constant) or shape is None or not isinstance(output, Tensor):
                return output
            ndim = self.candidates.ndim(name) or output.ndim - 2
            if output.ndim < ndim:
                return output
            return resized(name, output, ndim, shape)

        return forward

    def _learn(self, error: TraceError) -> None:
        """Learn from a run that failed: tie two sizes, link one to others, or leave sites alone.

        Raises:
            UsageError: no site is the cause.
        """
        session, candidates = error.session, self.candidates
        original = {s: sympy.Integer(self.sizes.get(key, session.hints[s])) for s, key in session.keys.items()}
        for relation in reversed(session.relations):
            expression = session.expanded(relation.expression)
            if sympy.sympify(expression.xreplace(original)) != relation.truth:
                break
        else:
            raise UsageError(
                f"model must work at other sizes than those of the example: {error}: leave out with exclude= what must "
                "keep its size"
            ) from error
        if isinstance(expression, sympy.And):  # `stack` asks for several equations at once
            failing = (part for part in expression.args if part.xreplace(session.hints) == sympy.false)
            expression = next(failing, expression)
        left, right = (*expression.args, None, None)[:2]
        if (pair := self._equal_sizes(left, right, session)) is not None:
            self._tie(*pair)
            return
        for side, other in ((left, right), (right, left)):
            key = session.keys.get(side)
            if self.follow_upsampling and key is not None and key[0] in candidates.upsamplings:
                self.links[key] = other.xreplace({s: _named(k) for s, k in session.keys.items()})
                return

        def are_answered_as_before(multiples: Mapping[Symbol, int]) -> bool:
            return all(sympy.sympify(expression.xreplace(n)) != relation.truth for n in trial_sizes(multiples))

        keys = {s: session.keys[s] for s in expression.free_symbols}
        if all(key[0] in candidates.sites for key in keys.values()) and self.raise_multiples(
            keys, are_answered_as_before
        ):
            return
        bound = [key for key in keys.values() if key[0] in candidates.sites]
        if not bound:
            raise UsageError(f"model must work at other sizes than those of the example: {error}") from error
        # The last site keeps its stride. Then its map follows from those before it, or later modules need it as it is.
        last = max((key[0] for key in bound), key=self._order.index)
        axes = {key[2] for key in bound if key[0] == last}
        if all(key[0] == last for key in keys.values()):
            self._keep_constant(last, axes)
        where = f"{described(self.model, relation.module)}, at {relation.function or 'its own code'}"
        advise = candidates.upsamplings and not self.follow_upsampling
        advice = " (upsample=True lets the upsampling follow)" if advise else ""
        needed = f", which needs {right} features" if relation.function == "linear" and right.is_Integer else ""
        candidates.fix(last, axes, f"its map must keep its size for {where}{needed}{advice}")

    def _keep_constant(self, name: str, axes: Iterable[int]) -> None:
        """Let a map be resized to the size that it has on the example, whatever sites before it do."""
        for axis in axes:
            sizes = {size for key, size in self.sizes.items() if key[0] == name and key[2] == axis}
            if len(sizes) == 1 and name != INPUT:
                self.constant.setdefault(name, {})[axis] = sizes.pop()

    def _note_constant_sizes(self, session: Session) -> None:
        """Note the maps that are resized to a constant size, if sites before them can change it."""
        for name, sizes in self.constant.items():
            ndim = self.candidates.ndim(name)
            learned = [
                axis
                for axis in sizes
                for symbol in session.expanded(self._own_sizes[name, axis]).free_symbols
                if session.keys[symbol][0] in self.candidates.sites
            ]
            if learned:
                size = tuple(sizes[axis] if axis in learned else None for axis in range(ndim))
                kind = type(self.candidates.modules[name]).__name__
                self.resizes.append(Resize(name=name, kind=kind, source="", ndim=ndim, size=size, kept=True))

    def raise_multiples(self, keys: Mapping[Symbol, Key], suffices: Callable[[Mapping[Symbol, int]], bool]) -> bool:
        """Find the least multiples of sizes that suffice, and use them from now on.

        The sizes that the model has are such multiples, so that it can start with these.

        Args:
            keys: the sizes by symbol.
            suffices: a function of the multiples by symbol.

        Returns:
            False where there are none.
        """
        present = {symbol: self.multiples[key[0]] for symbol, key in keys.items()}
        names = {key[0] for key in keys.values()}
        common = math.gcd(*(size for key, size in self.sizes.items() if key[0] in names))
        for factor in (n for n in range(2, _LARGEST_MULTIPLE + 1) if common % n == 0):
            raised = {symbol: math.lcm(multiple, factor) for symbol, multiple in present.items()}
            if raised != present and suffices(raised):
                for symbol, key in keys.items():
                    self.multiples[key[0]] = raised[symbol]
                return True
        return False

    def _equal_sizes(self, left: Any, right: Any, session: Session) -> tuple[Key, Key] | None:
        """Return the sizes of two sites that must agree, if an equation requires just that."""
        symbols = [list(getattr(side, "free_symbols", ())) for side in (left, right)]
        if [len(found) for found in symbols] != [1, 1]:
            return None
        (a,), (b,) = symbols
        keys = session.keys[a], session.keys[b]
        if all(key[0] in self.candidates.sites for key in keys) and left.xreplace({a: b}) == right:
            return keys
        return None

    def _tie(self, one: Key, other: Key) -> None:
        """Tie two sizes, and those of the other axes where they were equal, because the sites share their strides."""
        self.ties.join(one, other)
        if one[2] == other[2]:
            for axis in range(self.candidates.sites[one[0]].ndim):
                a, b = (*one[:2], axis), (*other[:2], axis)
                if self.sizes.get(a) == self.sizes.get(b):
                    self.ties.join(a, b)

    def _keeps_batch(self, session: Session) -> bool:
        """Return whether outputs have the batch of the inputs. If not, leave alone the sites on which it depends.

        Code that reshapes to `(-1, features)` runs at other sizes too, wherever these happen to fit, with another
        batch.
        """
        for i in self.batched:
            first = session.expanded(session.outputs[i][0]) if i < len(session.outputs) else sympy.Integer(0)
            names = {session.keys[symbol][0] for symbol in first.free_symbols}
            bound = [name for name in self.candidates.sites if name in names]
            for name in bound:
                self.candidates.leave(name, "the batch of the model's output depends on the size of its map")
            if bound:
                return False
        return True

    def _find_sources(self, session: Session) -> bool:
        """Find modules whose outputs have the sizes that upsamplings must take. Return False if one has none."""
        self.resizes = []
        called = [call.module for call in session.calls]
        for name in {key[0]: None for key in self.links}:
            at = called.index(name)
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
                and called.count(call.module) == 1
            ]
            if not sources:  # it stays as it is, and so do the sites that it binds
                self.candidates.upsamplings.remove(name)
                self.links = {key: size for key, size in self.links.items() if key[0] != name}
                reason = "it must take a size that no module's output has (one that is called once)"
                self.candidates.left_alone[name] = reason
                return False
            # `torch.fx` writes out other modules than leaves, without their hooks.
            leaves = (source for source in sources if _is_leaf(self.candidates.modules[source]))
            kind = type(self.candidates.modules[name]).__name__
            kept = any(site.kept for site in self.candidates.sites.values())
            self.resizes.append(Resize(name=name, kind=kind, source=next(leaves, sources[0]), ndim=ndim, kept=kept))
        return True

    def _tied_sites(self) -> list[Group]:
        """Return the sites in groups by the ties of their sizes."""
        joined, square = Ties(), set()
        first: dict[Key, Key] = {}
        for key in filter(self._is_free, self.sizes):
            if key[0] in self.candidates.sites:
                other = first.setdefault(self.ties.of(key), key)
                joined.join(other[0], key[0])
                if other[2] != key[2]:
                    square.add(key[0])
        groups: dict[str, list[str]] = {}
        for name in self.candidates.sites:
            groups.setdefault(joined.of(name), []).append(name)
        return [
            Group(names, not square.isdisjoint(names), math.lcm(*(self.multiples[name] for name in names)))
            for names in groups.values()
        ]

    def _fix_alike(self, groups: list[Group]) -> bool:
        """Fix the axes that one site of a group must keep for all of them. Return whether there were some."""
        sites, fixed = self.candidates.sites, False
        for group in groups:
            axes = {axis: name for name in group.names for axis in sites[name].fixed_axes}
            for name in group.names:
                if missing := {*axes, *(range(sites[name].ndim) if axes and group.square else ())} - {
                    *sites[name].fixed_axes
                }:
                    reason = f"its map must keep its size like that of {next(iter(axes.values()))}"
                    self.candidates.fix(name, missing, reason)
                    fixed = True
        return fixed

    def _has_one_stride(self, group: Group) -> bool:
        strides = {self.candidates.sites[name].initial_strides for name in group.names}
        return len(strides) == 1 and not (group.square and len(set(*strides)) > 1)


_LARGEST_MULTIPLE = 64


def trial_sizes(multiples: Mapping[Symbol, int]) -> Iterator[dict[Symbol, int]]:
    """Yield sizes by symbol that are these multiples and grow at different rates."""
    ordered = sorted(multiples.items(), key=str)
    for step in range(8):
        yield {symbol: m * (6 + 5 * i + step * (i + 1)) for i, (symbol, m) in enumerate(ordered)}


class _WatchedStride(tuple):  # type: ignore[type-arg]
    """A convolution's stride that notes whether Python code reads it. Torch itself reads past these methods."""

    def __new__(cls, stride: tuple[int, ...], name: str, read: set[str]) -> _WatchedStride:
        made = super().__new__(cls, stride)
        made.note = lambda: read.add(name)  # type: ignore[attr-defined]
        return made

    def __iter__(self) -> Any:
        self.note()  # type: ignore[attr-defined]
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self.note()  # type: ignore[attr-defined]
        return super().__getitem__(index)

    def __eq__(self, other: object) -> bool:
        self.note()  # type: ignore[attr-defined]
        return super().__eq__(other)

    __hash__ = tuple.__hash__


def _is_leaf(module: nn.Module) -> bool:
    return not module._modules and (type(module).__module__.startswith("torch.nn") or isinstance(module, Traceable))


def _named(key: Key) -> Symbol:
    """Return a symbol that stands for a size in every session."""
    return sympy.Symbol(repr(key), integer=True, positive=True)
