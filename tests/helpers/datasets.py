"""What tests of data sets have in common: epochs, ranks, and the layouts that sets of files come in."""

from types import SimpleNamespace


def epoch(data, number=0):
    """The batches of an epoch of training."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def place(data, world, rank, **more):
    """The data as one of several processes has it."""
    data.trainer = SimpleNamespace(world_size=world, global_rank=rank, **more)
    return data


def layouts(write, classes, suffix):
    """Functions from a folder and nine files, of classes 0, 1, 2, 0, ..: six for training, then three for the test.

    Args:
        write: makes a parquet file: `write(path, contents, labels)`.
        classes: names of the folders of files.
        suffix: of the files in them.
    """

    def hub(path, files):
        write(path / "data" / "train-00000-of-00002.parquet", files[:3], [0, 1, 2])
        write(path / "data" / "train-00001-of-00002.parquet", files[3:6], [0, 1, 2])
        write(path / "data" / "test-00000-of-00001.parquet", files[6:], [0, 1, 2])

    def folders(path, files):
        for i, content in enumerate(files):
            name = path / ("train" if i < 6 else "test") / classes[i % 3] / f"{i}{suffix}"
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_bytes(content)

    def validation(path, files):
        write(path / "train.parquet", files[:6], [0, 1, 2] * 2)
        write(path / "validation.parquet", files[6:], [0, 1, 2])

    def unlabelled_test(path, files):
        validation(path, files)
        write(path / "test.parquet", files[:2], [-1, -1])

    return hub, folders, validation, unlabelled_test
