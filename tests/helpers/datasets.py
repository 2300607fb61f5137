"""Shared parts of tests of data sets: epochs, ranks, images, and the layouts of sets of files."""

import io
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

CLASSES = ["bird", "cat", "dog"]


def epoch(data, number=0):
    """Return the batches of an epoch of training."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def place(data, world, rank, **more):
    """Return the data as one of several processes has it."""
    data.trainer = SimpleNamespace(world_size=world, global_rank=rank, **more)
    return data


def picture(seed, size=(8, 8), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def pixels_of(content):
    return torch.from_numpy(np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB")).copy()).permute(2, 0, 1)


def write(path, contents, labels, file="img", label="label", kind="Image", names=CLASSES, **more):
    """Write a parquet file like those of the hub."""
    datasets = pytest.importorskip("datasets")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {file: getattr(datasets, kind)(), label: datasets.ClassLabel(names=names)}
    features |= {name: feature for name, (feature, _) in more.items()}
    columns = {file: [{"bytes": content, "path": f"{i}.file"} for i, content in enumerate(contents)], label: labels}
    columns |= {name: values for name, (_, values) in more.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=datasets.Features(features).arrow_schema), path)


def image_set(path):
    """Write 30 + 9 JPEG images in the hub's layout, and return their bytes with the path."""
    contents = {"train": [encoded(picture(i), "JPEG") for i in range(30)]}
    contents["test"] = [encoded(picture(100 + i), "JPEG") for i in range(9)]
    for split, files in contents.items():
        write(path / f"{split}.parquet", files, [i % 3 for i in range(len(files))])
    return SimpleNamespace(path=path, **contents)


def ready(path, **options):
    """Return loaded `ImageData`."""
    from diffstride.experiments.data import ImageData

    data = ImageData(str(path), **{"batch_size": 4, **options})
    data.setup()
    return data
