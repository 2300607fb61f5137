"""The loss of measured changes, computed by hand from the same data."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

import diffstride as ds
from diffstride.errors import UsageError
from diffstride.experiments.data import MultiTask, PlantedBands
from diffstride.experiments.data.base import as_dataset
from diffstride.experiments.training.measured import SearchSplit, augmented_batches, recalibrated_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    made = PlantedBands(train_samples=96, test_samples=32, batch_size=16)
    made.setup()
    return made


def network(data):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(data.sample_shape[0], 4, 3), nn.BatchNorm2d(4), nn.ReLU(), ds.DiffStride2d(2.0, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, data.num_classes),
    )  # fmt: skip


def test_batch_norms_are_those_of_training_batches_and_the_loss_that_of_the_samples(data):
    model = network(data)
    loss = recalibrated_loss(data, CPU, samples=48, batches=3)
    with torch.no_grad():
        found = loss(model)
        drawn = torch.randint(96, (3, 16), generator=torch.Generator().manual_seed(0))
        train = as_dataset(data.train_set)
        batches = [data.prepare_batch(train.__getitems__(row.tolist()), step=i)[0] for i, row in enumerate(drawn)]
        outputs = [model[0](inputs) for inputs in batches]
        expected = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
        torch.testing.assert_close(model[1].running_mean, expected)
        inputs, labels = data.prepare_batch(train.__getitems__([*range(0, 96, 2)]))
        torch.testing.assert_close(found, F.cross_entropy(model.eval()(inputs), labels))
    assert torch.equal(loss(network(data)), found)  # the same batches each time


def test_steps_adapt_the_weights_and_not_the_strides(data):
    model, before = network(data), network(data)
    adapted = recalibrated_loss(data, CPU, samples=48, batches=3, steps=20, optimizer=partial(SGD, lr=0.1))(model)
    assert adapted < recalibrated_loss(data, CPU, samples=48, batches=3)(network(data))
    assert torch.equal(model[3].stride, before[3].stride)
    assert not torch.equal(model[0].weight, before[0].weight)
    assert adapted.requires_grad


@pytest.mark.parametrize("groups", [None, ["ada", "bob", "cy"] * 32, ["ada"] * 96], ids=["none", "three", "one"])
def test_a_search_compares_losses_on_samples_that_it_does_not_train_on(data, groups):
    data = copy.copy(data)
    data.groups = groups
    first, second = SearchSplit.of(data), SearchSplit.of(data, 1)
    for split in first, second:
        assert sorted(split.train + split.validation) == list(range(96))
    assert first != second
    if groups and "bob" in groups:
        assert [{groups[i] for i in d.validation} for d in (first, second)] == [{"ada"}, {"bob"}]
    else:
        assert len(first.validation) == 96 // 5
    train = as_dataset(data.train_set)
    batches = [inputs for inputs, _ in augmented_batches(data, 20, CPU, first)]
    own = {row.numpy().tobytes() for row in data.prepare_batch(train.__getitems__(first.train))[0]}
    assert {row.numpy().tobytes() for batch in batches for row in batch} <= own
    model = network(data)
    loss = recalibrated_loss(data, CPU, batches=3, split=first)
    with torch.no_grad():
        found = loss(model)
        torch.testing.assert_close(
            model[1].running_mean, torch.stack([model[0](inputs).mean((0, 2, 3)) for inputs in batches[:3]]).mean(0)
        )
        inputs, labels = data.prepare_batch(train.__getitems__(first.validation))
        torch.testing.assert_close(found, F.cross_entropy(model.eval()(inputs), labels))


def test_several_tasks_are_refused(data):
    with pytest.raises(UsageError, match="need data with one task"):
        recalibrated_loss(MultiTask({"a": data, "b": data}), CPU)
