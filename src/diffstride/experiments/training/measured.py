"""The loss of a network on a fixed sample of training data, for measured changes of strides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from diffstride.errors import UsageError
from diffstride.experiments.data import ClassificationData, MultiTask
from diffstride.experiments.data.base import as_dataset
from diffstride.experiments.data.hashing import seed_of

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
"""The optimizer of steps that adapt weights, for networks that were trained with SGD."""


class SearchSplit(NamedTuple):
    """A split of the training set for a search: indices of samples to train on, and to compare losses on."""

    train: list[int]
    validation: list[int]

    @classmethod
    def of(cls, data: ClassificationData, number: int = 0) -> SearchSplit:
        """Split the training set as the whole set was split into training and test.

        Where a group, such as a speaker, is held out for the test, another group is held out here. Otherwise a random
        fifth of the samples is, by the seed of the data. Another `number` holds out others.
        """
        names = sorted(set(data.groups or ()))
        if len(names) > 1:
            chosen = torch.tensor([group == names[number % len(names)] for group in data.groups or ()])
        else:
            generator = torch.Generator().manual_seed(seed_of("search", data.seed, number))
            shuffled = torch.randperm(len(as_dataset(data.train_set)), generator=generator)
            chosen = shuffled < max(1, len(shuffled) // 5)
        return cls(*(mask.nonzero().flatten().tolist() for mask in (~chosen, chosen)))


def recalibrated_loss(
    data: ClassificationData,
    device: torch.device,
    *,
    samples: int = 2048,
    batches: int = 16,
    steps: int = 0,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = SGD,
    split: SearchSplit | None = None,
) -> Callable[..., Tensor]:
    """Return a function from a network, which it adapts, to its cross-entropy on a sample of the training data.

    With `adapt=False`, the function leaves out the steps that adapt the weights.

    Other sizes of maps have other statistics, so that those of batch norms are computed again first.

    Args:
        data: loaded data.
        device: the device of the networks.
        samples: the number of samples of the loss, spread over the training data and not augmented.
        batches: the number of augmented training batches for the statistics of batch norms.
        steps: the steps that adapt the weights before.
        optimizer: a function from the weights to the optimizer of these steps.
        split: the samples to train on and those of the loss; by default, all are both.

    Raises:
        UsageError: data with several tasks.
    """
    if isinstance(data, MultiTask):
        raise UsageError("measured changes need data with one task, got several")
    train = as_dataset(data.train_set)
    compared = range(len(train)) if split is None else split.validation
    spread = list(compared[:: max(1, len(compared) // samples)])[:samples]
    parts = [spread[first : first + 512] for first in range(0, len(spread), 512)]
    sample = [_on(data.prepare_batch(train.__getitems__(part)), device) for part in parts]
    augmented = list(augmented_batches(data, batches + steps, device, split))

    def loss(network: nn.Module, adapt: bool = True) -> Tensor:
        if steps and adapt:
            strides = {id(parameter) for name, parameter in network.named_parameters() if name.endswith("stride")}
            weights = [parameter for parameter in network.parameters() if id(parameter) not in strides]
            train_briefly(network, augmented[batches:], optimizer(weights))
        _recalibrate(network, augmented[:batches])
        network.eval()
        losses = [F.cross_entropy(network(inputs), labels, reduction="sum") for inputs, labels in sample]
        return torch.stack(losses).sum() / len(spread)

    return loss


def _on(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    return batch[0].to(device), batch[1].to(device)


def augmented_batches(
    data: ClassificationData, count: int, device: torch.device, split: SearchSplit | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented batches, the same in each call, of the training samples of the split, or of all."""
    train = as_dataset(data.train_set)
    samples = torch.arange(len(train)) if split is None else torch.tensor(split.train)
    size = min(data.batch_size, len(samples))
    drawn = torch.randint(len(samples), (count, size), generator=torch.Generator().manual_seed(0))
    for step, indices in enumerate(samples[drawn]):
        yield _on(data.prepare_batch(train.__getitems__(indices.tolist()), step=step), device)


def train_briefly(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """Train a network in place on the cross-entropy of some batches."""
    network.train()
    for inputs, labels in batches:
        with torch.enable_grad():
            loss = F.cross_entropy(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after_step()
    network.zero_grad()


@torch.no_grad()
def _recalibrate(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = None  # the plain mean over batches
        norm.reset_running_stats()
    network.train()
    for inputs, _ in batches:
        network(inputs)
