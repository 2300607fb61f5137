"""Caches that a model's code keeps outside of its modules: tracing leaves true values in them, or nothing."""

import functools
from collections import namedtuple
from contextvars import ContextVar

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride import tracing
from diffstride.errors import UsageError

TABLE = None


def table(n):
    return torch.linspace(0, 1, n)


class Holder:
    """An object and a class that keep a tensor."""

    of_class = None

    def __init__(self):
        self.mine = None


DICTIONARY, NESTED, LIST, HOLDER = {}, {}, [], Holder()


def in_dictionary(n):
    return DICTIONARY.setdefault(n, table(n))


def nested(n):
    if n not in NESTED:
        NESTED[n] = [(table(n), {"half": 0.5})]
    return NESTED[n][0][0]


def in_list(n):
    if not LIST:
        LIST.append(table(n))
    return LIST[0]


def in_global_name(n):
    global TABLE
    if TABLE is None:
        TABLE = table(n)
    return TABLE


def in_attribute(n):
    if HOLDER.mine is None:
        HOLDER.mine = table(n)
    return HOLDER.mine


def in_class(n):
    if Holder.of_class is None:
        Holder.of_class = table(n)
    return Holder.of_class


CACHES = {
    "dictionary": in_dictionary, "nested": nested, "list": in_list, "global name": in_global_name,
    "attribute": in_attribute, "class": in_class, "lru_cache": functools.lru_cache(table),
}  # fmt: skip
BY_SIZE = ("dictionary", "nested", "lru_cache")


class Net(nn.Module):
    """A strided convolution times a table of a fixed length, or of its map's length."""

    def __init__(self, cache, by_size=False, fails=False):
        super().__init__()
        self.conv, self.cache, self.by_size, self.fails = nn.Conv1d(1, 4, 5, 2), cache, by_size, fails

    def forward(self, x):
        y = self.conv(x)
        y = y * self.cache(y.shape[-1]) if self.by_size else y * self.cache(7)[-2]
        if self.fails:
            raise RuntimeError("late")
        return y.mean(-1)


def forget():
    global TABLE
    TABLE = HOLDER.mine = Holder.of_class = None
    for container in (DICTIONARY, NESTED, LIST):
        container.clear()
    CACHES["lru_cache"].cache_clear()


CASES = [(name, False) for name in CACHES] + [(name, True) for name in BY_SIZE]


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize(("name", "by_size"), CASES, ids=[f"{n}{', by size' * b}" for n, b in CASES])
def test_models_compute_after_tracing_what_they_computed_before(name, by_size, filled):
    forget()
    torch.manual_seed(0)
    model, x = Net(CACHES[name], by_size), torch.randn(2, 1, 64)
    y = model.conv(x)
    expected = (y * (table(y.shape[-1]) if by_size else table(7)[-2])).mean(-1)
    if filled:
        model(x)
    ds.plan(model, x)
    assert type(model(x)) is torch.Tensor
    torch.testing.assert_close(model(x), expected)
    forget()
    whole = nn.Sequential(ds.DiffStride1d(1.0, bounds=(1.0, 1.0), window="inner"), model)
    ds.CostModel(whole, x).minimum()
    torch.testing.assert_close(model(x), expected)
    forget()
    failing = Net(CACHES[name], by_size, fails=True)
    with pytest.raises(UsageError, match="late"):
        ds.plan(failing, x)
    torch.testing.assert_close(model(x), expected)


Pair = namedtuple("Pair", "length kept")


def ramp(n):
    return torch.full((n,), 0.5).cumsum(0) / n


def variable(value):
    made = ContextVar("made")
    made.set(value)
    return made


def module(value):
    made = nn.Module()
    made.register_buffer("kept", value)
    return made


KEPT = {  # containers of a table, and how to get it out of them
    "named tuple": (lambda value: Pair(len(value), value), lambda kept: kept.kept[: kept.length]),
    "context variable": (variable, ContextVar.get),
    "partial": (lambda value: functools.partial(torch.mul, value), lambda kept: kept(1.0)),
    "buffer": (module, lambda kept: kept.kept),
    "view": (lambda value: value.view(-1, 1), lambda kept: kept[:, 0]),
}


class Once:
    """A table that is made once, and a flag that it is there."""

    def __init__(self, put, get):
        self.put, self.get, self.ready = put, get, False

    def __call__(self, y):
        if not self.ready:
            self.kept, self.ready = self.put(ramp(y.shape[-1])), True
        return self.get(self.kept)


class Growing:
    """A table that is made anew when it is too short."""

    length = 0

    def __call__(self, y):
        if y.shape[-1] > self.length:
            self.kept, self.length = y.new_ones(y.shape[-1]).cumsum(0), y.shape[-1]
        return self.kept[: y.shape[-1]] / 2 / y.shape[-1]


class Two(nn.Module):
    """Two strided convolutions with a table between them."""

    def __init__(self, table):
        super().__init__()
        self.one, self.two, self.table = nn.Conv1d(1, 4, 5, 2), nn.Conv1d(4, 4, 3, 2), table

    def forward(self, x):
        y = self.one(x)
        return self.two(y * self.table(y)).mean(-1)


