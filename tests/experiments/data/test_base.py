"""All data sets: order, ranks, evaluation, and augmentation as a function of seed, step and rank."""

from types import SimpleNamespace

import pytest
import torch

from diffstride.experiments.data import Augment, ClassificationData, DataError, ImageData
from tests.helpers.datasets import epoch, image_set, pixels_of, place, ready

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(tmp_path):
    return image_set(tmp_path / "set")


def test_order_is_a_function_of_seed_and_epoch(folder):
    def order(seed, number, noise):
        torch.manual_seed(noise)
        return torch.cat([inputs for inputs, _ in epoch(ready(folder.path, seed=seed), number)])

    assert torch.equal(order(0, 0, 1), order(0, 0, 2))
    assert not torch.equal(order(0, 0, 1), order(0, 1, 1))
    assert not torch.equal(order(0, 0, 1), order(1, 0, 1))


def test_every_sample_is_seen_once_per_epoch(folder):
    batches = epoch(ready(folder.path, batch_size=5), 3)
    assert [len(labels) for _, labels in batches] == [5] * 6
    seen = sorted(image.numpy().tobytes() for inputs, _ in batches for image in inputs)
    assert seen == sorted(pixels_of(content).numpy().tobytes() for content in folder.train)


def test_ranks_see_disjoint_shards_that_cover_the_set(folder):
    shards = []
    for rank in range(3):
        data = place(ready(folder.path, batch_size=5), 3, rank)
        shards.append({image.numpy().tobytes() for inputs, _ in epoch(data, 1) for image in inputs})
    assert [len(shard) for shard in shards] == [10, 10, 10]
    assert len(set.union(*shards)) == 30
    tests = [torch.cat([x for x, _ in place(ready(folder.path), 3, rank).test_dataloader()]) for rank in range(3)]
    expected = torch.stack([pixels_of(content) for content in folder.test])
    assert all(torch.equal(shard, expected[rank::3]) for rank, shard in enumerate(tests))


def test_evaluation_serves_the_test_split_in_its_order(folder):
    data = ready(folder.path)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [4, 4, 1]
        assert torch.equal(torch.cat([x for x, _ in batches]), data.test_set[0])


def test_random_augmentation_is_a_function_of_seed_step_and_rank(folder):
    data = ready(folder.path, augment=Augment(pad_crop=2, flip=True, mixup=0.5))
    batch = epoch(data)[0]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    inputs, targets = data.prepare_batch(batch, step=5, rank=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = data.prepare_batch(batch, step=5, rank=1)
    assert torch.equal(again[0], inputs)
    assert torch.equal(again[1], targets)
    assert targets.shape == (4, 3)
    for other in ({"step": 6, "rank": 1}, {"step": 5, "rank": 0}):
        assert not torch.equal(data.prepare_batch(batch, **other)[0], inputs)
    data.seed = 1
    assert not torch.equal(data.prepare_batch(batch, step=5, rank=1)[0], inputs)


def test_the_hook_augments_in_training_only(folder):
    data = ready(folder.path, augment=Augment(pad_crop=2, mixup=0.5))
    batch = epoch(data)[0]
    plain = data.on_after_batch_transfer(batch, 0)
    same = SimpleNamespace(convert_input=lambda inputs: inputs.bfloat16())
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=7))
    place(data, 2, 1, training=True, fit_loop=loops, precision_plugin=same)
    inputs, targets = data.on_after_batch_transfer(batch, 0)
    expected = data.prepare_batch(batch, step=8, rank=1)
    assert torch.equal(inputs, expected[0].bfloat16())
    assert torch.equal(targets, expected[1])
    data.trainer.training = False
    assert torch.equal(data.on_after_batch_transfer(batch, 0)[0], plain[0].bfloat16())
    assert torch.equal(plain[1], batch[1])


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("accumulated", [1, 3])
def test_under_lightning_order_and_augmentation_follow_epoch_and_batch(folder, tmp_path, accumulated):
    import lightning

    class Recorder(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen, self.evaluated = [], []

        def training_step(self, batch, index):
            self.seen.append(batch)
            return self.weight * batch[0].sum()

        def validation_step(self, batch, index):
            self.evaluated.append(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    options = {"batch_size": 10, "augment": Augment(pad_crop=2, flip=True, mixup=0.3)}
    model = Recorder()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
        accumulate_grad_batches=accumulated,
    )  # fmt: skip
    trainer.fit(model, datamodule=ImageData(str(folder.path), **options))
    data = ready(folder.path, **options)
    expected = [data.prepare_batch(batch, step=step) for step, batch in enumerate([*epoch(data, 0), *epoch(data, 1)])]
    assert len(model.seen) == 6
    for ours, theirs in zip(model.seen, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert torch.equal(model.evaluated[0][0], data.prepare_batch(data.test_set)[0])


def test_labels_outside_of_the_classes_are_refused():
    class Generated(ClassificationData):
        def load(self):
            self.train_set = self.test_set = torch.zeros(5, 2), torch.arange(5)
            self.num_classes = 4

    with pytest.raises(DataError, match="one label from 0 to 3 for each sample"):
        Generated().setup()
