"""Image-classification sets: names of the hub, parquet files and folders of images."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from diffstride import _check
from diffstride.data.augment import Augment
from diffstride.data.base import Batch, DataError, at_least
from diffstride.data.stored import Split, StoredData, first_line

Pixels = npt.NDArray[np.uint8]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DECODING = 1  # raise when decoding changes, so that older caches are not used


class ImageData(StoredData):
    """Images with one class each, from a name on the hub or from files.

    The set is decoded once into uint8 arrays that are kept in `$DIFFSTRIDE_CACHE` (else in
    `$XDG_CACHE_HOME/diffstride`, else in `~/.cache/diffstride`) under a digest of the images' bytes and of their
    preparation. A set that is larger than `cache_gb` when decoded is streamed: its images stay compressed in the Arrow
    files (or the image folder) and are decoded batch by batch, in `num_workers` processes.

    All images come out as RGB: grey and palette images are converted, transparency is dropped. They are normalised by
    the mean and deviation of the train split's channels; streamed ones by ImageNet's.

    Args:
        path: a name on the hub (`cifar10`), or a local path, from which nothing is downloaded: a folder with
            `train.parquet` and `test.parquet` (or the hub's `train-00000-of-00001.parquet`, also under `data/`), a
            folder of images (`train/<class>/*.png`), or one parquet file, whose only split is `train`.
        image_column: the column of images; found by its type when not given.
        label_column: the column of classes; found by its type when not given.
        train_split: the split to train on.
        test_split: the split to evaluate on. Where the set has no `test` or leaves it unlabelled (ImageNet), its
            `validation` split serves.
        batch_size: samples per batch and rank.
        image_size: resize the shorter side to this and keep the middle square. Needed where sizes differ.
        train_samples: train on a random subset of this many images, with classes as equal in number as they can be.
            It depends on the seed alone, and a smaller subset is a part of a larger one. All of them when not given.
        test_samples: likewise for the test split.
        augment: what is done to training images at random; nothing when not given.
        cache_gb: decode once and keep, if both splits take no more than this many gigabytes decoded; else stream.
        num_workers: processes that decode streamed images; cached sets need none.
        seed: of the subset, the order and the augmentation.
        subset: the hub's name for one of several configurations of a set; rarely needed.
    """

    def __init__(
        self,
        path: str,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
        batch_size: int = 128,
        image_size: int | None = None,
        train_samples: int | None = None,
        test_samples: int | None = None,
        augment: Augment | None = None,
        cache_gb: float = 4.0,
        num_workers: int = 0,
        seed: int = 0,
        subset: str | None = None,
    ) -> None:
        super().__init__(
            path, image_column, label_column, train_split, test_split, batch_size, train_samples, test_samples,
            cache_gb, num_workers, seed, subset,
        )  # fmt: skip
        _check.an_instance("image_column", image_column, (str, type(None)), "a text or None")
        if image_size is not None:
            at_least("image_size", image_size, 1)
        _check.an_instance("augment", augment, (Augment, type(None)), "an Augment or None")
        self.decoder = ImageDecoder(image_size)
        self.settings = augment or Augment()

    def augment(self, inputs: Tensor, labels: Tensor) -> Batch:
        """Apply the settings' random changes."""
        return self.settings(inputs, labels, self.num_classes)

    def prepare_evaluation(self, inputs: Tensor) -> Tensor:
        """Take the middle square where training crops."""
        return self.settings.center(inputs)

    def settle(self, train: Split, test: Split) -> None:
        """All images must be of one size, and a crop must fit."""
        if train.shape != test.shape:
            raise DataError(
                f"{train.name} images are {_size(train.shape)} and {test.name} images {_size(test.shape)}: "
                "set image_size so that all are resized"
            )
        crop = self.settings.resized_crop
        self.sample_shape = train.shape if crop is None else (3, crop, crop)
        self.settings.center(torch.empty(1, *train.shape))  # a crop that does not fit is known before training

    def statistics(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Of the channels."""
        sample = sample.double().div_(255)
        return sample.mean((0, 2, 3)).float(), sample.std((0, 2, 3)).clamp_min(1 / 255).float()

    def streamed_statistics(self, train: Split) -> tuple[Tensor, Tensor]:
        """ImageNet's."""
        return torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)


@dataclass(frozen=True)
class ImageDecoder:
    """From an image file to pixels `[3, H, W]`: RGB, upright.

    Args:
        image_size: resize the shorter side to this and keep the middle square; None: as it is.
    """

    image_size: int | None = None
    noun: ClassVar[str] = "image"
    option: ClassVar[str] = "image_column"
    feature: ClassVar[str] = "Image"

    @property
    def key(self) -> str:
        """Of the way of decoding."""
        return f"{_DECODING} {self.image_size}"

    def __call__(self, content: bytes) -> Pixels:
        """The pixels."""
        try:
            with PIL.Image.open(io.BytesIO(content)) as image:
                upright = _upright_rgb(image)
        except (OSError, SyntaxError, ValueError, struct.error, PIL.Image.DecompressionBombError) as error:
            raise DataError(first_line(error).split("<_io")[0].strip()) from error
        if self.image_size is not None:
            upright = _resize(upright, self.image_size)
        return np.ascontiguousarray(np.asarray(upright).transpose(2, 0, 1))

    def misfit(self, shape: Sequence[int], first: Sequence[int]) -> str:
        """Sizes that differ."""
        return f"the image is {_size(shape)} but the first is {_size(first)}: set image_size so that all are resized"


def _upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
        return PIL.ImageOps.exif_transpose(image).convert("RGB")


def _resize(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The shorter side to `size`, then the middle square."""
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-2]}x{shape[-1]}"
