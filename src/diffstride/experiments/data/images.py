"""Image-classification sets: names of the hub, parquet files and folders of images."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import torch
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    FILLORDER,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    TILELENGTH,
    TILEWIDTH,
    TiffImageFile,
)
from torch import Tensor

from diffstride import _validation
from diffstride.experiments.data.augment import Augment
from diffstride.experiments.data.base import Batch, DataError
from diffstride.experiments.data.hub import Split, StoredData
from diffstride.experiments.data.sources import first_line

Pixels = npt.NDArray[np.uint8]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DECODING = 3  # raise when decoding changes, so that older caches are not used
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")  # none starts another program
_MOST_PIXELS = 100_000_000
_OTHER_PLANES = (0, 8)  # grey in which 0 is white; L*a*b*, whose last two channels are signed
_NO_RANGE = "which have no defined range: convert it to 8 or 16 bits"


class ImageData(StoredData):
    """Images with one class each, from a name on the hub or from files.

    The set is decoded once into uint8 arrays that are kept in `$DIFFSTRIDE_CACHE` (else in
    `$XDG_CACHE_HOME/diffstride`, else in `~/.cache/diffstride`) under a digest of the images' bytes and of their
    preparation. A set that is larger than `cache_gb` when decoded is streamed: its images stay compressed in an Arrow
    file of the cache (or the image folder) and are decoded batch by batch, in `num_workers` processes.

    PNG, JPEG, GIF, BMP, WebP, TIFF, PBM, PGM, PPM and JPEG 2000 are read, by content. All images come out as 8-bit
    RGB: grey and palette images are converted, 9 to 16 bits are scaled to 8, transparency is dropped. Images of signed,
    32-bit or floating-point samples have no defined range and are refused. Images are normalised by the mean and
    deviation of the train split's channels; streamed ones by ImageNet's.

    Args:
        path: a name on the hub (`cifar10`), or a local path, from which nothing is downloaded: a folder with
            `train.parquet` and `test.parquet` (or the hub's `train-00000-of-00001.parquet`, also under `data/`), a
            folder of images (`train/<class>/*.png`), or one parquet file, whose only split is `train`.
        image_column: the column of images; found by its type when not given.
        label_column: the column of classes; when not given, that called `label` or `class`, else found by its type.
        train_split: the split to train on, or a part of one, such as `train[:90%]`.
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
        if image_size is not None:
            _validation.whole("image_size", image_size, 1)
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
    """A decoder from an image file to pixels `[3, H, W]`: RGB, 8 bits, upright.

    Args:
        image_size: resize the shorter side to this and keep the middle square; None: as it is.
    """

    image_size: int | None = None
    noun: ClassVar[str] = "image"
    option: ClassVar[str] = "image_column"
    feature: ClassVar[str] = "Image"
    suffixes: ClassVar[tuple[str, ...]] = (
        ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".pbm", ".pgm",
        ".ppm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
    )  # fmt: skip
    largest: ClassVar[int | None] = 2**30

    @property
    def key(self) -> str:
        """Text that differs where decoding differs."""
        return f"{_DECODING} {self.image_size}"

    def __call__(self, content: bytes | BinaryIO) -> Pixels:
        """Return the pixels."""
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata, which may be in any image
                with PIL.Image.open(file, formats=_FORMATS) as image:
                    pixels = _upright_rgb(image)
        except DataError:
            raise
        except PIL.UnidentifiedImageError as error:
            raise DataError(f"it is damaged, or its format is none of {', '.join(_FORMATS)}") from error
        except Exception as error:  # Pillow raises errors of many types for damaged files
            raise DataError(first_line(error).split("<_io")[0].strip() or type(error).__name__) from error
        if self.image_size is not None:
            pixels = _middle_square(pixels, self.image_size)
        return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))

    def misfit(self, shape: Sequence[int], first: Sequence[int]) -> str:
        """Return the message about two sizes that differ."""
        return f"the image is {_size(shape)} but the first is {_size(first)}: set image_size so that all are resized"


def _upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an opened image in 8-bit RGB. Its declared size and type are checked before it is decoded."""
    sizes, bits, inverted = [image.size], 16, False
    if isinstance(image, TiffImageFile):
        sizes.append((image.tag_v2.get(TILEWIDTH, 0), image.tag_v2.get(TILELENGTH, 0)))
        if set(image.tag_v2.get(SAMPLEFORMAT, (1,))) != {1}:
            raise DataError(f"its samples are signed or floating-point, {_NO_RANGE}")
        bits, inverted = image.tag_v2.get(BITSPERSAMPLE, (1,))[0], image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
        if image.tag_v2.get(PLANAR_CONFIGURATION) == 2 and not _has_plain_planes(image.tag_v2):
            raise DataError("it has separate planes that are not plain 8-bit ones: save it with interleaved channels")
    for width, height in sizes:
        if width * height > _MOST_PIXELS:
            raise DataError(f"it declares {width}x{height} pixels, above the limit of {_MOST_PIXELS:,}")
    if image.mode == "F" or bits > 16:
        raise DataError(f"its samples are floating-point or wider than 16 bits, {_NO_RANGE}")
    image.load()
    PIL.ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # grey of 9 to 16 bits, which Pillow itself would clip to 8
        levels = np.rint(np.arange(2**16).clip(max=2**bits - 1) * (255 / (2**bits - 1))).astype(np.uint8)
        image = PIL.Image.fromarray((255 - levels if inverted else levels)[np.asarray(image)])
    return image if image.mode == "RGB" else image.convert("RGB")


def _has_plain_planes(tags: Mapping[int, Any]) -> bool:
    """Return whether Pillow reads a TIFF image with separate planes correctly.

    It reads each uncompressed plane as unsigned 8-bit samples in which 0 is black. In a compressed image, it confuses
    the planes where a fourth channel is not declared.
    """
    colours = tags.get(PHOTOMETRIC_INTERPRETATION, 0)
    plain = tags.get(BITSPERSAMPLE, (1,))[0] == 8 and tags.get(FILLORDER, 1) == 1 and colours not in _OTHER_PLANES
    return plain and (EXTRASAMPLES in tags or colours != 2 or tags.get(SAMPLESPERPIXEL, 1) == 3)


def _middle_square(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """Return the middle square of an image whose shorter side is resized to `size`; the rest is never computed."""
    scale = size / min(image.size)
    edges = []
    for n in image.size:
        whole = max(size, round(n * scale))
        start = (whole - size) // 2
        edges.append((start * n / whole, min((start + size) * n / whole, n)))
    (left, right), (top, bottom) = edges
    return image.resize((size, size), PIL.Image.Resampling.BILINEAR, (left, top, right, bottom))


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-2]}x{shape[-1]}"
