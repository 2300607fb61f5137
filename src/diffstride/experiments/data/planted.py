"""Planted bands: images whose class depends on known frequencies, so that the right stride is known."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffstride import _validation
from diffstride.experiments.data.base import Batch, ClassificationData, DataError


class PlantedBands(ClassificationData):
    """Images whose class depends on known frequencies, one band for each axis, under nuisance of higher frequencies.

    Along each axis there is a wave and its harmonic, `cos(t) + s cos(2 t)`, `t = 2 pi (b/2) i / N + phase`. The sign
    `s` is a bit of the class. The harmonic has `b` cycles, the end of the band. The rest is the same for both classes:
    a network that loses the frequency `b` loses the bit. On an axis of `N` samples a stride up to `N / (2 b)` keeps the
    class inside the band of a spectral window (for the default, (4, 2)). A window with a ramp of `R` sees it,
    attenuated, up to a support `N / (2 S) + R > b`. Beyond, it has no gradient: the accuracy is 0.5 for one lost bit,
    0.25 for two.

    Above the band each image has meaningless waves, of random frequency from `nuisance` up along one axis and below 3
    cycles along the other, which strided layers fold onto the class, and white noise.

    Classes are `2 * bit along the height + bit along the width`. Images are `[1, H, W]`, float, periodic.

    Args:
        size: height and width.
        band: cycles per image that carry the class, along height and width; even, below half of the size.
        nuisance: lowest cycles per image of the nuisance along height and width.
        nuisance_waves: number of nuisance waves per axis.
        nuisance_amplitude: amplitude of each (the class's waves have 1).
        noise: standard deviation of the white noise.
        train_samples: number of training images.
        test_samples: number of test images.
        batch_size: images per batch.
        seed: seed of the images and of the order.
    """

    def __init__(
        self,
        size: Sequence[int] = (32, 32),
        band: Sequence[int] = (4, 8),
        nuisance: Sequence[int] = (8, 12),
        nuisance_waves: int = 4,
        nuisance_amplitude: float = 5.0,
        noise: float = 0.3,
        train_samples: int = 4096,
        test_samples: int = 1024,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        _validation.integer("train_samples", train_samples, 1)
        _validation.integer("test_samples", test_samples, 1)
        for n, b, lowest in zip(size, band, nuisance, strict=True):
            if b % 2 or not 0 < b < lowest <= n / 2:
                raise DataError(f"band must be even and 0 < band < nuisance <= size / 2, not {b}, {lowest} and {n} / 2")
        self.size, self.band, self.nuisance = tuple(size), tuple(band), tuple(nuisance)
        self.nuisance_waves, self.nuisance_amplitude, self.noise = nuisance_waves, nuisance_amplitude, noise
        self.train_samples, self.test_samples = train_samples, test_samples

    def stride_limits(self, smoothness: float) -> dict[str, tuple[float, float]]:
        """Return, by axis, the strides that put the band `b` at a window's edge and at its end.

        They are `N / (2 b)` and `N / (2 (b - smoothness))`.
        """
        return {
            axis: (n / (2 * b), n / (2 * (b - smoothness)) if b > smoothness else math.inf)
            for axis, n, b in zip(("height", "width"), self.size, self.band, strict=True)
        }

    def load(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.num_classes = 4
        self.train_set = self._draw(self.train_samples, generator)
        self.test_set = self._draw(self.test_samples, generator)

    def _draw(self, count: int, generator: torch.Generator) -> Batch:
        labels = torch.randint(4, (count,), generator=generator)
        images = self.noise * torch.randn(count, *self.size, generator=generator)
        for axis, bit in enumerate((labels // 2, labels % 2)):
            wave = self._waves(torch.full((count,), self.band[axis] // 2), axis, generator)
            harmonic = 2 * wave.square() - 1  # cos(2t)
            images += wave + (2 * bit - 1).view(-1, 1, 1) * harmonic
            for _ in range(self.nuisance_waves):
                high = torch.randint(self.nuisance[axis], self.size[axis] // 2 + 1, (count,), generator=generator)
                low = torch.randint(3, (count,), generator=generator)
                # A product of waves along the two axes is the sum of two oblique ones.
                product = self._waves(high, axis, generator) * self._waves(low, 1 - axis, generator)
                images += self.nuisance_amplitude * product
        return images[:, None], labels

    def _waves(self, cycles: Tensor, axis: int, generator: torch.Generator) -> Tensor:
        """Return one wave per image along `axis`, of random phase: `[count, H, 1]` or `[count, 1, W]`."""
        n = self.size[axis]
        phase = 2 * math.pi * torch.rand(len(cycles), 1, generator=generator)
        wave = torch.cos(2 * math.pi * cycles[:, None] * torch.arange(n) / n + phase)
        return wave.unsqueeze(2 - axis)
