"""The cache: whatever was damaged or changed in place, samples and fingerprint are those of the files as they are."""

import errno
import io
import os
import time

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("datasets")

from diffstride.experiments.data import DataError, ImageData
from diffstride.experiments.data import cache as module


def bitmap(value):
    """An uncompressed image: all have one size in bytes."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "BMP")
    return buffer.getvalue()


def folder(path):
    for split, values in ("train", (1, 2, 3)), ("test", (4, 5, 6)):
        for i, value in enumerate(values):
            file = path / split / "ab"[i % 2] / f"{i}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bitmap(value))
    return path / "train" / "a" / "0.bmp"


def table(path):
    path.mkdir()
    for split, values in ("train", (1, 2, 3)), ("test", (4, 5, 6)):
        columns = {"image": [{"bytes": bitmap(value), "path": None} for value in values], "label": [0, 1, 0]}
        pq.write_table(pa.table(columns), path / f"{split}.parquet", compression="none", use_dictionary=False)
    return path / "train.parquet"


def named(path):
    """A table that only names its files."""
    changed = folder(path / "files")
    for split in ("train", "test"):
        files = sorted((path / "files" / split).rglob("*.bmp"))
        columns = {"image": [{"bytes": None, "path": str(file)} for file in files], "label": [0, 0, 1]}
        pq.write_table(
            pa.table(columns, pa.schema([("image", IMAGE), ("label", pa.int64())])), path / f"{split}.parquet"
        )
    return changed


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def ready(path, **options):
    data = ImageData(str(path), batch_size=2, **options)
    data.setup()
    return data


def values(data):
    samples = data.train_set[0] if isinstance(data.train_set, tuple) else data.train_set.__getitems__(range(3))[0]
    return sorted(samples.flatten(1).float().mean(1).tolist())


@pytest.fixture(params=["recent", "old"])
def age(request, monkeypatch):
    """Files whose digests are remembered from the first start on, and files that are too new for that."""
    if request.param == "old":
        monkeypatch.setattr(module, "_RECENT", 0)
    return lambda: time.sleep(0.02)  # the clock of files is coarse


@pytest.mark.parametrize("cache_gb", [4, 0])
@pytest.mark.parametrize("build", [folder, table, named])
def test_a_file_changed_in_place_with_its_size_and_time_is_noticed(tmp_path, cache, age, build, cache_gb):
    changed = build(tmp_path / "set")
    age()
    first = ready(tmp_path / "set", cache_gb=cache_gb)
    assert ready(tmp_path / "set", cache_gb=cache_gb).fingerprint == first.fingerprint
    before, content = changed.stat(), changed.read_bytes()
    with changed.open("r+b") as file:
        file.write(content.replace(bitmap(1), bitmap(77)))
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = changed.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    age()
    second = ready(tmp_path / "set", cache_gb=cache_gb)
    assert values(second) == [2, 3, 77]
    assert second.fingerprint != first.fingerprint


def damage(file, kind):
    content = bytearray(file.read_bytes())
    before = file.stat()
    if kind == "a bit":
        content[len(content) // 2] ^= 1
    elif kind == "the end":
        content[-1] ^= 1
    elif kind == "zeros":
        content[64:] = bytes(len(content) - 64)
    elif kind == "cut":
        del content[-100:]
    elif kind == "empty":
        content.clear()
    elif kind == "another":
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((3, 3, 8, 8), np.uint8))
        content = buffer.getvalue()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("kind", ["a bit", "the end", "zeros", "cut", "empty", "another"])
@pytest.mark.parametrize("entries", ["*.npy", "sources/*.arrow", "sources/*"])
def test_damaged_entries_are_made_again(tmp_path, cache, age, entries, kind):
    table(tmp_path / "set")
    age()
    first = ready(tmp_path / "set")
    found = list(cache.glob(entries))
    assert len(found) >= 2
    for file in found:
        damage(file, kind)
    age()
    second = ready(tmp_path / "set")
    assert values(second) == [1, 2, 3]
    assert second.fingerprint == first.fingerprint
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize("entries", ["*.npy", "sources/*.arrow", "sources/*"])
def test_a_folder_in_the_place_of_an_entry_is_described(tmp_path, cache, age, entries):
    table(tmp_path / "set")
    age()
    first = ready(tmp_path / "set")
    for file in cache.glob(entries):
        file.unlink()
        file.mkdir()
    age()
    with pytest.raises(DataError, match=r"cannot write to the cache .* \(Is a directory\): set DIFFSTRIDE_CACHE"):
        ready(tmp_path / "set")
    for file in cache.glob("**/*.*"):
        file.rmdir() if file.is_dir() else None
    assert ready(tmp_path / "set").fingerprint == first.fingerprint  # folders in the place of notes do no harm


@pytest.mark.parametrize("cache_gb", [4, 0])
def test_a_cache_that_cannot_be_written_is_described(tmp_path, cache, monkeypatch, cache_gb):
    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    table(tmp_path / "set")
    monkeypatch.setattr(module, "atomic_path", refuse)
    with pytest.raises(DataError, match=r"cannot write to the cache .* \(Permission denied\): set DIFFSTRIDE_CACHE"):
        ready(tmp_path / "set", cache_gb=cache_gb)


def test_an_old_file_is_read_once(tmp_path, cache, monkeypatch):
    """Sets may have many gigabytes."""
    monkeypatch.setattr(module, "_RECENT", 0)
    folder(tmp_path / "set")
    table(tmp_path / "table")
    time.sleep(0.02)
    streams = [(tmp_path / name, ready(tmp_path / name, cache_gb=0).fingerprint) for name in ("set", "table")]
    time.sleep(0.02)
    ready(tmp_path / "table", cache_gb=0)  # finds that what it wrote is intact

    def refuse(*arguments):
        raise AssertionError("read again")

    monkeypatch.setattr("hashlib.file_digest", refuse)
    monkeypatch.setattr(module, "_is_intact", lambda path: path.suffix != ".arrow" or refuse())
    for path, fingerprint in streams:
        assert ready(path, cache_gb=0).fingerprint == fingerprint


@pytest.mark.parametrize("cache_gb", [4, 0])
@pytest.mark.parametrize("build", [folder, table])
def test_a_cache_that_can_only_be_read_serves_what_it_has(tmp_path, cache, age, monkeypatch, build, cache_gb):
    build(tmp_path / "set")
    first = ready(tmp_path / "set", cache_gb=cache_gb)
    age()

    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(module, "atomic_path", refuse)
    monkeypatch.setattr("pathlib.Path.touch", refuse)
    assert ready(tmp_path / "set", cache_gb=cache_gb).fingerprint == first.fingerprint


def test_a_stream_of_another_subset_has_another_fingerprint(tmp_path, cache):
    table(tmp_path / "set")
    subsets = [ready(tmp_path / "set", cache_gb=0, train_samples=1, seed=seed) for seed in range(8)]
    seen = {
        (data.fingerprint, float(data.train_set[0][0].float().mean())) for data in subsets if data.train_set[0][1] == 0
    }
    assert len(seen) == len({fingerprint for fingerprint, _ in seen}) == len({value for _, value in seen}) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
@pytest.mark.parametrize("cache_gb", [4, 0])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "broken link", "nothing"])
@pytest.mark.parametrize("place", ["in a class", "named by a table"])
def test_regular_files_only_are_read(tmp_path, cache, place, kind, cache_gb):
    bad = tmp_path / "set" / "train" / "a" / "9.bmp"
    folder(tmp_path / "set")
    if kind == "pipe":
        os.mkfifo(bad)
    elif kind == "device":
        bad.symlink_to("/dev/zero")
    elif kind == "broken link":
        bad.symlink_to("nowhere")
    elif kind == "folder" and place == "named by a table":
        bad.mkdir()
    path = tmp_path / "set"
    if place == "named by a table":
        path = tmp_path / "table"
        path.mkdir()
        columns = {"image": [{"bytes": None, "path": str(bad)}], "label": [0]}
        for split in ("train", "test"):
            pq.write_table(
                pa.table(columns, pa.schema([("image", IMAGE), ("label", pa.int64())])), path / f"{split}.parquet"
            )
    elif kind in ("folder", "nothing"):
        pytest.skip("not seen by the scan")
    with pytest.raises(DataError, match=r"9\.bmp\b.*\((Not a regular file|No such file or directory|Is a directory)\)"):
        ready(path, cache_gb=cache_gb)
    for given in ("/dev/zero", bad):
        with pytest.raises(DataError, match=r"cannot be read \("):
            ImageData(str(path)).read(given)
