"""Image-classification sets: names of the hub, parquet files and folders of images."""

import io
import warnings
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import torch
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, PLANAR_CONFIGURATION, SAMPLEFORMAT
from torch import Tensor

from diffstride import _validation
from diffstride._text import one_line
from diffstride.experiments.data.augment import Augment
from diffstride.experiments.data.base import Batch, DataError
from diffstride.experiments.data.hub import HubData, Split

Pixels = npt.NDArray[np.uint8]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DECODING = 3  # raise when decoding changes, so that older caches are not used
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")  # none starts another program


class ImageData(HubData):
    """Images with one class each, from a name on the hub or from files.

    The set is decoded once into uint8 arrays that are kept in `$DIFFSTRIDE_CACHE` (else in
    `$XDG_CACHE_HOME/diffstride`, else in `~/.cache/diffstride`) under a digest of the images' bytes and of their
    preparation. A set that is larger than `cache_gb` when decoded is streamed: its images stay compressed and are
    decoded batch by batch, in `num_workers` processes.

    PNG, JPEG, GIF, BMP, WebP, TIFF, PBM, PGM, PPM and JPEG 2000 are read, by content. All images become 8-bit RGB: grey
    and palette images are converted, 16 bits are scaled to 8, transparency is dropped. Images of signed, 32-bit or
    floating-point samples have no defined range and are refused. Images are normalised by the mean and deviation of the
    train split's channels; streamed ones by ImageNet's.

    Args:
        path: a name on the hub (`cifar10`), a folder with `train.parquet` and `test.parquet`, a folder with
            `train/<class>/*.png` and `test/<class>/*.png`, or a parquet file. More in `HubData`.
        image_column: the column of images. The default is the only one of its type.
        image_size: resize the shorter side to this and keep the middle square. Needed where sizes differ.
        augment: random changes to training images; none by default.
        std: the deviations of red, green and blue by which images are divided, of values from 0 to 1. The default is
            that of the train split.
        options: further arguments of `HubData`.
    """

    def __init__(
        self,
        path: str,
        image_column: str | None = None,
        image_size: int | None = None,
        augment: Augment | None = None,
        std: tuple[float, float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, image_column, **options)
        if image_size is not None:
            _validation.integer("image_size", image_size, 1)
        self.image_size, self.decoder = image_size, ImageDecoder(image_size)
        self.settings = augment or Augment()
        self.given_std = None if std is None else _validation.positive("std", std)

    def augment(self, inputs: Tensor, labels: Tensor) -> Batch:
        return self.settings(inputs, labels, self.num_classes)

    def prepare_evaluation(self, inputs: Tensor) -> Tensor:
        return self.settings.center(inputs)

    def resizing_decoder(self) -> "ImageDecoder":
        height, width = self.sample_shape[1:]
        if height != width:
            raise DataError(f"images of training must be square to resize others to them, got {height} x {width}")
        return ImageDecoder(self.image_size or height)

    def check_splits(self, train: Split, test: Split) -> None:
        self.sample_shape = tuple(self.settings.center(torch.empty(train.first.shape)).shape)

    def statistics(self, train: Split, decoded: Tensor | None) -> tuple[Tensor, Tensor]:
        if decoded is None:
            mean, std = torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)
        else:
            counts = torch.zeros(decoded.shape[1], 256, dtype=torch.float64)  # of each value, by channel
            for block in torch.split(decoded, 256):  # a copy of all as floats would need eight times their memory
                counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in block.unbind(1)])
            values, number = torch.arange(256, dtype=torch.float64) / 255, counts[0].sum()
            mean = counts @ values / number
            std = ((counts * (values - mean[:, None]).square()).sum(1) / (number - 1)).sqrt().clamp_min(1 / 255)
            mean, std = mean.float(), std.float()
        return mean, std if self.given_std is None else torch.tensor(self.given_std)


@dataclass(frozen=True)
class ImageDecoder:
    """A decoder from an image file to pixels `[3, H, W]`: RGB, 8 bits, upright."""

    image_size: int | None = None  # resize the shorter side to this and keep the middle square
    media: ClassVar[str] = "image"
    suffixes: ClassVar[tuple[str, ...]] = (
        ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".pbm", ".pgm",
        ".ppm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
    )  # fmt: skip

    @property
    def key(self) -> str:
        return f"{_DECODING} {self.image_size}"

    def __call__(self, content: bytes | BinaryIO) -> Pixels:
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd metadata, which may be in any image
                warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
                with PIL.Image.open(file, formats=_FORMATS) as image:
                    pixels = _upright_rgb(image)
        except Exception as error:  # Pillow raises errors of many types for damaged files
            unknown = isinstance(error, PIL.UnidentifiedImageError)
            cause = f"it is damaged, or its format is none of {', '.join(_FORMATS)}" if unknown else one_line(error)
            raise DataError(cause) from error
        if self.image_size is not None:
            pixels = _middle_square(pixels, self.image_size)
        return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))


def _upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an opened image in 8-bit RGB."""
    tags = getattr(image, "tag_v2", None) or {}  # of TIFF
    wide = image.mode.startswith("I")  # grey of more than 8 bits, which Pillow itself would clip to 8
    unscaled = image.mode == "F" or set(tags.get(SAMPLEFORMAT, (1,))) != {1} or max(tags.get(BITSPERSAMPLE, (1,))) > 16
    # Pillow misreads separate planes and unusual greys.
    unusual = tags and wide and (tags[BITSPERSAMPLE] != (16,) or tags.get(PHOTOMETRIC_INTERPRETATION) != 1)
    if unscaled or unusual or tags.get(PLANAR_CONFIGURATION) == 2:
        raise DataError("its samples are signed, floats, wider than 16 bits or oddly stored: save it as PNG")
    image.load()
    PIL.ImageOps.exif_transpose(image, in_place=True)
    if wide:
        image = PIL.Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


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
