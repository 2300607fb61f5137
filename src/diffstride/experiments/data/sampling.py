"""The order of samples: shards of ranks, and a loader that resumes within an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Shard(DistributedSampler[Any]):
    """One rank's share of a data set, in torch's order. An interrupted epoch continues where it stopped.

    Attributes:
        interrupted: an epoch, and the number of its samples that were trained on before an interruption.
    """

    interrupted: tuple[int, int] = (0, 0)

    def __iter__(self) -> Iterator[int]:
        """Yield the order without the samples already seen. Lightning asks more than once before a training."""
        epoch, done = self.interrupted
        return islice(self.order(), done if epoch == self.epoch else 0, None)

    def order(self) -> Iterator[int]:
        """Return the whole order of the present epoch."""
        return super().__iter__()


class TrainLoader(DataLoader[Any]):
    """A loader whose position is part of checkpoints, by Lightning's protocol.

    The position is that of the training, not that of workers, which load batches ahead of it.
    """

    sampler: Shard

    def __init__(self, trainer: Trainer, dataset: Dataset[Any], **options: Any) -> None:
        super().__init__(dataset, **options)
        self._trainer = trainer

    def state_dict(self) -> dict[str, int]:
        """Return the epochs and batches that are complete."""
        batches = self._trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epoch, batches = divmod(batches, int(self._trainer.num_training_batches))
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at a position. Workers ask for the order before Lightning sets the epoch."""
        assert self.batch_size is not None
        self.sampler.set_epoch(state_dict["epoch"])
        self.sampler.interrupted = state_dict["epoch"], state_dict["batches"] * self.batch_size


def as_is(batch: Any) -> Any:
    """Return a batch that needs no collation."""
    return batch
