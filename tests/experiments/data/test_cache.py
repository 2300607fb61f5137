"""The cache: after damage and after changes in place, samples and fingerprint are those of the files."""

import errno
import os
import time

import numpy as np
import PIL.Image
import pytest

from tests.helpers.datasets import encoded, ready, write

pytest.importorskip("datasets")

from diffstride.experiments.data import DataError
from diffstride.experiments.data import cache as module


def bitmap(value):
    """Return an uncompressed image: all have one size in bytes."""
    return encoded(PIL.Image.fromarray(np.full((8, 8, 3), value, np.uint8)), "BMP")


def folder(path, first=1):
    for split, values in ("train", (first, 2, 3)), ("test", (4, 5, 6)):
        for i, value in enumerate(values):
            file = path / split / "ab"[i % 2] / f"{i}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bitmap(value))


def table(path, first=1):
    for split, values in ("train", (first, 2, 3)), ("test", (4, 5, 6)):
        write(path / f"{split}.parquet", [bitmap(value) for value in values], [0, 1, 0])


def values(data):
    samples = data.train_set[0] if isinstance(data.train_set, tuple) else data.train_set.__getitems__(range(3))[0]
    return sorted(samples.flatten(1).float().mean(1).tolist())


@pytest.mark.parametrize("cache_gb", [4, 0])
@pytest.mark.parametrize("build", [folder, table])
def test_a_file_that_changed_is_noticed(tmp_path, cache, build, cache_gb):
    build(tmp_path / "set")
    first = ready(tmp_path / "set", batch_size=2, cache_gb=cache_gb)
    assert ready(tmp_path / "set", batch_size=2, cache_gb=cache_gb).fingerprint == first.fingerprint
    time.sleep(0.02)  # the clock of files is coarse
    build(tmp_path / "set", first=77)
    second = ready(tmp_path / "set", batch_size=2, cache_gb=cache_gb)
    assert values(second) == [2, 3, 77]
    assert second.fingerprint != first.fingerprint


def test_an_image_changed_in_place_with_its_size_and_time_is_noticed(tmp_path, cache):
    folder(tmp_path / "set")
    first = ready(tmp_path / "set", batch_size=2, cache_gb=0)
    file = tmp_path / "set" / "train" / "a" / "0.bmp"
    before = file.stat()
    time.sleep(0.02)
    file.write_bytes(bitmap(77))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = ready(tmp_path / "set", batch_size=2, cache_gb=0)
    assert values(second) == [2, 3, 77]
    assert second.fingerprint != first.fingerprint


DAMAGES = {
    "a bit": lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
    "the end": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "zeros": lambda content: content[:64] + bytes(len(content) - 64),
    "cut": lambda content: content[:-100],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_entries_are_written_again(tmp_path, cache, kind):
    table(tmp_path / "set")
    first = ready(tmp_path / "set", batch_size=2)
    entries = list(cache.glob("*.npy"))
    assert len(entries) == 2
    for file in entries:
        file.write_bytes(DAMAGES[kind](file.read_bytes()))
    second = ready(tmp_path / "set", batch_size=2)
    assert values(second) == [1, 2, 3]
    assert second.fingerprint == first.fingerprint
    assert not list(cache.rglob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_described(tmp_path, cache, monkeypatch):
    folder(tmp_path / "set")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"cannot write to the cache .*file/cache .*: set DIFFSTRIDE_CACHE"):
        ready(tmp_path / "set", batch_size=2)


def test_a_cache_that_can_only_be_read_serves_its_entries(tmp_path, cache, monkeypatch):
    folder(tmp_path / "set")
    first = ready(tmp_path / "set", batch_size=2)

    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(module, "atomic_path", refuse)
    assert ready(tmp_path / "set", batch_size=2).fingerprint == first.fingerprint


def test_files_of_a_stream_are_read_once(tmp_path, cache, monkeypatch):
    """Sets may have many gigabytes."""
    folder(tmp_path / "set")
    fingerprint = ready(tmp_path / "set", batch_size=2, cache_gb=0).fingerprint
    monkeypatch.setattr(module, "sha256", lambda *arguments: pytest.fail("read again"))
    assert ready(tmp_path / "set", batch_size=2, cache_gb=0).fingerprint == fingerprint
