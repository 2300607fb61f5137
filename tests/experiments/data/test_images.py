"""Image sets: what comes out is what PIL reads from the files, in an order that is a function of seed and epoch."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from tests.helpers.datasets import epoch, layouts, place

datasets = pytest.importorskip("datasets")

from diffstride.experiments.data import Augment, ClassificationData, DataError, ImageData  # noqa: E402
from diffstride.experiments.data import hub as module  # noqa: E402

CIFAR10 = Path(__file__).parents[4] / "shared" / "data" / "cifar10"
CLASSES = ["bird", "cat", "dog"]
pytestmark = pytest.mark.usefixtures("cache")


def picture(seed, size=(8, 8), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def pixels_of(content):
    return torch.from_numpy(np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB")).copy()).permute(2, 0, 1)


def write(path, contents, labels, image="img", label="label", **more):
    features = datasets.Features(
        {image: datasets.Image(), label: datasets.ClassLabel(names=CLASSES)}
        | {name: feature for name, (feature, _) in more.items()}
    )
    columns = {image: [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)], label: labels}
    columns |= {name: values for name, (_, values) in more.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


@pytest.fixture
def folder(tmp_path):
    """30 + 9 JPEG images in the hub's layout; `contents` are their bytes."""
    contents = {"train": [encoded(picture(i), "JPEG") for i in range(30)]}
    contents["test"] = [encoded(picture(100 + i), "JPEG") for i in range(9)]
    path = tmp_path / "set"
    for split, files in contents.items():
        write(path / f"{split}.parquet", files, [i % 3 for i in range(len(files))])
    return SimpleNamespace(path=path, **contents)


def ready(path, **options):
    options.setdefault("batch_size", 4)
    data = ImageData(str(path), **options)
    data.setup()
    return data


def test_pixels_and_labels_are_those_of_the_files(folder):
    data = ready(folder.path)
    for split, contents in ((data.train_set, folder.train), (data.test_set, folder.test)):
        assert torch.equal(split[0], torch.stack([pixels_of(content) for content in contents]))
        assert split[1].tolist() == [i % 3 for i in range(len(contents))]
    assert (data.num_classes, data.sample_shape) == (3, (3, 8, 8))


LAYOUTS = layouts(write, CLASSES, ".png")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    files = [encoded(picture(i)) for i in range(9)]
    layout(tmp_path / "set", files)
    data = ready(tmp_path / "set")
    for (pixels, labels), expected in ((data.train_set, files[:6]), (data.test_set, files[6:])):
        found = {(image.numpy().tobytes(), label) for image, label in zip(pixels, labels.tolist(), strict=True)}
        first = files.index(expected[0])
        assert found == {(pixels_of(f).numpy().tobytes(), (first + i) % 3) for i, f in enumerate(expected)}


