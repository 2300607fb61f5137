"""Random changes to training images, on their device: crops and flips of kornia, and mixup."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn import functional as F

from diffstride import _validation
from diffstride.experiments.data.base import DataError


@dataclass(frozen=True)
class Augment:
    """Settings of the augmentation; calling it applies crop, flip and mixup, in this order.

    Args:
        pad_crop: pad each border by this many pixels, then crop back to the size at a random place; 0 for none.
        pad_mode: content of the border: black, or the mirrored image.
        resized_crop: crop a random part (8 to 100 % of the area, aspect ratio 3/4 to 4/3) and resize it to a square
            of this size, as usual on ImageNet; evaluation then takes the middle square of this size.
        flip: mirror every second image, left to right.
        mixup: alpha of Beta(alpha, alpha), from which each sample draws its share of another sample of the batch
            (Zhang et al. 2018). Targets become class probabilities. 0 for none.
        mixup_pairs: mix the first half of a batch with the second, so that two images make one, as the authors'
            program does. The network sees half of `batch_size`.
    """

    pad_crop: int = 0
    pad_mode: Literal["zeros", "reflect"] = "zeros"
    resized_crop: int | None = None
    flip: bool = False
    mixup: float = 0.0
    mixup_pairs: bool = False

    def __post_init__(self) -> None:
        _validation.integer("augment.pad_crop", self.pad_crop, 0)
        _validation.not_negative("augment.mixup", self.mixup)
        if self.resized_crop is not None and self.pad_crop:
            raise DataError("augment.resized_crop and augment.pad_crop exclude each other: set one of them")

    def __call__(self, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Augment a batch. Every random number comes from torch's global generator of the CPU.

        Args:
            images: float `[B, C, H, W]`, values from 0 to 1.
            labels: int64 `[B]`.
            num_classes: number of classes, K.

        Returns:
            The images, and the labels as they were or, with mixup, class probabilities `[B, K]`. With `mixup_pairs`, B
            is halved.
        """
        spatial = _spatial(self, images.shape[-2], images.shape[-1])
        if spatial is not None:
            images = spatial(images)
        if not self.mixup:
            return images, labels
        count = len(images) // 2 if self.mixup_pairs else len(images)
        other = torch.arange(count, 2 * count) if self.mixup_pairs else torch.randperm(count)
        share = Beta(self.mixup, self.mixup).sample((count, 1)).to(images)
        targets = F.one_hot(labels, num_classes).to(images.dtype)
        mixed, targets = ((1 - share) * own[:count] + share * own[other] for own in (images.flatten(1), targets))
        return mixed.view(count, *images.shape[1:]), targets

    def center(self, images: Tensor) -> Tensor:
        """Return the middle square of `resized_crop` pixels, or the images as they are, for evaluation."""
        if self.resized_crop is None:
            return images
        height, width = images.shape[-2:]
        top, left = (height - self.resized_crop) // 2, (width - self.resized_crop) // 2
        if min(top, left) < 0:
            cure = f"set image_size to at least {self.resized_crop}"
            raise DataError(f"augment.resized_crop {self.resized_crop} is above the images' {height}x{width}: {cure}")
        return images[..., top : top + self.resized_crop, left : left + self.resized_crop]


@lru_cache(maxsize=16)
def _spatial(settings: Augment, height: int, width: int) -> nn.Module | None:
    """Return kornia's modules for images of one size, or None where there is nothing to do."""
    from kornia import augmentation as kornia

    steps: list[Any] = []
    if settings.resized_crop is not None:
        steps.append(kornia.RandomResizedCrop((settings.resized_crop, settings.resized_crop), cropping_mode="slice"))
    if settings.pad_crop:
        mode = {"zeros": "constant", "reflect": "reflect"}[settings.pad_mode]
        steps.append(kornia.RandomCrop((height, width), settings.pad_crop, padding_mode=mode, cropping_mode="slice"))
    if settings.flip:
        steps.append(kornia.RandomHorizontalFlip(p=0.5))
    return kornia.AugmentationSequential(*steps, data_keys=["input"]) if steps else None
