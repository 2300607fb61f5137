"""Time and peak memory of candidates that take turns.

All candidates of a case run once in every round, in a new random order, after rounds of warm-up. A ratio is the
median of those within each round, and its spread is given by their quartiles. Strides move a little before every
step, as they do in training, so that nothing that depends on them can be reused.
"""

from __future__ import annotations

import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARMUP = 3
# The relative movement of strides before a step: too little for another output size on axes of some thousand samples.
DRIFT = 2e-4
CPU = torch.device("cpu")

Row = dict[str, Any]


class Candidate:
    """A step to measure.

    Args:
        step: one forward and backward pass.
        module: the module whose strides move before each step.
    """

    def __init__(self, step: Callable[[], object], module: nn.Module | None = None) -> None:
        self.step = step
        parameters = [] if module is None else list(module.named_parameters())
        strides = [p for name, p in parameters if name.rpartition(".")[-1] in ("stride", "strides")]
        self._start = [(stride, stride.tolist()) for stride in strides]
        # Sizes are rounded down with the outer window, and up with the inner one. A start at the edge of a size keeps
        # its size if strides shrink from there in the first case, and grow in the second.
        inner = module is not None and any(getattr(m, "window", None) == "inner" for m in module.modules())
        self._reach = DRIFT if inner else -DRIFT

    def drift(self, rng: random.Random) -> None:
        """Move the strides to a random place near their start."""
        with torch.no_grad():
            for stride, start in self._start:
                stride.copy_(torch.tensor([s * (1 + self._reach * rng.random()) for s in start]))


class Case(NamedTuple):
    """Candidates that are measured together.

    Attributes:
        suite: name of the suite.
        facts: the shape, the dtype and what else distinguishes the case.
        make: makes the candidates from the facts, on a device, just before they are measured.
        comparisons: names that are compared with a reference, by its name; None for all of them.
        rounds: factor on the number of rounds, for steps so short that single ones vary.
        host: measure the processor time of one thread, in place of the time that passes.
    """

    suite: str
    facts: dict[str, Any]
    make: Callable[[dict[str, Any], torch.device], dict[str, Candidate]]
    comparisons: Mapping[str, Sequence[str] | None]
    rounds: int = 1
    host: bool = False


class StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A count of the operations that PyTorch dispatches, and of the bytes of tensor storage that they make.

    Bytes count until they are freed: `alive` now, `peak` at most.

    Backward passes are counted too where they run in the same thread, as they do on a CPU. Memory that a kernel
    allocates for its own use and frees again is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.alive = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run and count an operation, and the storages of its results that are new."""
        self.operations += 1
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._counted:
                self._counted.add(key)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                # PyTorch keeps the Python object of a storage for as long as anything, also in C++, holds the storage.
                weakref.finalize(storage, self._freed, key, size).atexit = False
        return result

    def _freed(self, key: int, size: int) -> None:
        self._counted.remove(key)
        self.alive -= size


def _storages(tree: Any) -> Iterator[Any]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def metered(step: Callable[[], object]) -> StorageMeter:
    """Return the counts of a step."""
    meter = StorageMeter()
    with meter:
        step()
    return meter


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the bytes of tensors alive at the peak of a step, above those alive before it."""
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronise(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    return metered(step).peak


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Let PyTorch use some threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU to end its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    candidates: Mapping[str, Candidate],
    repeats: int,
    rng: random.Random,
    *,
    device: torch.device = CPU,
    after_round: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of every candidate in each round after the warm-up, on a device; the order is random."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(WARMUP + repeats):
        rng.shuffle(order)
        for name in order:
            candidates[name].drift(rng)
            synchronise(device)
            start = clock()
            candidates[name].step()
            synchronise(device)
            seconds[name].append(clock() - start)
        after_round()
    return {name: values[WARMUP:] for name, values in seconds.items()}


def ratios(own: Sequence[float], reference: Sequence[float]) -> Row:
    """Return the median of some seconds in ms, and the quartiles of their ratios to a reference within each round."""
    by_round = [a / b for a, b in zip(own, reference, strict=True)]
    low, ratio, high = statistics.quantiles(by_round, n=4, method="inclusive")
    return {"ms": 1e3 * statistics.median(own), "ratio": ratio, "ratio_low": low, "ratio_high": high}


def compare(
    seconds: Mapping[str, Sequence[float]],
    peaks: Mapping[str, int],
    counts: Mapping[str, int],
    reference: str,
    names: Iterable[str],
) -> list[Row]:
    """Return a row for the reference, then one for each of the others.

    A row has the time, the memory, their ratios to the reference, and the number of operations.
    """
    return [
        {
            "name": name,
            **ratios(seconds[name], seconds[reference]),
            "reference": reference,
            "peak_mb": peaks[name] / 2**20,
            "peak_ratio": peaks[name] / peaks[reference],
            "operations": counts[name],
        }
        for name in [reference, *(name for name in names if name != reference)]
    ]


def measure(
    case: Case, repeats: int, seed: int, device: torch.device, after_round: Callable[[], object] = lambda: None
) -> tuple[list[Row], list[Row]]:
    """Return the rows of a case, and a row for each candidate that does not run in its dtype."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    candidates, missing = {}, []
    for name, candidate in case.make(case.facts, device).items():
        try:
            candidate.step()
        except RuntimeError as error:
            if "not implemented for" not in str(error):
                raise
            missing.append({"suite": case.suite, "case": case.facts, "name": name, "error": str(error).splitlines()[0]})
        else:
            candidates[name] = candidate
    clock = time.process_time if case.host else time.perf_counter
    with cpu_threads(1) if case.host else nullcontext():
        rounds = repeats * case.rounds
        seconds = alternate(candidates, rounds, rng, device=device, after_round=after_round, clock=clock)
    peaks, counts = {}, {}
    for name, candidate in candidates.items():
        candidate.drift(rng)
        peaks[name] = peak_bytes(candidate.step, device)
        candidate.drift(rng)
        counts[name] = metered(candidate.step).operations
    rows = [
        {"suite": case.suite, "case": case.facts, **row}
        for reference, names in case.comparisons.items()
        for row in compare(seconds, peaks, counts, reference, candidates if names is None else names)
    ]
    return rows, missing