@pytest.mark.parametrize("name", ["test", "train/validation"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_folders_own_name_says_nothing_about_splits(tmp_path, layout, name):
    layout(tmp_path / name, [encoded(picture(i)) for i in range(9)])
    data = ready(tmp_path / name)
    assert (len(data.train_set[1]), len(data.test_set[1])) == (6, 3)


def test_one_parquet_file_without_the_hubs_metadata(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents = [encoded(picture(i)) for i in range(6)]
    table = pa.table({"image": [{"bytes": c, "path": None} for c in contents], "class": [3, 7, 9, 3, 7, 9]})
    pq.write_table(table, tmp_path / "some.parquet")
    data = ready(tmp_path / "some.parquet", test_split="train[:50%]")
    assert torch.equal(data.train_set[0], torch.stack([pixels_of(content) for content in contents]))
    assert data.train_set[1].tolist() == [0, 1, 2, 0, 1, 2]
    assert data.num_classes == 3
    assert torch.equal(data.test_set[0], data.train_set[0][:3])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    contents = [encoded(picture(i, mode=mode), kind) for i in range(4)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", contents, [0, 1, 2, 0])
    assert torch.equal(ready(tmp_path).train_set[0], torch.stack([pixels_of(content) for content in contents]))


def test_image_size_resizes_the_shorter_side_and_keeps_the_middle(tmp_path):
    tall, wide = picture(0, (16, 8)), picture(1, (8, 12))
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [encoded(tall), encoded(wide)] * 2, [0, 1, 2, 0])
    data = ready(tmp_path, image_size=4)
    expected = [
        np.asarray(tall.resize((4, 8), PIL.Image.Resampling.BILINEAR))[2:6],
        np.asarray(wide.resize((6, 4), PIL.Image.Resampling.BILINEAR))[:, 1:5],
    ]
    assert data.sample_shape == (3, 4, 4)
    for pixels, array in zip(data.train_set[0], expected, strict=False):
        np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), array.astype(int), atol=1)


def test_a_second_start_does_not_decode(folder, cache, monkeypatch):
    first = ready(folder.path)
    written = {file: file.stat().st_mtime_ns for file in cache.glob("*.npy")}
    assert len(written) == 2

    def decode(*args):
        raise AssertionError("decoded again")

    monkeypatch.setattr(module.Split, "decode", decode)
    second = ready(folder.path)
    assert torch.equal(first.train_set[0], second.train_set[0])
    assert second.fingerprint == first.fingerprint
    assert {file: file.stat().st_mtime_ns for file in cache.glob("*.npy")} == written
    ready(folder.path, batch_size=2, seed=7, augment=Augment(flip=True))  # none of these touches the pixels
    with pytest.raises(AssertionError, match="decoded again"):
        ready(folder.path, image_size=6)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other shape", "noise"])
def test_a_damaged_cache_is_rebuilt(folder, cache, damage):
    expected = ready(folder.path).train_set[0].clone()
    for file in cache.glob("*.npy"):
        content = file.read_bytes()
        if damage == "other shape":
            np.save(file, np.zeros((3, 3, 8, 8), dtype=np.uint8))
        else:
            file.write_bytes({"truncated": content[:-100], "empty": b"", "noise": b"noise" * 99}[damage])
    assert torch.equal(ready(folder.path).train_set[0], expected)


def test_fingerprint_follows_content_and_preparation_only(folder, tmp_path):
    original = ready(folder.path).fingerprint
    assert ready(folder.path, image_size=4).fingerprint != original
    assert ready(folder.path, train_samples=12).fingerprint != original
    assert ready(folder.path, batch_size=3, augment=Augment(flip=True)).fingerprint == original

    labels = [i % 3 for i in range(30)]
    moved = tmp_path / "elsewhere"
    write(moved / "train.parquet", folder.train, labels)
    write(moved / "test.parquet", folder.test, labels[:9])
    assert ready(moved).fingerprint == original
    write(moved / "train.parquet", folder.train, [1, *labels[1:]])
    relabelled = ready(moved)
    assert relabelled.fingerprint != original
    assert relabelled.train_set[1][0] == 1
    write(moved / "train.parquet", [*folder.train[:29], encoded(picture(999))], labels)
    changed = ready(moved)
    assert changed.fingerprint != original
    assert torch.equal(changed.train_set[0][29], pixels_of(encoded(picture(999))))


@pytest.mark.long
def test_fingerprint_is_the_same_in_another_process(folder, cache):
    code = f"""
import sys
from diffstride.experiments.data import ImageData
assert not {{"datasets", "kornia"}} & set(sys.modules), "slow imports that generated sets do not need"
data = ImageData({str(folder.path)!r})
data.setup()
print(data.fingerprint)
"""
    environment = os.environ | {"DIFFSTRIDE_CACHE": str(cache / "other"), "PYTHONHASHSEED": "5"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert out.stdout.strip() == ready(folder.path).fingerprint


def test_order_is_a_function_of_seed_and_epoch(folder):
    def order(seed, number, noise):
        torch.manual_seed(noise)
        return torch.cat([inputs for inputs, _ in epoch(ready(folder.path, seed=seed), number)])

    assert torch.equal(order(0, 0, 1), order(0, 0, 2))
    assert not torch.equal(order(0, 0, 1), order(0, 1, 1))
    assert not torch.equal(order(0, 0, 1), order(1, 0, 1))


def test_every_sample_is_seen_once_per_epoch(folder):
    batches = epoch(ready(folder.path, batch_size=5), 3)
    assert [len(labels) for _, labels in batches] == [5] * 6
    seen = sorted(image.numpy().tobytes() for inputs, _ in batches for image in inputs)
    assert seen == sorted(pixels_of(content).numpy().tobytes() for content in folder.train)


def test_ranks_see_disjoint_shards_that_cover_the_set(folder):
    shards = []
    for rank in range(3):
        data = place(ready(folder.path, batch_size=5), 3, rank)
        shards.append({image.numpy().tobytes() for inputs, _ in epoch(data, 1) for image in inputs})
    assert [len(shard) for shard in shards] == [10, 10, 10]
    assert len(set.union(*shards)) == 30
    tests = [torch.cat([x for x, _ in place(ready(folder.path), 3, rank).test_dataloader()]) for rank in range(3)]
    expected = torch.stack([pixels_of(content) for content in folder.test])
    assert all(torch.equal(shard, expected[rank::3]) for rank, shard in enumerate(tests))


def test_evaluation_serves_the_test_split_in_its_order(folder):
    data = ready(folder.path)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [4, 4, 1]
        assert torch.equal(torch.cat([x for x, _ in batches]), data.test_set[0])


def test_subsets_are_balanced_nested_and_follow_the_seed(tmp_path):
    labels = [0] * 20 + [1] * 5 + [2] * 15
    contents = [encoded(picture(i)) for i in range(40)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", contents, labels)
    small = ready(tmp_path, train_samples=13, test_samples=6)
    assert torch.bincount(small.train_set[1]).tolist() in ([5, 4, 4], [4, 5, 4], [4, 4, 5])
    assert torch.bincount(small.test_set[1]).tolist() == [2, 2, 2]
    large = ready(tmp_path, train_samples=25)
    assert torch.bincount(large.train_set[1]).tolist() == [10, 5, 10]

    def files(data):
        return {image.numpy().tobytes() for image in data.train_set[0]}

    assert files(small) < files(large)
    assert files(small) == files(ready(tmp_path, train_samples=13))
    assert files(small) != files(ready(tmp_path, train_samples=13, seed=1))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_streaming_gives_the_samples_of_the_cache(folder, cache, workers):
    options = {"train_samples": 20, "image_size": 6, "seed": 3}
    cached = ready(folder.path, **options)
    streamed = ready(folder.path, cache_gb=1e-6, num_workers=workers, **options)
    assert not isinstance(streamed.train_set, tuple)
    for ours, theirs in zip(epoch(streamed, 2), epoch(cached, 2), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert streamed.sample_shape == cached.sample_shape
    assert streamed.fingerprint == ready(folder.path, cache_gb=1e-6, **options).fingerprint


def test_streaming_writes_no_cache(folder, cache):
    ready(folder.path, cache_gb=0)
    assert not list(cache.glob("*.npy"))


def test_evaluation_normalises_by_the_statistics_of_the_train_split(folder):
    data = ready(folder.path)
    raw = torch.stack([pixels_of(content) for content in folder.train]).double() / 255
    inputs, labels = data.prepare_batch(data.test_set)
    mean, std = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(inputs.double(), (data.test_set[0].double() / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    assert inputs.dtype == torch.float32
    assert labels is data.test_set[1]


def test_random_augmentation_is_a_function_of_seed_step_and_rank(folder):
    data = ready(folder.path, augment=Augment(pad_crop=2, flip=True, mixup=0.5))
    batch = epoch(data)[0]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    inputs, targets = data.prepare_batch(batch, step=5, rank=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = data.prepare_batch(batch, step=5, rank=1)
    assert torch.equal(again[0], inputs)
    assert torch.equal(again[1], targets)
    assert targets.shape == (4, 3)
    for other in ({"step": 6, "rank": 1}, {"step": 5, "rank": 0}):
        assert not torch.equal(data.prepare_batch(batch, **other)[0], inputs)
    data.seed = 1
    assert not torch.equal(data.prepare_batch(batch, step=5, rank=1)[0], inputs)


def test_the_hook_augments_in_training_only(folder):
    data = ready(folder.path, augment=Augment(pad_crop=2, mixup=0.5))
    batch = epoch(data)[0]
    plain = data.on_after_batch_transfer(batch, 0)
    same = SimpleNamespace(convert_input=lambda inputs: inputs.bfloat16())
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=7))
    place(data, 2, 1, training=True, fit_loop=loops, precision_plugin=same)
    inputs, targets = data.on_after_batch_transfer(batch, 0)
    expected = data.prepare_batch(batch, step=8, rank=1)
    assert torch.equal(inputs, expected[0].bfloat16())
    assert torch.equal(targets, expected[1])
    data.trainer.training = False
    assert torch.equal(data.on_after_batch_transfer(batch, 0)[0], plain[0].bfloat16())
    assert torch.equal(plain[1], batch[1])


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("accumulated", [1, 3])
def test_under_lightning_order_and_augmentation_follow_epoch_and_batch(folder, tmp_path, accumulated):
    import lightning

    class Recorder(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen, self.evaluated = [], []

        def training_step(self, batch, index):
            self.seen.append(batch)
            return self.weight * batch[0].sum()

        def validation_step(self, batch, index):
            self.evaluated.append(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    options = {"batch_size": 10, "augment": Augment(pad_crop=2, flip=True, mixup=0.3)}
    model = Recorder()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
        accumulate_grad_batches=accumulated,
    )  # fmt: skip
    trainer.fit(model, datamodule=ImageData(str(folder.path), **options))
    data = ready(folder.path, **options)
    expected = [data.prepare_batch(batch, step=step) for step, batch in enumerate([*epoch(data, 0), *epoch(data, 1)])]
    assert len(model.seen) == 6
    for ours, theirs in zip(model.seen, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert torch.equal(model.evaluated[0][0], data.prepare_batch(data.test_set)[0])


def test_resized_crop_sets_the_sample_shape(folder):
    data = ready(folder.path, augment=Augment(resized_crop=6))
    batch = epoch(data)[0]
    assert data.sample_shape == (3, 6, 6)
    assert data.prepare_batch(batch, step=0)[0].shape == data.prepare_batch(batch)[0].shape == (4, 3, 6, 6)


def test_a_set_generated_in_memory():
    class Generated(ClassificationData):
        def load(self):
            self.train_set = torch.arange(24.0).view(12, 2), torch.arange(12) % 3
            self.test_set = torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)
            self.num_classes = 3

    data = Generated(batch_size=4)
    data.setup()
    data.setup("test")
    assert data.sample_shape == (2,)
    assert len(data.fingerprint) == 32
    inputs, labels = data.prepare_batch(next(iter(data.train_dataloader())), step=0)
    assert torch.equal((inputs[:, 0] / 2).long() % 3, labels)


@pytest.fixture
def bad(tmp_path):
    """A set of 6 + 6 images with one file of the caller's at row 4 of train."""

    def build(content):
        files = [encoded(picture(i)) for i in range(6)]
        write(tmp_path / "bad" / "test.parquet", files, [0, 1, 2] * 2)
        files[4] = content
        write(tmp_path / "bad" / "train.parquet", files, [0, 1, 2] * 2)
        return tmp_path / "bad"

    return build


@pytest.mark.parametrize("content", [b"not an image", encoded(picture(0, (40, 40)))[:300], b""])
def test_a_corrupt_image_is_named_and_leaves_no_cache(bad, cache, content):
    with pytest.raises(DataError, match=r"^train split, row 4 \(4.png\): not a readable image .*: repair .*row$"):
        ready(bad(content))
    assert [file for file in cache.rglob("*") if file.suffix not in ("", ".arrow")] == []


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_corrupt_image_in_a_stream(bad, workers):
    data = ready(bad(b"not an image"), cache_gb=0, num_workers=workers, batch_size=6)
    with pytest.raises(DataError, match=r"\Atrain split, row 4 \(4.png\): not a readable image [^\n]*\Z"):
        epoch(data)


def test_a_corrupt_image_outside_the_subset_does_no_harm(bad):
    path = bad(b"not an image")
    rows = {
        tuple(module._balanced_subset(np.array([0, 1, 2] * 2), 3, seed, "train", "image")): seed for seed in range(20)
    }
    seed = next(seed for chosen, seed in rows.items() if 4 not in chosen)
    assert len(ready(path, train_samples=3, seed=seed).train_set[1]) == 3


def test_images_of_several_sizes(bad):
    with pytest.raises(DataError, match=r"row 4 .*the image is 8x9 but the first is 8x8: set image_size"):
        ready(bad(encoded(picture(0, (8, 9)))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "image"}, "no column 'image': set image_column to one of img, label"),
        ({"label_column": "fine"}, "no column 'fine': set label_column to one of img, label"),
        ({"image_column": "label"}, "column 'label' holds no images: set image_column to img"),
        ({"label_column": "img"}, "column 'img' holds no classes: set label_column to label"),
        ({"train_split": "trian"}, "no split 'trian': set train_split and test_split to two of train, test"),
        ({"train_samples": 31}, "train split has 30 images, not 31: lower"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"image_size": 0}, "image_size must be >= 1"),
        ({"num_workers": -1}, "num_workers must be >= 0"),
        ({"augment": Augment(resized_crop=9)}, "set image_size to at least 9"),
    ],
)
def test_wrong_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ready(folder.path, **options)


def test_a_batch_larger_than_the_set(folder):
    with pytest.raises(DataError, match="larger than the 30 training samples of a rank: lower batch_size"):
        ready(folder.path, batch_size=31).train_dataloader()


def test_two_columns_of_labels(tmp_path):
    coarse = datasets.ClassLabel(names=["a", "b"]), [0, 1, 1]
    for split in ("train", "test"):
        files = [encoded(picture(i)) for i in range(3)]
        write(tmp_path / f"{split}.parquet", files, [0, 1, 2], label="fine", coarse=coarse)
    with pytest.raises(DataError, match="fine, coarse could all be the label_column: set label_column to one of"):
        ready(tmp_path)
    data = ready(tmp_path, label_column="coarse")
    assert (data.num_classes, data.train_set[1].tolist()) == (2, [0, 1, 1])


def test_a_label_that_training_never_saw(tmp_path):
    for split, labels in ("train", ["x", "y"]), ("test", ["x", "z"]):
        word = datasets.Value("string"), labels
        write(tmp_path / f"{split}.parquet", [encoded(picture(i)) for i in range(2)], [0, 1], word=word)
    with pytest.raises(DataError, match="test split, row 1: word z is none of the 2 classes"):
        ready(tmp_path, label_column="word")


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/no-where-at-all", "nowhere.parquet"])
def test_a_missing_path(path):
    with pytest.raises(DataError, match="does not exist: check the path"):
        ready(path)


def test_paths_that_hold_no_set(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    for name, message in (
        (
            "empty",
            "empty has no images: it must be a folder with train.parquet and test.parquet, or with train/<class>",
        ),
        ("text.txt", "is not a parquet file"),
        ("broken.parquet", "could not read .*broken.parquet"),
    ):
        with pytest.raises(DataError, match=message):
            ready(tmp_path / name)


def test_the_hub_out_of_reach(monkeypatch):
    def unreachable(**options):
        assert options == {"path": "someone/something", "name": None}
        raise ConnectionError("Couldn't reach the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(DataError, match=r"from the hub \(Couldn't reach the Hub\): .* or give a local path"):
        ready("someone/something")


def test_a_local_folder_is_not_taken_for_the_hubs_set_of_its_name(folder, monkeypatch):
    ready(folder.path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"could not load 'set' from the hub \("):
        ready(folder.path.name)


def test_a_cache_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="set DIFFSTRIDE_CACHE to a writable folder"):
        ready(folder.path)


@pytest.mark.long
@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not at hand")
def test_cifar10():
    data = ready(CIFAR10, train_samples=500, test_samples=200, batch_size=50)
    rows = datasets.load_dataset("parquet", data_files=str(CIFAR10 / "test.parquet"), split="train")
    expected = {np.asarray(row["img"]).tobytes(): row["label"] for row in rows}
    assert torch.bincount(data.train_set[1]).tolist() == [50] * 10
    assert torch.bincount(data.test_set[1]).tolist() == [20] * 10
    for pixels, label in zip(data.test_set[0], data.test_set[1].tolist(), strict=True):
        assert expected[pixels.permute(1, 2, 0).numpy().tobytes()] == label
