"""Counts and comparisons of the benchmark. No times are judged here."""

import random

import pytest
import torch

import diffstride as ds
from diffstride.experiments.benchmark.measure import (
    DRIFT,
    WARMUP,
    Candidate,
    Case,
    StorageMeter,
    alternate,
    compare,
    measure,
    metered,
    peak_bytes,
)

CPU = torch.device("cpu")
N = 1000  # samples of float32 in the tensors of the memory tests


class Copies(torch.autograd.Function):
    """An operator that makes 2 N, keeps N beside its result of N, and makes 5 N in its backward pass."""

    @staticmethod
    def forward(ctx, x):
        twice = torch.cat([x, x])
        ctx.save_for_backward(twice[:N].clone())
        return twice[N:].clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([grad] * 5)[:N].clone()


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (lambda x: x.exp().exp(), 4),  # two results, which backward needs, and their two gradients
        (lambda x: (x + 1) + 1, 2),  # a sum needs nothing of its inputs, and its gradient is that of its result
        (lambda x: x.exp().view(2, -1).mT[1:].detach(), 1),  # views have no storage of their own
        (lambda x: x.detach().exp().add_(1).mul_(2), 1),  # nor what is changed in place
        (lambda x: x.detach().mul_(1), 0),  # there before
        (Copies.apply, 8),  # backward: N of the result, N saved, 5 N, and the gradient
    ],
)
def test_peak_memory_of_known_cases(function, tensors):
    x = torch.zeros(N, requires_grad=True)
    upstream = torch.ones(N)

    def step():
        y = function(x)
        return torch.autograd.grad(y, x, upstream) if y.requires_grad else y

    assert peak_bytes(step, CPU) == tensors * N * x.element_size()


def test_what_only_the_graph_holds_counts_until_it_is_freed():
    x = torch.zeros(N, requires_grad=True)
    with StorageMeter() as meter:
        loss = x.exp().exp().sum()
        assert meter.alive == 2 * N * 4 + 4
        loss.backward()
        del loss
        assert meter.alive == N * 4  # x.grad


class Clock:
    """A clock that the steps advance."""

    now = 0.0
    calls: list

    def __init__(self):
        self.calls = []

    def candidate(self, name, durations):
        left = iter(durations)

        def step():
            self.calls.append(name)
            self.now += next(left)

        return Candidate(step)


def test_every_candidate_has_one_turn_a_round_in_a_new_order():
    repeats, names = 40, ["a", "b", "c"]

    def calls(seed):
        clock = Clock()
        candidates = {name: clock.candidate(name, [1.0] * 100) for name in names}
        alternate(candidates, repeats, random.Random(seed), clock=lambda: clock.now)
        return clock.calls

    rounds = list(zip(*[iter(calls(0))] * len(names), strict=True))
    assert len(rounds) == WARMUP + repeats
    assert all(sorted(turns) == names for turns in rounds)
    for place in range(len(names)):  # each candidate has each place in about a third of the rounds
        assert all(5 <= sum(turns[place] == name for turns in rounds) <= 25 for name in names)
    assert calls(0) == calls(0) != calls(1)


def test_times_are_those_after_the_warm_up():
    clock = Clock()
    warm = [100.0] * WARMUP
    candidates = {"a": clock.candidate("a", [*warm, 1.0, 2.0]), "b": clock.candidate("b", [*warm, 3.0, 5.0])}
    rounds = []
    options = {"clock": lambda: clock.now, "after_round": lambda: rounds.append(1)}
    assert alternate(candidates, 2, random.Random(0), **options) == {"a": [1.0, 2.0], "b": [3.0, 5.0]}
    assert len(rounds) == WARMUP + 2


def test_ratios_are_medians_and_quartiles_of_rounds():
    seconds = {"own": [0.2, 0.2, 1.2], "reference": [0.1, 0.2, 0.4]}
    peaks = {"own": 3 * 2**20, "reference": 2 * 2**20}
    counts = {"own": 7, "reference": 2}
    reference, own = compare(seconds, peaks, counts, "reference", ["own", "reference"])
    assert (reference["name"], own["name"], own["reference"]) == ("reference", "own", "reference")
    assert [reference[key] for key in ("ratio", "ratio_low", "ratio_high")] == [1, 1, 1]
    assert own["ms"] == pytest.approx(200)
    quartiles = [own[key] for key in ("ratio_low", "ratio", "ratio_high")]
    assert quartiles == pytest.approx([1.5, 2, 2.5])  # of 1, 2 and 3
    assert (own["peak_mb"], own["peak_ratio"], own["operations"]) == (3, 1.5, 7)


def test_operations_of_known_steps():
    x = torch.ones(3, requires_grad=True)
    upstream = torch.ones(3)
    assert metered(lambda: x.exp()).operations == 2  # the result is detached, to be saved
    assert metered(lambda: torch.autograd.grad(x * 3.0, x, upstream)).operations == 2


def test_a_case_of_the_host_has_one_thread_and_more_rounds():
    threads, seen, rounds = torch.get_num_threads(), [], []
    torch.set_num_threads(2)
    try:
        work = torch.ones(1 << 18)
        candidate = Candidate(lambda: (seen.append(torch.get_num_threads()), work.exp()))
        case = Case("host", {}, lambda *_: {"own": candidate}, {"own": None}, rounds=3, host=True)
        measure(case, 2, 0, CPU, lambda: rounds.append(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert len(rounds) == WARMUP + 6
    assert seen == [2] + [1] * (WARMUP + 6) + [2, 2]  # the first step shows whether it runs; the last two count


@pytest.mark.parametrize("window", ["outer", "inner"])
@pytest.mark.parametrize("size", [16, 32, 33, 112, 2048])
def test_strides_drift_and_sizes_stay(window, size):
    layer = ds.DiffStride2d((2.0, 3.0), 1, window=window)
    before = layer.output_size(size)
    candidate = Candidate(lambda: None, torch.nn.Sequential(layer))
    rng = random.Random(0)
    seen = set()
    for _ in range(50):
        candidate.drift(rng)
        assert layer.output_size(size) == before
        assert layer.strides == pytest.approx((2.0, 3.0), rel=2 * DRIFT)
        seen.add(layer.strides)
    assert len(seen) > 40


def test_an_operator_that_a_dtype_lacks_is_noted_and_other_errors_are_not_hidden():
    def fail(message):
        raise NotImplementedError(message)

    def case(message):
        candidates = {"fine": Candidate(lambda: torch.zeros(N).exp()), "failing": Candidate(lambda: fail(message))}
        return Case("layers", {"dtype": "float32"}, lambda facts, device: candidates, {"fine": None})

    rows, missing = measure(case("kernel not implemented for 'Half'\nmore"), 2, 0, CPU)
    assert [row["name"] for row in rows] == ["fine"]
    assert [(m["name"], m["error"]) for m in missing] == [("failing", "kernel not implemented for 'Half'")]
    with pytest.raises(NotImplementedError, match="something else"):
        measure(case("something else"), 2, 0, CPU)