@pytest.mark.parametrize("kind", [*KEPT, "growing"])
def test_a_table_that_is_kept_is_that_of_a_run_on_the_example(kind):
    torch.manual_seed(0)
    table = Growing() if kind == "growing" else Once(*KEPT[kind])
    model, x = Two(table), torch.randn(2, 1, 64)
    y = model.one(x)
    expected = model.two(y * ramp(30)).mean(-1)
    plan = ds.plan(model, x)
    assert [site.name for site in plan.sites] == (["one", "two"] if kind == "growing" else ["two"])
    assert (type(table.length) is int) if kind == "growing" else table.ready
    torch.testing.assert_close(model(x), expected)
    ds.CostModel(nn.Sequential(ds.DiffStride1d(1.0, bounds=(1.0, 1.0), window="inner"), model), x).minimum()
    torch.testing.assert_close(model(x), expected)


def test_sizes_that_are_kept_alone_become_numbers():
    sizes = {}

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 4, 5, 2)

        def forward(self, x):
            y = self.conv(x)
            sizes.update(list=[y.shape[-1]], shape=y.shape, half=(y.shape[-1] // 2, None))
            return y.mean(-1)

    ds.plan(Noting(), torch.randn(2, 1, 64))
    n = sizes["list"][0]  # of the last size that was tried
    assert {type(n), type(sizes["shape"][-1]), type(sizes["half"][0])} == {int}
    assert sizes == {"list": [n], "shape": torch.Size([2, 4, n]), "half": (n // 2, None)}
    assert abs(n - 30) <= 1


class OfInputs:
    """A table of the inputs that is made once."""

    def __init__(self, get, put):
        self.get, self.put, self.mine, self.list, self.dictionary = get, put, None, [], {}

    def __call__(self, y):
        if self.get(self) is None:
            table = torch.zeros(y.shape[-1])
            table[:2] = y.detach()[0, 0, :2]
            self.put(self, table)
        return self.get(self)


PLACES = {
    "attribute": (lambda holder: holder.mine, lambda holder, table: setattr(holder, "mine", table)),
    "list": (lambda holder: next(iter(holder.list), None), lambda holder, table: holder.list.append(table)),
    "tuple": (
        lambda holder: holder.dictionary.get("pair", (None,))[0],
        lambda holder, table: holder.dictionary.update(pair=(table, 1.0)),
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_table_of_the_inputs_is_removed(place):
    """Such a table has no value in a trace; the model makes it anew."""
    table = OfInputs(*PLACES[place])
    model, x = Two(table), torch.randn(2, 1, 64)
    y = model.one(x)
    ds.plan(model, x)
    assert (table.mine, table.list, table.dictionary) == (None, [], {})
    scale = torch.zeros(30)
    scale[:2] = y.detach()[0, 0, :2]
    torch.testing.assert_close(model(x), model.two(y * scale).mean(-1))


def test_a_table_that_cannot_be_made_is_removed():
    """Shapes alone say nothing of an operation that fails for values."""
    kept = {}

    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv1d(1, 4, 5, 2), Growing()

        def forward(self, x):
            y = self.conv(x)
            kept.setdefault("chosen", ramp(y.shape[-1]).index_select(0, torch.tensor([1000])))
            return (y * self.scale(y)).mean(-1)

    model = Choosing()
    tracing.run(model, tracing.ExampleInputs(torch.randn(2, 1, 64)), lambda *_: None, symbolic_inputs=True)
    assert not kept
    torch.testing.assert_close(model.scale.kept, torch.arange(1.0, 31.0))


def test_tensors_outside_of_the_model_are_not_written_to():
    calls, steps = torch.zeros(3), [torch.zeros(())]

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 4, 5, 2)

        def forward(self, x):
            calls.add_(torch.ones(3))
            calls[1:].mul_(2)
            steps[0] += 1
            steps[0].view(1).copy_(x.mean())
            return self.conv(x) * (1 + calls[0])

    ds.plan(Counting(), torch.randn(2, 1, 64))
    assert calls.tolist() == [0, 0, 0]
    assert [step.item() for step in steps] == [0]


def test_a_cached_constant_that_was_written_to_is_not_kept():
    cache = {}

    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv1d(1, 4, 5, 2), nn.Parameter(torch.tensor([2.0]))

        def forward(self, x):
            if "table" not in cache:
                cache["table"] = torch.zeros(2, 2)
                cache["table"][1:].add_(self.scale.detach())
            return self.conv(x) * cache["table"][1, 0]

    model, x = Filled(), torch.randn(2, 1, 64)
    ds.plan(model, x)
    torch.testing.assert_close(model(x), model.conv(x) * 2)
    assert cache["table"].tolist() == [[0, 0], [2, 2]]


def test_a_plan_follows_sizes_through_the_keys_of_caches():
    """The map's length is a key and a size at once: both are symbols, so that the plan lets it change."""

    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.known = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), {}

        def forward(self, x):
            y = self.one(x)
            h, w = y.shape[-2:]
            scale = 2.0 if len({h, w}) == 1 else 1.0
            z = self.two(y * self.known.setdefault((h, w), torch.ones(h, w))) * scale
            return z.mean((2, 3)) * {16: 1.0}.get(h, 3.0)

    model, x = Squares(), torch.randn(1, 3, 32, 32)
    expected = model(x)
    plan = ds.convert(model, x)
    assert plan.groups == [["one"], ["two"]]
    assert [site.size_after for site in plan.sites] == [(16, 16), (8, 8)]
    assert list(model.known) == [(16, 16)]
    assert model(x).shape == expected.shape
    with torch.no_grad():
        model.one.stride.copy_(torch.tensor([2.5, 2.0]))
    model(x)
    assert list(model.known) == [(16, 16), (13, 16)]
