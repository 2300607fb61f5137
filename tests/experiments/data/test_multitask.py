"""Several tasks at once: shares and orders of batches, each task prepared as its own set has it, one training."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import diffstride.experiments.training.fit as fit
from diffstride.experiments.data import ClassificationData, MultiTask, SyntheticSounds
from diffstride.experiments.data.base import Axis
from diffstride.experiments.models import Heads
from diffstride.experiments.training import Classifier
from diffstride.experiments.training.runs import load
from tests.helpers.datasets import epoch, place


class Numbered(ClassificationData):
    """Samples that say which they are; those of the test split are numbered from 1000 on."""

    def __init__(self, size, classes=2, scale=1.0, width=1, test=3, spacing=1.0):
        super().__init__(batch_size=99, seed=99)
        self.size, self.num_classes, self.width, self.test, self.spacing = size, classes, width, test, spacing
        self.mean, self.std = torch.tensor([scale]), torch.tensor([2 * scale])

    def load(self):
        numbers = torch.arange(self.size + self.test)
        numbers[self.size :] += 1000 - self.size
        inputs, labels = numbers[:, None].float().expand(-1, self.width), numbers % self.num_classes
        self.train_set = inputs[: self.size], labels[: self.size]
        self.test_set = inputs[self.size :], labels[self.size :]
        self.axes = (Axis("time", self.spacing, "Hz"),)


class Shifted(Numbered):
    """Its training adds a random number to each sample."""

    def augment(self, inputs, labels):
        return inputs + torch.rand(len(inputs), 1), labels


def union(*sizes, batch_size=4, seed=0, kind=Numbered, **options):
    data = MultiTask({f"t{i}": kind(size, **options) for i, size in enumerate(sizes)}, batch_size, seed)
    data.setup()
    return data


def row(batches, task):
    """The numbers of a task's samples, in the order in which they come."""
    return torch.cat([batch[task][0][:, 0] for batch in batches]).long().tolist()


@pytest.mark.parametrize(
    ("sizes", "batch_size", "shares"),
    [((10, 4), 4, [2, 2]), ((10, 4), 5, [3, 2]), ((4, 9, 30), 8, [3, 3, 2]), ((7, 7, 7), 3, [1, 1, 1])],
)
def test_every_batch_has_equal_shares_and_an_epoch_as_many_samples_as_all_sets(sizes, batch_size, shares):
    data = union(*sizes, batch_size=batch_size)
    loader = data.train_dataloader()
    for number in range(4):
        batches = epoch(data, number)
        assert len(batches) == len(loader) == sum(sizes) // batch_size
        for batch in batches:
            assert list(batch) == list(data.tasks)
            assert [len(inputs) for inputs, _ in batch.values()] == shares
            for inputs, labels in batch.values():
                assert torch.equal(labels, inputs[:, 0].long() % 2)


@pytest.mark.parametrize(("sizes", "batch_size"), [((10, 4), 4), ((11, 3), 5), ((4, 9, 30), 8)])
def test_each_set_is_gone_through_again_and_again_in_new_orders(sizes, batch_size):
    data = union(*sizes, batch_size=batch_size)
    batches = [batch for number in range(24) for batch in epoch(data, number)]
    for task, size in zip(data.tasks, sizes, strict=True):
        numbers = row(batches, task)
        passes = [numbers[start : start + size] for start in range(0, len(numbers) - size + 1, size)]
        assert len(passes) >= 4
        assert all(sorted(one) == list(range(size)) for one in passes)  # so each sample is seen equally often
        assert len(set(map(tuple, passes))) > min(len(passes), 6) / 2


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, number, noise):
        torch.manual_seed(noise)
        batches = epoch(union(20, 12, seed=seed), number)
        return row(batches, "t0"), row(batches, "t1")

    assert order(0, 2, 1) == order(0, 2, 7)
    for other in (order(0, 3, 1), order(1, 2, 1)):
        assert all(a != b for a, b in zip(order(0, 2, 1), other, strict=True))


