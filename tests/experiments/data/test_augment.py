"""The augmentation does to each image what its name says, and only that."""

import pytest
import torch
from torch.nn import functional as F

from diffstride.experiments.data import Augment


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(32, 3, 12, 10, generator=generator), torch.arange(32) % 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def test_nothing_is_done_by_default(batch):
    images, labels = Augment()(*batch, 4)
    assert torch.equal(images, batch[0])
    assert torch.equal(labels, batch[1])


@pytest.mark.parametrize(("mode", "torch_mode"), [("zeros", "constant"), ("reflect", "reflect")])
def test_pad_crop_is_a_crop_of_the_padded_image(batch, mode, torch_mode):
    images, labels = batch
    result, targets = Augment(pad_crop=2, pad_mode=mode)(images, labels, 4)
    padded = F.pad(images, (2, 2, 2, 2), mode=torch_mode)
    assert result.shape == images.shape
    places = set()
    for image, source in zip(result, padded, strict=True):
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(image, source[:, y : y + 12, x : x + 10])]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 8  # of 25, each image at its own place
    assert {y for y, _ in places} == {x for _, x in places} == set(range(5))
    assert torch.equal(targets, labels)


def test_flip_mirrors_about_half_of_the_images(batch):
    images, labels = batch
    result, _ = Augment(flip=True)(images, labels, 4)
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(result, images, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(result, images, strict=True)])
    assert (mirrored ^ kept).all()
    assert 6 <= mirrored.sum() <= 26


def test_mixup_mixes_images_and_targets_by_one_share_per_sample():
    # Each class is a one-hot image, so that the shares can be read from the mixed image itself.
    labels = torch.arange(16)
    images = F.one_hot(labels, 16).float().view(16, 1, 4, 4)
    mixed, targets = Augment(mixup=1.0)(images, labels, 16)
    torch.testing.assert_close(mixed.flatten(1), targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(16))
    assert ((targets > 0).sum(1) <= 2).all()
    assert targets.diagonal().unique().numel() > 8  # a share per sample, and each keeps a part of its own label


def test_mixup_of_pairs_makes_one_image_of_two():
    """The first half of the batch is mixed with the second; an odd last image has no partner."""
    labels = torch.arange(17)
    images = F.one_hot(labels, 17).float().view(17, 1, 1, 17)
    mixed, targets = Augment(mixup=1.0, mixup_pairs=True)(images, labels, 17)
    assert mixed.shape == (8, 1, 1, 17)
    torch.testing.assert_close(mixed.flatten(1), targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    for i, target in enumerate(targets):
        assert target.nonzero().flatten().tolist() == [i, i + 8]
    assert targets.diagonal().unique().numel() == 8


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("alpha", [0.2, 4.0])
def test_mixup_shares_follow_the_beta_distribution(alpha, pairs):
    """Its mean is 1/2, its variance 1 / (4 (2 alpha + 1))."""
    count = 4000 if pairs else 2000
    _, targets = Augment(mixup=alpha, mixup_pairs=pairs)(torch.zeros(count, 1, 1, 1), torch.arange(count), count)
    shares = targets[:, :2000].diagonal()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_resized_crop_has_its_size_and_evaluation_takes_the_middle(batch):
    images, labels = batch
    augment = Augment(resized_crop=6)
    result, _ = augment(images, labels, 4)
    assert result.shape == (32, 3, 6, 6)
    constant, _ = augment(torch.full_like(images, 0.25), labels, 4)
    torch.testing.assert_close(constant, torch.full((32, 3, 6, 6), 0.25))
    assert torch.equal(augment.center(images), images[:, :, 3:9, 2:8])


def test_settings_that_would_be_silently_wrong():
    for settings in {"pad_crop": -1}, {"mixup": -1.0}, {"resized_crop": 8, "pad_crop": 2}:
        with pytest.raises(ValueError, match=next(iter(settings))):
            Augment(**settings)
