"""Draw the layer step by step on one image: a file, or a test image of a set in the hub's layout.

python benchmarks/draw_layer.py ../shared/data/cifar10 docs/images/layer --index 15
"""

import argparse
from pathlib import Path

import torch
from matplotlib.image import imread

from diffstride.data import ImageData
from diffstride.nn import DiffStride2d
from diffstride.studies.figures import draw_layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="image file, or folder of an image set")
    parser.add_argument("out", type=Path, help="pictures to write, without suffix")
    parser.add_argument("--index", type=int, default=0, help="which test image of a set (default: 0)")
    parser.add_argument("--strides", type=float, nargs=2, default=(2.6, 1.7), help="along height and width")
    parser.add_argument("--smoothness", type=float, default=4.0, help="R, in cycles (default: 4)")
    options = parser.parse_args()
    layer = DiffStride2d(tuple(options.strides), options.smoothness)
    draw_layer(layer, read_image(options.image, options.index), options.out)


def read_image(path: Path, index: int) -> torch.Tensor:
    """`[1 or 3, H, W]` from 0 to 1."""
    if path.is_dir():
        data = ImageData(str(path), train_samples=1)
        data.setup()
        pixels = data.test_set[0][index]
        return pixels / 255
    pixels = torch.from_numpy(imread(path).copy())  # [H, W] or [H, W, channels]; floats, or bytes
    image = pixels / 255 if pixels.dtype == torch.uint8 else pixels
    return image[None] if image.ndim == 2 else image.movedim(-1, 0)[:3]


if __name__ == "__main__":
    main()