def test_ranks_share_a_pass_among_them():
    """Three tasks, three ranks: a task's samples, rank by rank and batch by batch, are complete orders of its set."""
    sizes = (30, 7, 12)
    ranks = [
        [batch for number in range(6) for batch in epoch(place(union(*sizes, batch_size=5), 3, rank), number)]
        for rank in range(3)
    ]
    for task, size in zip(("t0", "t1", "t2"), sizes, strict=True):
        numbers = [n for batches in zip(*ranks, strict=True) for n in row(batches, task)]
        passes = [numbers[start : start + size] for start in range(0, len(numbers) - size + 1, size)]
        assert len(passes) >= 3
        assert all(sorted(one) == list(range(size)) for one in passes)


def test_each_part_is_prepared_as_its_own_set_has_it():
    data = MultiTask({"a": Numbered(10, scale=1.0), "b": Numbered(6, classes=3, scale=10.0)}, 4)
    data.setup()
    batch = epoch(data)[0]
    prepared = data.on_after_batch_transfer(batch, 0)
    for task, scale in (("a", 1.0), ("b", 10.0)):
        torch.testing.assert_close(prepared[task][0], (batch[task][0] - scale) / (2 * scale))
        assert torch.equal(prepared[task][1], batch[task][1])
    for index, (task, scale) in enumerate([("a", 1.0), ("b", 10.0)]):
        (own,) = data.val_dataloader()[index]
        found = data.on_after_batch_transfer(own, index)
        assert list(found) == [task]
        expected = (torch.tensor([[1000.0], [1001.0], [1002.0]]) - scale) / (2 * scale)
        torch.testing.assert_close(found[task][0], expected)
    assert data.outputs == {"a": 2, "b": 3}
    assert (data.num_classes, data.classes) == (5, ("a: 0", "a: 1", "b: 0", "b: 1", "b: 2"))


def test_augmentation_follows_seed_batch_and_rank_in_training_only():
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=7))
    same = SimpleNamespace(convert_input=lambda inputs: inputs)
    data = place(union(10, 10, seed=5, kind=Shifted), 2, 1, training=True, fit_loop=loops, precision_plugin=same)
    batch = epoch(data)[0]
    trained = data.on_after_batch_transfer(batch, 0)
    data.trainer.training = False
    evaluated = data.on_after_batch_transfer(batch, 0)
    for task, own in data.tasks.items():
        assert own.seed == 5
        assert torch.equal(trained[task][0], own.prepare_batch(batch[task], step=8, rank=1)[0])
        assert torch.equal(evaluated[task][0], own.prepare_batch(batch[task])[0])
        assert not torch.equal(trained[task][0], evaluated[task][0])


def test_validation_has_a_loader_for_each_task_in_the_order_of_its_test_split():
    data = union(10, 4, test=7, batch_size=3)
    for loaders in (data.val_dataloader(), data.test_dataloader()):
        assert len(loaders) == 2
        for loader in loaders:
            batches = list(loader)
            assert [len(labels) for _, labels in batches] == [3, 3, 1]
            assert torch.cat([inputs for inputs, _ in batches])[:, 0].tolist() == list(range(1000, 1007))


def test_fingerprint_follows_the_tasks_and_the_seed():
    def fingerprint(seed=0, **tasks):
        sounds = {name: SyntheticSounds(task, train_samples=24, test_samples=10) for name, task in tasks.items()}
        data = MultiTask(sounds, 8, seed)
        data.setup()
        return data.fingerprint

    original = fingerprint(a="pitch", b="timbre")
    assert fingerprint(a="pitch", b="timbre") == original
    assert original != fingerprint(a="timbre", b="pitch")
    assert original != fingerprint(1, a="pitch", b="timbre")


@pytest.mark.parametrize(
    ("tasks", "batch_size", "message"),
    [
        ({"a": Numbered(4), "b": Numbered(4), "c": Numbered(4)}, 2, r"batch_size must be at least .* tasks, 3, not 2"),
        ({"a": Numbered(4), "b": Numbered(4, width=2)}, 4, r"one shape and spacing, not \(1,\) .* and \(2,\) "),
        ({"a": Numbered(4), "b": Numbered(4, spacing=2.0)}, 4, r"one shape and spacing, .*=1.0.* and .*=2.0"),
        ({"a": Numbered(4), "b": Numbered(4)}, 9, r"batch_size 9 is above the 8 training samples of a rank"),
    ],
)
def test_mistakes_get_one_line(tasks, batch_size, message):
    with pytest.raises(ValueError, match=message):  # noqa: PT012
        data = MultiTask(tasks, batch_size)
        data.setup()
        data.train_dataloader()


