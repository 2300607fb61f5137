"""The base of all data sets: samples, their order and its resumption, and their preparation on the device."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from diffstride import _validation
from diffstride.errors import UsageError
from diffstride.experiments.data.hashing import digest, seeded

Batch: TypeAlias = tuple[Tensor, Tensor]

_FULL_SCALE = {torch.uint8: 255, torch.int16: 32768}  # of pixels and of sound, which is signed


class DataError(UsageError):
    """A data set that cannot be used. The message is one line."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker re-raises with its whole traceback as the message. The last line is ours.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


class Axis(NamedTuple):
    """A spatial axis of the network's input, such as `Axis("time", 0.01, "Hz")`."""

    name: str
    spacing: float  # between samples
    unit: str  # of frequencies along the axis: cycles per unit of the spacing


class BatchDataset(Dataset[Batch]):
    """A data set that returns whole batches, so that loading costs one indexing and no collation."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch at `indices`: raw inputs `[B, ...]` and int64 labels `[B]`."""

    def __getitem__(self, index: int) -> Batch:
        """Return one sample, without the batch axis."""
        inputs, labels = self.__getitems__([index])
        return inputs[0], labels[0]


@dataclass(eq=False)
class InMemory(BatchDataset):
    """A data set of two tensors: inputs `[N, ...]` (uint8, int16 or floating), and int64 labels `[N]`."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices)
        return self.inputs[index], self.labels[index]


class Shard(DistributedSampler[Any]):
    """One rank's share of a data set, in torch's order. An interrupted epoch continues where it stopped."""

    interrupted: tuple[int, int] = (0, 0)  # an epoch, and its samples that were trained on before an interruption

    def __iter__(self) -> Iterator[int]:
        """Yield the order without the samples already seen. Lightning asks more than once before a training."""
        epoch, done = self.interrupted
        return islice(self.order(), done if epoch == self.epoch else 0, None)

    def order(self) -> Iterator[int]:
        """Return the whole order of the present epoch."""
        return super().__iter__()


class TrainLoader(DataLoader[Any]):
    """A loader whose position is part of checkpoints: that of the training, not that of workers, which are ahead."""

    sampler: Shard

    def __init__(self, trainer: Trainer, dataset: Dataset[Any], **options: Any) -> None:
        super().__init__(dataset, **options)
        self._trainer = trainer

    def state_dict(self) -> dict[str, int]:
        batches = self._trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epoch, batches = divmod(batches, int(self._trainer.num_training_batches))
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        assert self.batch_size is not None
        self.sampler.set_epoch(state_dict["epoch"])  # workers ask for the order before Lightning sets it
        self.sampler.interrupted = state_dict["epoch"], state_dict["batches"] * self.batch_size


class ClassificationData(LightningDataModule):
    """Base of all data sets: inputs of one shape, each with one class.

    A subclass implements `load`. It may override `augment` (training only, on the device) and `prepare_evaluation`
    (where training changes the shape of inputs). This class does the rest:

    - The order of training is a function of the seed and the epoch. A training that was interrupted within an epoch
      continues with the next batch. Ranks get disjoint shards.
    - Random augmentation is a function of the seed, the number of the batch and the rank.
    - Inputs are normalised on the device.
    - Validation and test use the test split in its own order. Over several ranks, some repeat one sample.

    A training batch is `(inputs, targets)`: float inputs, and int64 targets `[B]` or, from an augmentation that mixes
    samples, class probabilities `[B, K]`. In evaluation, each label may have several inputs, one after the other: views
    of one sample, whose logits are averaged.

    Args:
        batch_size: samples per batch and rank. Training drops the last incomplete batch of an epoch.
        seed: seed of the order, the augmentation and every other random choice.
        num_workers: processes that load batches. Sets in memory need none.

    Attributes:
        num_classes: number of classes.
        classes: names of the classes.
        sample_shape: shape of one sample as the model sees it, for images `(C, H, W)`.
        axes: spatial axes of the sample, where they stand for something that is measured.
        fingerprint: hexadecimal digest of the content and its preparation.
        train_set: a pair of tensors, or a `BatchDataset`, set by `load`.
        test_set: the same for the test split.
        mean: mean of each channel, or None for inputs that are not normalised.
        std: standard deviation of each channel, or None.
        groups: the group of each training sample, such as a speaker, where another one is held out for the test.
    """

    KEPT: ClassVar[tuple[str, ...]] = ("num_classes", "classes", "sample_shape", "mean", "std")  # for prediction

    num_classes: int
    classes: tuple[str, ...]
    sample_shape: tuple[int, ...]
    axes: tuple[Axis, ...] = ()
    fingerprint: str
    train_set: Batch | BatchDataset
    test_set: Batch | BatchDataset
    mean: Tensor | None = None
    std: Tensor | None = None
    groups: Sequence[str] | None = None

    def __init__(self, batch_size: int = 128, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        _validation.integer("batch_size", batch_size, 1)
        _validation.integer("num_workers", num_workers, 0)
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers

    @abstractmethod
    def load(self) -> None:
        """Set `train_set`, `test_set` and `num_classes`, and the other attributes where they are known."""

    def read(self, file: Path, resize: bool = False) -> Tensor:
        """Return one raw sample from a file on disk, decoded like those of the set.

        Args:
            file: the file.
            resize: resize an image to the size of those of the set, which must be square.

        Raises:
            DataError: the file cannot be read, or the set is not made of files.
        """
        raise DataError(f"{type(self).__name__} is not a set of files: it cannot read {file}")

    def augment(self, inputs: Tensor, labels: Tensor) -> Batch:
        """Return a randomly changed training batch. Inputs are floating and not yet normalised."""
        return inputs, labels

    def prepare_evaluation(self, inputs: Tensor) -> Tensor:
        """Return floating inputs in the shape of training, before normalisation."""
        return inputs

    def prepare_data(self) -> None:
        """Load once per machine, so that other ranks find the cache."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load once, and set the attributes that `load` left out."""
        if hasattr(self, "train_set"):
            return
        self.load()
        splits = self.train_set, self.test_set
        for inputs, labels in (split for split in splits if not isinstance(split, BatchDataset)):
            if len(inputs) != len(labels) or not 0 <= labels.min() <= labels.max() < self.num_classes:
                raise DataError(f"there must be one label from 0 to {self.num_classes - 1} for each sample")
        if not hasattr(self, "classes"):
            self.classes = tuple(map(str, range(self.num_classes)))
        if not hasattr(self, "sample_shape"):
            self.sample_shape = tuple(as_dataset(self.train_set)[0][0].shape)
        if not hasattr(self, "fingerprint"):
            train, test = ([len(split)] if isinstance(split, BatchDataset) else split for split in splits)
            self.fingerprint = digest(*train, *test, self.num_classes)

    @property
    def outputs(self) -> int | dict[str, int]:
        """Number of logits that a network needs, by task where there are several."""
        return self.num_classes

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not hasattr(self, "train_set"):
            for name in self.KEPT:
                setattr(self, name, state_dict[name])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return batches of the train split in an order that is a function of the seed and the epoch."""
        replicas, _ = self._place()
        each = len(as_dataset(self.train_set)) // replicas
        if each < self.batch_size:
            raise DataError(f"batch_size {self.batch_size} is above the {each} training samples of a rank: lower it")
        return self._loader(self.train_set, train=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test_set, train=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return batches of the test split."""
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment (in training) and normalise, on the device of the batch."""
        trainer = self.trainer
        if trainer is None:
            return self.prepare_batch(batch)
        # The loop has the number of the last batch, and counts micro-batches too.
        step = trainer.fit_loop.epoch_loop.total_batch_idx + 1 if trainer.training else None
        inputs, targets = self.prepare_batch(batch, step=step, rank=trainer.global_rank)
        return trainer.precision_plugin.convert_input(inputs), targets

    def prepare_batch(self, batch: Batch, *, step: int | None = None, rank: int = 0) -> Batch:
        """Return the inputs and targets that the model sees.

        Args:
            batch: raw inputs and int64 labels.
            step: the number of the training batch, over all epochs, or None for evaluation.
            rank: rank of the process, so that ranks draw different numbers.
        """
        inputs, targets = batch
        inputs = as_float(inputs)
        if step is None:
            inputs = self.prepare_evaluation(inputs)
        else:
            with seeded(self.seed, step, rank, device=inputs.device):
                inputs, targets = self.augment(inputs, targets)
        if self.mean is not None and self.std is not None:
            shape = (-1,) + (1,) * (inputs.ndim - 2)
            mean, std = (stat.to(inputs, non_blocking=True).view(shape) for stat in (self.mean, self.std))
            inputs = (inputs - mean) / std
        return inputs, targets

    def _place(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _sampler(self, dataset: BatchDataset, *, train: bool) -> Shard:
        replicas, rank = self._place()
        return Shard(dataset, replicas, rank, shuffle=train, seed=self.seed, drop_last=train)

    def _loader(self, split: Batch | BatchDataset, *, train: bool) -> DataLoader[Batch]:
        dataset = as_dataset(split)
        make = DataLoader if self.trainer is None or not train else partial(TrainLoader, self.trainer)
        return make(
            dataset,
            batch_size=self.batch_size,
            sampler=self._sampler(dataset, train=train),
            drop_last=train,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _as_is(batch: Any) -> Any:
    return batch  # needs no collation


def as_float(raw: Tensor) -> Tensor:
    """Return raw samples as floats: pixels from 0 to 1, sound from -1 to 1. Floats stay as they are."""
    return raw.float().div_(_FULL_SCALE[raw.dtype]) if raw.dtype in _FULL_SCALE else raw


def mean_of_views(logits: Tensor, samples: int) -> Tensor:
    """Return logits `[samples, K]`, the means of those `[samples * views, K]` of a batch of evaluation."""
    return logits.reshape(samples, -1, logits.shape[-1]).mean(1)


def as_dataset(split: Batch | BatchDataset) -> BatchDataset:
    """Return a split as a data set."""
    return split if isinstance(split, BatchDataset) else InMemory(*split)
