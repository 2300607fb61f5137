"""Several data sets at once: every batch has samples of all tasks."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from diffstride.experiments.data.base import Batch, BatchDataset, ClassificationData, DataError, Shard, as_dataset
from diffstride.experiments.data.hashing import digest, seed_of


class MultiTask(ClassificationData):
    """Several tasks, each with a data set of its own, whose inputs have one shape.

    A batch of training is a mapping from task to `(inputs, targets)`, with an equal share of each task (the first tasks
    have one more where the batch size is no multiple of their number). An epoch has as many samples as all sets
    together, so that it repeats small sets, each time in a new random order that is a function of the seed alone. Each
    task is augmented, normalised and evaluated by its own data set. A batch of evaluation is of one task.

    Args:
        tasks: data sets by the names of the tasks. Their own batch sizes and seeds are not used.
        batch_size: samples per batch and rank, of all tasks together, at least one of each.
        seed: seed of the order, and of all randomness in the data sets.

    Attributes:
        num_classes: number of classes of all tasks together.
        outputs: number of classes by task.
    """

    def __init__(self, tasks: dict[str, ClassificationData], batch_size: int = 128, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        if batch_size < len(tasks):
            raise DataError(f"batch_size must be at least the number of tasks, {len(tasks)}, not {batch_size}")
        self.tasks = tasks
        for data in tasks.values():
            data.seed, data.batch_size = seed, batch_size

    @property
    def outputs(self) -> dict[str, int]:
        """Number of classes by task."""
        return {task: data.num_classes for task, data in self.tasks.items()}

    def load(self) -> None:
        for task, data in self.tasks.items():
            try:
                data.setup()
            except DataError as error:
                raise DataError(f"task {task}: {error}") from error
        (self.sample_shape, self.axes), *others = ((data.sample_shape, data.axes) for data in self.tasks.values())
        if unlike := [other for other in others if other != (self.sample_shape, self.axes)]:
            raise DataError(
                f"tasks must have inputs of one shape and spacing, not {self.sample_shape} with {self.axes} and "
                f"{unlike[0][0]} with {unlike[0][1]}: set one size, length, sample_rate and features for all"
            )
        self.num_workers = max(data.num_workers for data in self.tasks.values())
        self.num_classes = sum(self.outputs.values())
        self.classes = tuple(f"{task}: {name}" for task, data in self.tasks.items() for name in data.classes)
        self.train_set = _Union([(task, as_dataset(data.train_set)) for task, data in self.tasks.items()])
        self.test_set = _Union([(task, as_dataset(data.test_set)) for task, data in self.tasks.items()])
        self.fingerprint = digest(*(f"{task} {data.fingerprint}" for task, data in self.tasks.items()))

    def state_dict(self) -> dict[str, Any]:
        return {task: data.state_dict() for task, data in self.tasks.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for task, data in self.tasks.items():
            data.load_state_dict(state_dict[task])
        self.sample_shape = next(iter(self.tasks.values())).sample_shape

    def _sampler(self, dataset: BatchDataset, *, train: bool) -> Shard:
        """Return the order of the training. Each task evaluates on its own."""
        each, more = divmod(self.batch_size, len(self.tasks))
        shares = [each + (i < more) for i in range(len(self.tasks))]
        return _EqualShares(cast(_Union, dataset), shares, *self._place(), self.seed)

    def val_dataloader(self) -> Any:
        for data in self.tasks.values():
            data.trainer = self.trainer
        return [data.val_dataloader() for data in self.tasks.values()]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not isinstance(batch, dict):
            batch = {list(self.tasks)[dataloader_idx]: batch}
        for data in self.tasks.values():
            data.trainer = self.trainer
        return {task: self.tasks[task].on_after_batch_transfer(part, dataloader_idx) for task, part in batch.items()}


class _Union(BatchDataset):
    """The samples of all tasks, one task after the other. A batch is a mapping from task to its part."""

    def __init__(self, parts: Sequence[tuple[str, BatchDataset]]) -> None:
        self.parts = parts
        self.starts = [0, *accumulate(len(part) for _, part in parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Batch]:  # type: ignore[override]
        found = {}
        for (task, part), start, end in zip(self.parts, self.starts, self.starts[1:], strict=False):
            if own := [i - start for i in indices if start <= i < end]:
                found[task] = part.__getitems__(own)
        return found


class _EqualShares(Shard):
    """An order of a union's samples in which every batch has the same number of each task."""

    def __init__(self, union: _Union, shares: Sequence[int], replicas: int, rank: int, seed: int) -> None:
        super().__init__(union, replicas, rank, seed=seed)
        self.union, self.shares = union, shares
        self.batches = len(union) // (replicas * sum(shares))

    def __len__(self) -> int:
        return self.batches * sum(self.shares)

    def order(self) -> Iterator[int]:
        """Return the epoch's samples: for each task, the next part of its endless row of random orders."""
        columns = []
        for task, share in enumerate(self.shares):
            start, end = self.union.starts[task : task + 2]
            each = self.batches * share * self.num_replicas  # of this task in an epoch, on all ranks
            row = self._row(task, end - start, self.epoch * each, each)
            columns.append(start + row.view(self.batches, self.num_replicas, share)[:, self.rank])
        return iter(torch.cat(columns, 1).flatten().tolist())

    def _row(self, task: int, size: int, begin: int, count: int) -> Tensor:
        """Return the places `begin` to `begin + count` of the endless row of a task's orders."""
        orders = []
        for turn in range(begin // size, (begin + count - 1) // size + 1):
            generator = torch.Generator().manual_seed(seed_of(self.seed, task, turn))
            orders.append(torch.randperm(size, generator=generator))
        return torch.cat(orders)[begin % size :][:count]