@pytest.mark.parametrize("weights", [None, {"t0": 0.5, "t1": 2.0}, {"t1": 0.0}])
def test_the_loss_is_the_weighted_mean_of_the_tasks(weights):
    batch = union(10, 6, batch_size=5).on_after_batch_transfer(epoch(union(10, 6, batch_size=5))[0], 0)
    network = Heads(1, {"t0": 2, "t1": 2})
    module = Classifier(network, task_weights=weights)
    module.log = lambda *args, **kwargs: None
    found = module.training_step(batch, 0)
    a, b = (weights or {}).get("t0", 1.0), (weights or {}).get("t1", 1.0)
    own = {task: F.cross_entropy(network(inputs)[task], labels) for task, (inputs, labels) in batch.items()}
    torch.testing.assert_close(found, (a * own["t0"] + b * own["t1"]) / (a + b))
    found.backward()
    assert network["t0"].weight.grad.abs().max() > 0
    grad = network["t1"].weight.grad
    assert (b == 0) == (grad is None or not grad.any())


def trained(tmp_path, name, *more):
    """Train on two tasks, of 24 and 40 sounds."""
    sounds = {"features": None, "seconds": 0.05, "noise": 0.02, "test_samples": 20}
    tasks = {
        task: {"class_path": "SyntheticSounds", "init_args": {"task": task, **sounds, "train_samples": size}}
        for task, size in (("pitch", 24), ("timbre", 40))
    }
    data = {"class_path": "MultiTask", "init_args": {"batch_size": 8, "tasks": tasks}}
    options = {"num_classes": {"pitch": 5, "timbre": 4}, "length": 400, "width": 1 / 32}
    return fit.train([
        "--data", json.dumps(data), "--runs", str(tmp_path), "--name", name, "--trainer.accelerator", "cpu",
        "--model.network", json.dumps({"class_path": "WaveformCNN", "init_args": options}),
        "--trainer.enable_progress_bar", "false", "--model.milestones", "[3]", "--model.learning_rates", "[0.1,0.01]",
        *more,
    ])  # fmt: skip


def test_a_training_of_two_tasks_leaves_the_mean_of_their_accuracies(tmp_path):
    cli = trained(tmp_path, "both", "--trainer.max_steps", "5")
    result = json.loads((cli.run_folder / "result.json").read_text())
    data, network = cli.datamodule, cli.model.network.eval()
    accuracies = {}
    for task, own in data.tasks.items():
        inputs, labels = own.prepare_batch(own.test_set)
        with torch.no_grad():
            accuracies[task] = (network(inputs)[task].argmax(1) == labels).double().mean().item()
    assert result["accuracies"] == pytest.approx(accuracies)
    assert result["accuracy"] == pytest.approx((accuracies["pitch"] + accuracies["timbre"]) / 2)
    assert (result["steps"], result["data"], result["axes"]) == (5, "MultiTask", {"time": "Hz"})

    known = load(cli.run_folder).data
    for task in ("pitch", "timbre"):
        assert known.tasks[task].classes == data.tasks[task].classes
        assert torch.equal(known.tasks[task].mean, data.tasks[task].mean)
        assert torch.equal(known.tasks[task].std, data.tasks[task].std)


def test_a_resumed_training_of_several_tasks_ends_with_the_same_weights(tmp_path):
    whole = trained(tmp_path, "whole", "--trainer.max_epochs", "3")
    trained(tmp_path, "cut", "--trainer.max_epochs", "1")
    cut = trained(tmp_path, "cut", "--trainer.max_epochs", "3", "--ckpt_path", "last")
    for (name, a), b in zip(whole.model.state_dict().items(), cut.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    results = [json.loads((cli.run_folder / "result.json").read_text()) for cli in (whole, cut)]
    assert results[0]["accuracies"] == results[1]["accuracies"]
    assert results[0]["steps"] == results[1]["steps"] == 3 * (64 // 8)


def test_the_shape_of_a_sample_is_known_without_samples():
    saved = union(4, 6)
    read = MultiTask({task: Numbered(1) for task in saved.tasks})
    read.load_state_dict(saved.state_dict())
    assert read.sample_shape == saved.sample_shape
