"""Plans from damaged files: they are refused in one line and change nothing, or the model runs."""

import copy
import json
import resource

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride.errors import UsageError
from tests.helpers.states import record, same

X = torch.randn(1, 3, 32, 32)


class Net(nn.Module):
    """Sites of every kind: a group with offsets, an upsampling that follows, a pooling of the whole map."""

    def __init__(self):
        super().__init__()
        self.main, self.short = nn.Conv2d(3, 4, 3, 2, 1), nn.AvgPool2d(2, 2, ceil_mode=True)
        self.lift, self.pool = nn.Conv2d(3, 4, 1), nn.MaxPool2d(2)
        self.up, self.head, self.last = nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, 1), nn.AvgPool2d(16)

    def forward(self, x):
        x = self.main(x) + self.lift(self.short(x))
        return self.last(self.head(torch.cat([x, self.up(self.pool(x))], 1))).flatten(1)


def build():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    ds.plan(build(), X, upsample=True).save(path)
    return json.loads(path.read_text())


def places(value, here=()):
    """Yield the path to every value in a document."""
    yield here
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*here, key))


def at(document, place):
    for key in place:
        document = document[key]
    return document


DAMAGE = {
    "null": None, "huge": 10**9, "fraction": 1.5, "true": True, "text": "elsewhere", "nested": [[[]]],
    "mapping": {"a": 1}, "not a number": float("nan"), "gone": "gone", "twice": "twice",
}  # fmt: skip


def damaged(document, place, kind):
    document = copy.deepcopy(document)
    if not place:
        return DAMAGE[kind]
    owner, key = at(document, place[:-1]), place[-1]
    if kind == "gone":
        del owner[key]
    elif kind == "twice" and isinstance(owner, list):
        owner.append(owner[key])
    elif kind != "twice":
        owner[key] = DAMAGE[kind]
    return document


def outcome(model, path):
    """Do what a user does with a plan: load, show, apply, run and train a step. Return the output, or the refusal."""
    try:
        plan = ds.Plan.load(path)
        str(plan)
        plan.apply(model)
    except UsageError as error:
        return error
    y = model(X)
    y.sum().backward()
    return y.detach()


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_plan_changes_nothing_or_makes_a_model_that_runs(saved, kind, tmp_path):
    path, refused, harmless = tmp_path / "plan.json", 0, 0
    for place in places(saved):
        path.write_text(json.dumps(damaged(saved, place, kind)))
        model = build()
        before = record(model)
        found = outcome(model, path)
        if isinstance(found, UsageError):
            assert "\n" not in str(found), place
            assert same(record(model), before), place
            refused += 1
        else:
            assert found.shape == (1, 4), place
            assert found.isfinite().all(), place
            harmless += 1
    assert refused > 0
    assert kind in ("twice", "gone") or refused > harmless


def test_offsets_beyond_all_reason_are_refused_before_they_take_memory(saved, tmp_path):
    document = copy.deepcopy(saved)
    document["sites"][0]["size_offset"] = [10**9, 10**9]
    (tmp_path / "plan.json").write_text(json.dumps(document))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal = str(outcome(build(), tmp_path / "plan.json"))
    assert refusal == "size_offset of main must be from 0 to [5, 5], got (1000000000, 1000000000)"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def test_an_interruption_leaves_the_model_as_it_was(saved, tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text(json.dumps(saved))
    plan, model = ds.Plan.load(tmp_path / "plan.json"), build()
    before = record(model)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ds.nn.resize.ResizeTo, "follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.apply(model)
    assert same(record(model), before)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "null", "{}", '"plan"', "\x00", "é"])
def test_files_that_are_no_plans_are_refused_in_one_line(text, tmp_path):
    (tmp_path / "plan.json").write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=r"^path must be a plan that Plan\.save wrote, got [^\n]*$"):
        ds.Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("figure", ["macs_before", "macs_after", "resampling_macs", "macs_least"])
def test_a_plan_without_one_of_its_figures_is_refused(saved, figure, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(damaged(saved, (figure,), "gone")))
    with pytest.raises(UsageError, match=figure):
        ds.Plan.load(path)
