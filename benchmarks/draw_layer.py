"""Draw the layer step by step on one image: a file, or a test image of a set in the hub's layout.

python benchmarks/draw_layer.py ../shared/data/cifar10 docs/images/layer --index 15
"""

from pathlib import Path

import torch
from command_line import Parser, at_least, pictures
from matplotlib.image import imread

from diffstride.experiments.data import ImageData
from diffstride.experiments.figures.style import save
from diffstride.experiments.studies.pictures import draw_layer
from diffstride.nn import DiffStride2d


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("image", type=Path, help="image file, or folder of an image set")
    parser.add_argument("out", type=pictures, help="pictures to write, without suffix")
    parser.add_argument("--index", type=at_least(0), default=0, help="which test image of a set (default: 0)")
    parser.add_argument("--strides", type=float, nargs=2, default=(2.6, 1.7), help="along height and width")
    parser.add_argument("--smoothness", type=float, default=4.0, help="R, in cycles (default: 4)")
    options = parser.parse_args()
    with parser.mistakes():
        layer = DiffStride2d(tuple(options.strides), options.smoothness)
        image = read_image(options.image, options.index)
        save(draw_layer(layer, image), options.out)


def read_image(path: Path, index: int) -> torch.Tensor:
    """`[1 or 3, H, W]` from 0 to 1."""
    if path.is_dir():
        data = ImageData(str(path), train_samples=1)
        data.setup()
        images = data.test_set[0]
        if index >= len(images):
            raise ValueError(f"--index must be < {len(images)}, the test images of {path}, got {index}")
        return images[index] / 255
    pixels = torch.from_numpy(imread(path).copy())  # [H, W] or [H, W, channels]; floats, or bytes
    image = pixels if pixels.is_floating_point() else pixels.float() / torch.iinfo(pixels.dtype).max
    return image[None] if image.ndim == 2 else image.movedim(-1, 0)[:3]


if __name__ == "__main__":
    main()
