"""Two processes learn one set of strides: replicated, sharded around, and from samples that no two of them share."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import diffstride as ds
from diffstride.experiments.data import ImageData
from tests.helpers.datasets import epoch, place
from tests.helpers.distributed import (
    MODELS,
    WORLD,
    batch,
    gradients,
    learn,
    mistakes,
    of_strides,
    run,
    run_fit,
    sharded,
    train,
)


@pytest.mark.parametrize("name", ["tiny", "branches", "converted"])
def test_strides_and_sizes_are_the_same_in_all_processes(name, tmp_path):
    one, two = run(train, tmp_path, name, 200)
    assert len(one) == 200
    assert [note[:2] for note in one] == [note[:2] for note in two]  # floats, bit for bit
    assert all(a[2] != b[2] for a, b in zip(one, two, strict=True))  # the data are not
    assert len({note[1] for note in one}) > 1, "no size has changed"
    for layer, first in one[0][0].items():
        assert np.abs(np.subtract(one[-1][0][layer], first)).max() > 0.01, f"{layer} has not learned"


@pytest.mark.parametrize("name", ["branches", "converted, no norm"])
def test_gradients_of_strides_are_those_of_one_process_with_the_whole_batch(name, tmp_path):
    parts = run(gradients, tmp_path, name)
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x, labels = batch(seed=5)
    nn.functional.cross_entropy(model(x.double()), labels).backward()
    whole = of_strides(model)
    for layer, gradient in whole.items():
        assert gradient.abs().max() > 1e-6
        for part in parts:
            torch.testing.assert_close(part[layer], gradient, rtol=1e-9, atol=1e-12)


def test_strides_stay_whole_where_all_else_is_sharded(tmp_path):
    (strides, own, weights), (others, of_other, _) = run(sharded, tmp_path, "branches", 10)
    assert strides == others
    assert all(torch.equal(own[name], of_other[name]) for name in own)
    torch.manual_seed(0)
    model = MODELS["branches"]()
    first = ds.strides(model)
    learn(model, batch, 10)
    for name, values in ds.strides(model).items():
        assert strides[name] == pytest.approx(values, rel=1e-5)
        assert strides[name] != first[name]
    wanted = model.state_dict()
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_a_sharded_stride_is_refused_with_the_cure(tmp_path):
    for messages in run(mistakes, tmp_path):
        assert len(messages) == 3
        for message in messages:
            assert "\n" not in message
            assert "must be whole" in message
        assert "fully_shard(model, ignored_params=ds.replicate_strides(model))" in messages[0]


def test_replicating_needs_a_group_of_processes():
    with pytest.raises(ValueError, match=r"group must be initialized, got none: call torch\.distributed\.init_process"):
        ds.replicate_strides(ds.DiffStride2d())


@pytest.fixture
def pictures(tmp_path):
    draw = np.random.default_rng(0)
    for split, count in ("train", 44), ("test", 8):
        for i in range(count):
            path = tmp_path / "set" / split / f"class{i % 4}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (12, 12), dtype=np.uint8)).save(path)
    return str(tmp_path / "set")


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_samples_are_sharded_without_overlap(pictures, workers):
    ranks = [place(ImageData(pictures, batch_size=4, cache_gb=0, num_workers=workers), 3, rank) for rank in range(3)]
    for data in ranks:
        data.setup()
    orders = []
    for number in range(2):
        seen = [[inputs.numpy().tobytes() for batch in epoch(data, number) for inputs in batch[0]] for data in ranks]
        every = Counter(sample for samples in seen for sample in samples)
        assert [len(samples) for samples in seen] == [12, 12, 12]  # of 44, in whole batches
        assert max(every.values()) == 1, "a sample was given twice"
        orders.append(seen)
    assert orders[0] != orders[1]


def test_fit_in_two_processes_on_streamed_pictures(pictures, tmp_path):
    """200 steps of `diffstride fit`: one set of strides, disjoint samples, one run folder."""
    (one, samples), (two, others) = run_fit(tmp_path, [
        "--runs", str(tmp_path), "--name", "two", "--data", "ImageData", "--data.path", pictures,
        "--data.batch_size", "4", "--data.cache_gb", "0", "--model.network", "TinyCNN",
        "--model.network.width", "4", "--model.network.in_channels", "3", "--model.network.strides", "[2.0]",
        "--model.learning_rates", "[0.02]", "--model.cost_weight", "0.02",
        "--trainer.max_epochs", "40", "--trainer.check_val_every_n_epoch", "20",
        "--trainer.strategy", "ddp", "--trainer.devices", str(WORLD), "--trainer.accelerator", "cpu",
    ])  # fmt: skip
    assert len(one) == 200
    assert one == two
    assert len({sizes for _, sizes in one}) > 1
    for number in range(40):
        mine, theirs = ({s for e, ids in of for s in ids if e == number} for of in (samples, others))
        assert len(mine) == len(theirs) == 20
        assert not mine & theirs
    assert (tmp_path / "two" / "result.json").exists()
