"""What every data set of the project is: arrays held in memory, an order, and the work done on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from diffstride import _validation
from diffstride._text import short_repr
from diffstride.errors import UsageError

Batch: TypeAlias = tuple[Tensor, Tensor]

_FULL_SCALE = {torch.uint8: 255, torch.int16: 32768}  # of pixels and of sound, which is signed


class DataError(UsageError):
    """A data set that cannot be used: one line that names the cure."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker re-raises with its whole traceback as the message: the last line is ours.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


class Axis(NamedTuple):
    """A spatial axis of what a network sees.

    Attributes:
        name: "time", for example.
        spacing: from one sample to the next.
        unit: of frequencies along it, cycles per unit of the spacing: "Hz" where that is in seconds.
    """

    name: str
    spacing: float
    unit: str


class BatchDataset(Dataset[Batch]):
    """A data set that is asked for a whole batch at once, so that loading costs one indexing and no collation."""

    def __len__(self) -> int:
        """The number of samples."""
        raise NotImplementedError(f"{type(self).__name__} must have __len__, the number of samples")

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch at `indices`: raw inputs `[B, ...]` and int64 labels `[B]`."""
        raise NotImplementedError(f"{type(self).__name__} must have __getitems__, the batch at some indices")

    def __getitem__(self, index: int) -> Batch:
        """One sample, without the batch axis."""
        inputs, labels = a_batch(f"what {type(self).__name__}.__getitems__ gives", self.__getitems__([index]))
        if len(inputs) != 1 or len(labels) != 1:
            raise DataError(
                f"{type(self).__name__}.__getitems__ must give an input and a label for each index, not {len(inputs)} "
                f"and {len(labels)} for 1"
            )
        return inputs[0], labels[0]


class InMemory(BatchDataset):
    """Two tensors.

    Args:
        inputs: uint8, int16 or floating `[N, ...]`.
        labels: int64 `[N]`.
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        a_batch("inputs and labels", (inputs, labels))
        if len(inputs) != len(labels):
            raise ValueError(f"inputs and labels differ in length: {len(inputs)} and {len(labels)}")
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise DataError(f"labels must be int64 of shape [N], not {labels.dtype} of shape {tuple(labels.shape)}")
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch at `indices`."""
        try:
            index = torch.as_tensor(indices)
            return self.inputs[index], self.labels[index]
        except (IndexError, TypeError, ValueError) as error:
            raise IndexError(f"indices must be whole numbers below {len(self)}, got {short_repr(indices)}") from error


class ClassificationData(LightningDataModule):
    """Base of all data sets: inputs of one shape, each with one class.

    A subclass implements `load`, and may override `augment` (training only, on the device) and `prepare_evaluation`
    (where training changes the shape of inputs). The rest is done here: the order of training is a function of the seed
    and the epoch alone, a training that was cut off within an epoch goes on with the batch that follows, ranks get
    disjoint shards, random augmentation is a function of the seed, the number of the batch and the rank, and inputs are
    normalised on the device. What a trained network needs to know of its data, such as the names of the classes, goes
    into checkpoints.

    `val_dataloader` and `test_dataloader` both serve the test split in its own order. Over several ranks torch's
    sampler repeats up to one sample per rank there, so that all ranks do the same number of steps.

    A training batch is `(inputs, targets)`: float inputs, and int64 targets `[B]` or class probabilities `[B, K]` when
    the augmentation mixes samples. A batch of evaluation is `(inputs, labels)`, where each label may have several
    inputs, one after the other: views of one sample, whose logits are to be averaged.

    Args:
        batch_size: samples per batch and rank. Training drops the last incomplete batch of an epoch.
        seed: of the order, the augmentation and every other choice made here.
        num_workers: processes that load batches; sets held in memory need none.

    Attributes:
        num_classes: number of classes.
        classes: their names.
        sample_shape: shape of one sample as the model sees it, for images `(C, H, W)`.
        axes: of the sample's spatial axes, where these stand for something that is measured.
        fingerprint: hexadecimal digest of the content and its preparation.
        train_set: what `load` left: a pair of tensors, or a `BatchDataset`.
        test_set: likewise.
        mean: per channel, or None for inputs that are not to be normalised.
        std: per channel, or None.
    """

    KEPT: ClassVar[tuple[str, ...]] = ("num_classes", "classes", "sample_shape", "mean", "std")

    num_classes: int
    classes: tuple[str, ...]
    sample_shape: tuple[int, ...]
    axes: tuple[Axis, ...] = ()
    fingerprint: str
    train_set: Batch | BatchDataset
    test_set: Batch | BatchDataset
    mean: Tensor | None = None
    std: Tensor | None = None

    def __init__(self, batch_size: int = 128, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        _validation.whole("batch_size", batch_size, 1)
        _validation.whole("num_workers", num_workers, 0)
        if not 0 <= seed < 2**32:  # as numpy has it
            raise DataError(f"seed must be between 0 and {2**32 - 1}, got {seed}")
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers

    def load(self) -> None:
        """Set `train_set`, `test_set` and `num_classes`; where known also the other attributes."""
        raise NotImplementedError(
            f"{type(self).__name__} must have load, which sets train_set, test_set and num_classes"
        )

    def read(self, file: Path) -> Tensor:
        """One raw sample from a file on disk, as those of the set.

        Raises:
            DataError: a file that cannot be read, a set that is not made of files.
        """
        raise DataError(f"{type(self).__name__} is not a set of files: none can be read like its samples")

    def augment(self, inputs: Tensor, labels: Tensor) -> Batch:
        """Random changes to a training batch, on the device, before normalisation; inputs are floating."""
        return inputs, labels

    def prepare_evaluation(self, inputs: Tensor) -> Tensor:
        """What evaluation does to floating inputs before normalisation, where training changes their shape."""
        return inputs

    def prepare_data(self) -> None:
        """Load once per machine, so that other ranks find what can be cached."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load, unless that is done, and fill in what `load` left open."""
        if hasattr(self, "train_set"):
            return
        self.load()
        try:
            self._check_loaded()
        except Exception:
            vars(self).pop("train_set", None)  # or a second call would take it for loaded
            raise
        if not hasattr(self, "classes"):
            self.classes = tuple(map(str, range(self.num_classes)))
        if not hasattr(self, "sample_shape"):
            self.sample_shape = tuple(as_dataset(self.train_set)[0][0].shape)
        if not hasattr(self, "fingerprint"):
            self.fingerprint = digest(*_tensors(self.train_set), *_tensors(self.test_set), self.num_classes)

    def _check_loaded(self) -> None:
        """What `load` has set fits together."""
        kind = type(self).__name__
        for name in "train_set", "test_set", "num_classes":
            if not hasattr(self, name):
                raise DataError(f"{kind}.load must set {name}: it did not")
        _validation.whole("num_classes", self.num_classes, 1)
        if len(getattr(self, "classes", range(self.num_classes))) != self.num_classes:
            raise DataError(f"classes must be names of {self.num_classes} classes, not {short_repr(self.classes)}")
        for name in "train_set", "test_set":
            dataset = as_dataset(getattr(self, name), name)
            if not len(dataset):
                raise DataError(f"{name} must have samples, not 0")
            if isinstance(dataset, InMemory):
                least, most = (int(label) for label in dataset.labels.aminmax())
                if not 0 <= least <= most < self.num_classes:
                    raise DataError(
                        f"labels of {name} must be from 0 to num_classes - 1, {self.num_classes - 1}, not from {least} "
                        f"to {most}"
                    )
        for axis in self.axes:
            _validation.above_zero(f"spacing of the axis {axis.name}", axis.spacing)

    @property
    def outputs(self) -> int | dict[str, int]:
        """How many logits a network must have; of several tasks, by their names."""
        return self.num_classes

    def state_dict(self) -> dict[str, Any]:
        """What a trained network needs to know of its data."""
        return {name: getattr(self, name) for name in self.KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a checkpoint has, where nothing is loaded."""
        if not hasattr(self, "train_set"):
            for name in self.KEPT:
                setattr(self, name, state_dict[name])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of the train split in an order that is a function of the seed and the epoch."""
        self._must_be_loaded()
        replicas, _ = self._place()
        each = len(as_dataset(self.train_set)) // replicas
        if each < self.batch_size:
            raise DataError(
                f"batch_size {self.batch_size} is larger than the {each} training samples of a rank: lower batch_size"
            )
        return self._loader(self.train_set, train=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test split."""
        self._must_be_loaded()
        return self._loader(self.test_set, train=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test split."""
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment (in training) and normalise, on the device the batch has reached."""
        trainer = self.trainer
        if trainer is None:
            return self.prepare_batch(batch)
        if trainer.training:
            step = trainer.fit_loop.epoch_loop.total_batch_idx + 1  # the last batch's number; counts micro-batches too
            inputs, targets = self.prepare_batch(batch, step=step, rank=trainer.global_rank)
        else:
            inputs, targets = self.prepare_batch(batch)
        return trainer.precision_plugin.convert_input(inputs), targets

    def prepare_batch(self, batch: Batch, *, step: int | None = None, rank: int = 0) -> Batch:
        """From a raw batch to what the model sees.

        Args:
            batch: raw inputs and int64 labels.
            step: the number of the training batch, over all epochs, or None for evaluation.
            rank: of the process, so that ranks draw different numbers.

        Returns:
            Float inputs, and targets.
        """
        inputs, targets = a_batch("batch", batch)
        if step is not None:
            _validation.whole("step", step, 0)
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

    def _must_be_loaded(self) -> None:
        if not hasattr(self, "train_set"):
            raise DataError(f"{type(self).__name__} has not loaded its samples: call setup() first")

    def _place(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _sampler(self, dataset: BatchDataset, *, train: bool) -> Shard:
        replicas, rank = self._place()
        return Shard(dataset, replicas, rank, shuffle=train, seed=self.seed, drop_last=train)

    def _loader(self, split: Batch | BatchDataset, *, train: bool) -> DataLoader[Batch]:
        dataset = as_dataset(split)
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "sampler": self._sampler(dataset, train=train),
            "drop_last": train,
            "collate_fn": as_is,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
        if train and self.trainer is not None:
            return _TrainLoader(self.trainer, dataset, **options)
        return DataLoader(dataset, **options)


class Shard(DistributedSampler[Any]):
    """One rank's share of a data set, in torch's order; an epoch that was cut off begins where it was.

    Attributes:
        cut_off: an epoch, and how many of its samples were trained on before an interruption.
    """

    cut_off: tuple[int, int] = (0, 0)

    def __iter__(self) -> Iterator[int]:
        """Return the order without the samples already seen. Lightning asks more than once before a training."""
        epoch, done = self.cut_off
        return islice(self.order(), done if epoch == self.epoch else 0, None)

    def order(self) -> Iterator[int]:
        """The whole order of the present epoch."""
        return super().__iter__()


class _TrainLoader(DataLoader[Batch]):
    """A loader that checkpoints know the place of, by Lightning's protocol.

    The place is where the training is, not how far batches have been loaded ahead of it.
    """

    sampler: Shard

    def __init__(self, trainer: Trainer, dataset: BatchDataset, **options: Any) -> None:
        super().__init__(dataset, **options)
        self._trainer = trainer

    def state_dict(self) -> dict[str, int]:
        """Epochs and batches behind the training."""
        batches = self._trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epoch, batches = divmod(batches, int(self._trainer.num_training_batches))
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin there. Workers ask for the order before Lightning says which epoch it is."""
        assert self.batch_size is not None
        self.sampler.set_epoch(state_dict["epoch"])
        self.sampler.cut_off = state_dict["epoch"], state_dict["batches"] * self.batch_size


@contextmanager
def seeded(*key: int, device: torch.device) -> Iterator[None]:
    """Random numbers on the CPU and on `device` become a function of `key`; the global state is put back after."""
    seed = seed_of(*key)
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def seed_of(*key: object) -> int:
    """A seed for random numbers that are a function of `key`."""
    return int(digest(*key)[:15], 16)


def digest(*parts: object) -> str:
    """Hexadecimal digest of tensors' contents and of other parts' `repr`, the same in every process."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            total.update(part.detach().cpu().contiguous().numpy().data)
        else:
            total.update(f"{part!r};".encode())
    return total.hexdigest()[:32]


def as_float(raw: Tensor) -> Tensor:
    """Raw samples as floating-point numbers: pixels from 0 to 1, sound from -1 to 1; floating ones as they are."""
    return raw.float().div_(_FULL_SCALE[raw.dtype]) if raw.dtype in _FULL_SCALE else raw


def mean_of_views(logits: Tensor, samples: int) -> Tensor:
    """Logits `[samples, K]` of those `[samples * views, K]` of a batch of evaluation."""
    return logits.reshape(samples, -1, logits.shape[-1]).mean(1)


def as_dataset(split: Batch | BatchDataset, name: str = "split") -> BatchDataset:
    """A split as a data set; `name` is what messages call it."""
    return split if isinstance(split, BatchDataset) else InMemory(*a_batch(name, split))


def a_batch(name: str, batch: object) -> Batch:
    """Check that there are two tensors: inputs and labels."""
    if not isinstance(batch, Sequence) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise TypeError(f"{name} must be two tensors, (inputs, labels), got {short_repr(batch)}")
    inputs, labels = batch
    if not inputs.ndim or not labels.ndim:
        raise ValueError(f"{name} must have a batch axis, got shapes {tuple(inputs.shape)} and {tuple(labels.shape)}")
    return inputs, labels


def _tensors(split: Batch | BatchDataset) -> tuple[Any, ...]:
    return (len(split),) if isinstance(split, BatchDataset) else tuple(split)


def as_is(batch: Any) -> Any:
    """A batch that needs no collation."""
    return batch
