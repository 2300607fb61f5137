"""Wrong input to data sets and to what trains on them: one line that names the argument, the bound and the value.

As in test_wrong_input.py: at least five cases for each class, its methods and its use in a training included; which
these are is found by looking. `Axis` is a named tuple: what is wrong with one is told where a set that has it is loaded.
"""

import functools
import io
import math

import numpy as np
import PIL.Image
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from wrong import public, refuses

import diffstride as ds
from diffstride._check import UserError
from diffstride.data import (
    AudioData,
    Augment,
    Axis,
    BatchDataset,
    ClassificationData,
    DataError,
    ImageData,
    InMemory,
    LogMel,
    MultiTask,
    PlantedBands,
    SyntheticSounds,
)
from diffstride.models import TinyCNN
from diffstride.training import ClampStrides, Classifier, ExploreStrides, StrideHistory, WriteResult
from diffstride.training.fit import quiet

datasets = pytest.importorskip("datasets")
soundfile = pytest.importorskip("soundfile")
pytestmark = pytest.mark.usefixtures("cache", "sets")

ROOMS = "diffstride.data", "diffstride.training"
NAN, INF = math.nan, math.inf
X, Y = torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
WAVES = torch.zeros(2, 400)
SETS = {}
MODEL = TinyCNN(in_channels=1, num_classes=2)


def picture(size):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.zeros((size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def waves(samples):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(samples, dtype=np.int16), 8000, format="WAV")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Sets on disk, by what they are, each of a file in every class and split."""
    contents = {
        "images": ("png", picture(8), picture(8)), "sizes": ("png", picture(8), picture(9)),
        "no images": ("png", b"text", b"text"), "sounds": ("wav", waves(400), waves(400)),
        "no sounds": ("wav", b"text", b"text"), "no samples": ("wav", waves(0), waves(0)),
    }  # fmt: skip
    for name, (suffix, *splits) in contents.items():
        SETS[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
        for split, content in zip(("train", "test"), splits, strict=True):
            for label in "ab":
                file = SETS[name] / split / label / f"0.{suffix}"
                file.parent.mkdir(parents=True)
                file.write_bytes(content)
    SETS["no column"] = tmp_path_factory.mktemp("no-column") / "labels.parquet"
    datasets.Dataset.from_dict({"label": [0, 1]}).to_parquet(SETS["no column"])
    SETS["table"] = tmp_path_factory.mktemp("table") / "table"
    SETS["table"].write_text("step,rate\n1,0.1\n")


def loaded(data):
    data.setup()
    return data


def of_base(make):
    """Cases of the arguments that all data sets have."""
    return [
        (lambda: make(batch_size=0), DataError, r"batch_size must be at least 1, not 0"),
        (lambda: make(batch_size="8"), TypeError, r"batch_size must be an int, got '8'"),
        (lambda: make(batch_size=None), TypeError, r"batch_size must be an int, got None"),
        (lambda: make(batch_size=NAN), TypeError, r"batch_size must be an int, got nan"),
        (lambda: make(seed=-1), DataError, r"seed must be between 0 and 4294967295, not -1"),
        (lambda: make(seed=2**70), DataError, r"seed must be between 0 and 4294967295, not 1180"),
        (lambda: make(seed="0"), TypeError, r"seed must be an int, got '0'"),
        (lambda: make().train_dataloader(), DataError, r"has not loaded its samples: call setup\(\) first"),
        (lambda: make().val_dataloader(), DataError, r"has not loaded its samples: call setup\(\) first"),
        (lambda: make().test_dataloader(), DataError, r"has not loaded its samples: call setup\(\) first"),
        (lambda: make().prepare_batch(X), TypeError, r"batch must be two tensors, \(inputs, labels\), got a Tensor of"),
        (lambda: make().prepare_batch((X, None)), TypeError, r"batch must be two tensors, .*, got \(tensor"),
        (lambda: make().prepare_batch((X, Y), step="1"), TypeError, r"step must be an int, got '1'"),
        (lambda: make().prepare_batch((X, Y), step=-1), DataError, r"step must be 0 or more, not -1"),
    ]  # fmt: skip


def of_generated(make):
    """Cases of the sets that are made by code."""
    return [
        *of_base(make),
        (lambda: make(train_samples=0), DataError, r"train_samples must be at least 1, not 0"),
        (lambda: make(train_samples=None), TypeError, r"train_samples must be an int, got None"),
        (lambda: make(test_samples=2.5), TypeError, r"test_samples must be an int, got 2\.5"),
        (lambda: make(noise=-1), DataError, r"noise must be 0 or more and finite, not -1"),
        (lambda: make(noise=NAN), DataError, r"noise must be 0 or more and finite, not nan"),
        (lambda: make(noise="loud"), TypeError, r"noise must be a number, got 'loud'"),
        (lambda: make().stride_limits(None), TypeError, r"smoothness must be a number, got None"),
        (lambda: make().stride_limits(NAN), DataError, r"smoothness must be 0 or more and finite, not nan"),
        (lambda folder: make().read(folder / "file"), DataError, r"is not a set of files: none can be read like its s"),
        (lambda: loaded(make(batch_size=10**6)).train_dataloader(), DataError, r"batch_size 1000000 is larger than the"),
    ]  # fmt: skip


def of_stored(kind, noun, suffix):
    """Cases of the sets that are read from files; `noun` is what of."""
    column = {"image": "image_column", "sound": "audio_column"}[noun]
    good, bad = f"{noun}s", f"no {noun}s"

    def make(path="nowhere/at/all", **options):
        return kind(path, **options)

    return [
        *of_base(make),
        (lambda: make(None), TypeError, r"path must be a path or a name on the hub, got None"),
        (lambda: make([3]), TypeError, r"path must be a path or a name on the hub, got \[3\]"),
        (lambda: make(""), DataError, r"path must not be empty: give a local path, or a name on the hub"),
        (lambda: make(train_split=None), TypeError, r"train_split must be a text, got None"),
        (lambda: make(test_split=1), TypeError, r"test_split must be a text, got 1"),
        (lambda: make(**{column: 3}), TypeError, rf"{column} must be a text or None, got 3"),
        (lambda: make(label_column=["label"]), TypeError, r"label_column must be a text or None, got \['label'\]"),
        (lambda: make(subset=1), TypeError, r"subset must be a text or None, got 1"),
        (lambda: make(train_samples=0), DataError, r"train_samples must be at least 1, not 0"),
        (lambda: make(test_samples="all"), TypeError, r"test_samples must be an int, got 'all'"),
        (lambda: make(cache_gb=-1), DataError, r"cache_gb must be 0 or more and finite, not -1"),
        (lambda: make(cache_gb=NAN), DataError, r"cache_gb must be 0 or more and finite, not nan"),
        (lambda: make(cache_gb="4 GB"), TypeError, r"cache_gb must be a number, got '4 GB'"),
        (lambda: make(num_workers=-1), DataError, r"num_workers must be 0 or more, not -1"),
        (lambda: make(num_workers="2"), TypeError, r"num_workers must be an int, got '2'"),
        (lambda folder: loaded(make(folder / "none")), DataError, r"none does not exist: check the path, or give a name"),
        (lambda folder: loaded(make(folder / "full")), DataError, rf"full .*must be .*/<class>/<{noun}>$"),
        (lambda folder: loaded(make(folder / "file")), DataError, r"file is not a parquet file: give a .parquet file"),
        (lambda: loaded(make(SETS["no column"])), DataError, rf"no column looks like the {column}: set {column} to one"),
        (lambda: loaded(make(SETS[good], **{column: "it"})), DataError, rf"there is no column 'it': set {column} to one"),
        (lambda: loaded(make(SETS[good], label_column="lable")), DataError, r"no column 'lable': set label_column to one"),
        (lambda: loaded(make(SETS[good], train_split="trian")), DataError, r"has no split 'trian': set train_split and t"),
        (lambda: loaded(make(SETS[good], train_samples=9)), DataError, rf"the train split has 2 {noun}s, not 9: lower"),
        (lambda: loaded(make(SETS[bad])), DataError, rf"train split, row 0 \(.*\): not a readable {noun}"),
        (lambda: make().read(None), TypeError, r"file must be a path, got None"),
        (lambda folder: make().read(folder / "none"), DataError, r"none: cannot be read \(No such file or directory\)"),
        (lambda folder: make().read(str(folder)), DataError, r"cannot be read \(Is a directory\)"),
        (lambda folder: make().read(folder / "file"), DataError, rf"file: not a readable {noun} \("),
    ]  # fmt: skip


def of_sounds(make):
    """Cases of the lengths and features of sounds, told when they are given."""
    features = r"features must be a LogMel or None, got"
    return [
        (lambda: make(sample_rate=0), DataError, r"sample_rate must be above 0 and finite, not 0"),
        (lambda: make(sample_rate="8000"), TypeError, r"sample_rate must be an int, got '8000'"),
        (lambda: make(sample_rate=8000.5), TypeError, r"sample_rate must be an int, got 8000\.5"),
        (lambda: make(seconds=0), DataError, r"seconds must be above 0 and finite, not 0"),
        (lambda: make(seconds=INF), DataError, r"seconds must be above 0 and finite, not inf"),
        (lambda: make(seconds="1 s"), TypeError, r"seconds must be a number, got '1 s'"),
        (lambda: make(features="mel"), TypeError, rf"{features} 'mel'"),
        (lambda: make(features=LogMel), TypeError, rf"{features} the class LogMel"),
        (lambda: make(features={"bands": 16}), TypeError, rf"{features} \{{'bands': 16\}}"),
    ]


class Own(ClassificationData):
    """What it is told to have loaded."""

    def __init__(self, **left):
        super().__init__()
        self.left = left

    def load(self):
        vars(self).update(self.left)


def own(**left):
    pair = (X, Y)
    return Own(**{"train_set": pair, "test_set": pair, "num_classes": 2} | left)


class OwnDataset(BatchDataset):
    """Gives what it is told to."""

    def __init__(self, given=None, size=2):
        self.given, self.size = given, size

    def __len__(self):
        return self.size

    def __getitems__(self, indices):
        return self.given


def of_classification_data():
    def check(**left):
        return loaded(own(**left))

    def forgetful(name):
        data = own()
        del data.left[name]
        return loaded(data)

    def twice():
        data = own(num_classes=1)
        with pytest.raises(DataError):
            data.setup()
        data.setup()

    pair = r"must be two tensors, \(inputs, labels\), got"
    return [
        *of_base(ClassificationData),
        (lambda: ClassificationData().setup(), NotImplementedError, r"must have load, which sets train_set, test_set"),
        (lambda: forgetful("train_set"), DataError, r"Own\.load must set train_set: it did not"),
        (lambda: forgetful("test_set"), DataError, r"Own\.load must set test_set: it did not"),
        (lambda: forgetful("num_classes"), DataError, r"Own\.load must set num_classes: it did not"),
        (lambda: check(num_classes=0), DataError, r"num_classes must be at least 1, not 0"),
        (lambda: check(num_classes=2.0), TypeError, r"num_classes must be an int, got 2\.0"),
        (lambda: check(num_classes=1), DataError, r"labels of train_set must be from 0 to num_classes - 1, 0, not from 0 to 1"),
        (lambda: check(test_set=(X, Y - 1)), DataError, r"labels of test_set must be from 0 to .*, not from -1 to 0"),
        (twice, DataError, r"labels of train_set must be from 0 to num_classes - 1, 0, not from 0 to 1"),
        (lambda: check(train_set=(X, Y.float())), DataError, r"labels must be int64 .*, not torch\.float32 of shape \(4,"),
        (lambda: check(train_set=(X, Y[:3])), ValueError, r"inputs and labels differ in length: 4 and 3"),
        (lambda: check(train_set=(X[:0], Y[:0])), DataError, r"train_set must have samples, not 0"),
        (lambda: check(train_set=X), TypeError, rf"train_set {pair} a Tensor of shape"),
        (lambda: check(test_set=None), TypeError, rf"test_set {pair} None"),
        (lambda: check(classes=("cat",)), DataError, r"classes must be names of 2 classes, not \('cat',\)"),
        (lambda: check(mean=0.5), TypeError, r"mean must be a torch\.Tensor or None, got 0\.5"),
        (lambda: check(std=[1.0]), TypeError, r"std must be a torch\.Tensor or None, got \[1\.0\]"),
        (lambda: check(axes=("time",)), TypeError, r"axes must be a sequence of Axis, got 'time'"),
        (lambda: check(axes=Axis("time", 0.0, "Hz")), TypeError, r"axes must be a sequence of Axis, got 'time'"),
        (lambda: check(axes=(Axis("time", 0.0, "Hz"),)), DataError, r"spacing of the axis time must be above 0 .* not 0"),
        (lambda: check(axes=(Axis("time", "10 ms", "Hz"),)), TypeError, r"the axis time must be a number, got '10 ms'"),
        (lambda: check().train_dataloader(), DataError, r"batch_size 128 is larger than the 4 training samples of a rank"),
        (lambda folder: own().read(folder / "file"), DataError, r"Own is not a set of files: none can be read like"),
    ]  # fmt: skip


def of_augment():
    images, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    call = Augment(pad_crop=1, mixup=0.2)
    shape = r"images must be floating point of shape \[B, C, H, W\], not"
    return [
        (lambda: Augment(pad_crop=-1), DataError, r"augment\.pad_crop must be 0 or more, not -1"),
        (lambda: Augment(pad_crop=1.5), TypeError, r"augment\.pad_crop must be an int, got 1\.5"),
        (lambda: Augment(pad_crop="4"), TypeError, r"augment\.pad_crop must be an int, got '4'"),
        (lambda: Augment(pad_mode="reflct"), ValueError, r"pad_mode must be one of 'zeros', .*'reflct': did you mean ref"),
        (lambda: Augment(pad_mode=0), ValueError, r"augment\.pad_mode must be one of 'zeros', 'reflect', got 0"),
        (lambda: Augment(resized_crop=0), DataError, r"augment\.resized_crop must be at least 1, not 0"),
        (lambda: Augment(resized_crop=(8, 8)), TypeError, r"augment\.resized_crop must be an int, got \(8, 8\)"),
        (lambda: Augment(1, resized_crop=8), DataError, r"augment\.resized_crop and augment\.pad_crop exclude each other"),
        (lambda: Augment(flip="yes"), TypeError, r"augment\.flip must be True or False, got 'yes'"),
        (lambda: Augment(flip=0.5), TypeError, r"augment\.flip must be True or False, got 0\.5"),
        (lambda: Augment(mixup=NAN), DataError, r"augment\.mixup must be 0 or more and finite, not nan"),
        (lambda: Augment(mixup=INF), DataError, r"augment\.mixup must be 0 or more and finite, not inf"),
        (lambda: Augment(mixup="0.2"), TypeError, r"augment\.mixup must be a number, got '0\.2'"),
        (lambda: call(None, labels, 10), TypeError, r"images must be a torch\.Tensor, got None"),
        (lambda: call(images[0], labels, 10), DataError, rf"{shape} torch\.float32 of shape \(3, 8, 8\)"),
        (lambda: call(images.byte(), labels, 10), DataError, rf"{shape} torch\.uint8 of shape"),
        (lambda: call(images, [0] * 4, 10), TypeError, r"labels must be a torch\.Tensor, got \[0, 0, 0, 0\]"),
        (lambda: call(images, labels[:3], 10), DataError, r"labels must have shape \(4,\), one for each image, not \(3,\)"),
        (lambda: call(images, labels, 0), DataError, r"num_classes must be at least 1, not 0"),
        (lambda: call(images, labels, None), TypeError, r"num_classes must be an int, got None"),
        (lambda: Augment(9, "reflect")(images, labels, 10), DataError, r"pad_crop 9 is too large to mirror 8x8 images"),
        (lambda: Augment(resized_crop=9).center(images), DataError, r"resized_crop 9 is larger than the images \(8x8\)"),
        (lambda: call.center(images[0, 0]), DataError, rf"{shape} torch\.float32 of shape \(8, 8\)"),
    ]  # fmt: skip


def of_log_mel():
    call = LogMel(bands=16)
    shape = r"waves must be floating point of shape \[B, T\], T at least a hop of 80 samples, not"
    return [
        (lambda: LogMel(bands=0), DataError, r"features\.bands must be at least 1, not 0"),
        (lambda: LogMel(bands=64.0), TypeError, r"features\.bands must be an int, got 64\.0"),
        (lambda: LogMel(window="25 ms"), TypeError, r"features\.window must be a number, got '25 ms'"),
        (lambda: LogMel(window=INF), DataError, r"features\.window must be above 0 and finite, not inf"),
        (lambda: LogMel(hop=0), DataError, r"features\.hop must be above 0 and finite, not 0"),
        (lambda: LogMel(floor=NAN), DataError, r"features\.floor must be above 0 and finite, not nan"),
        (lambda: LogMel(lowest=None), TypeError, r"features\.lowest must be a number, got None"),
        (lambda: LogMel(highest="4 kHz"), TypeError, r"features\.highest must be a number, got '4 kHz'"),
        (lambda: LogMel(lowest=5000.0).check(8000), DataError, r"lowest and highest must be rising .*4000 Hz, not 5000 an"),
        (lambda: LogMel(lowest=NAN).check(8000), DataError, r"lowest and highest must be rising .*, not nan and 4000"),
        (lambda: LogMel(bands=500).check(8000), DataError, r"features\.bands 500 is too many: .*; lower it, or use a longer"),
        (lambda: LogMel(hop=1.0).check(8000), DataError, r"features\.hop must be at least one sample and at most the wind"),
        (lambda: call.check(0), DataError, r"sample_rate must be above 0 and finite, not 0"),
        (lambda: call.samples("8000"), TypeError, r"sample_rate must be an int, got '8000'"),
        (lambda: call(WAVES, None), TypeError, r"sample_rate must be an int, got None"),
        (lambda: call(WAVES.numpy(), 8000), TypeError, r"waves must be a torch\.Tensor, got a ndarray of shape \(2, 400\)"),
        (lambda: call(WAVES[0], 8000), DataError, rf"{shape} torch\.float32 of shape \(400,\)"),
        (lambda: call(WAVES.short(), 8000), DataError, rf"{shape} torch\.int16 of shape \(2, 400\)"),
        (lambda: call(WAVES[:, :9], 8000), DataError, rf"{shape} torch\.float32 of shape \(2, 9\)"),
    ]  # fmt: skip


def of_multi_task():
    def make(**options):
        return MultiTask({"a": own(), "b": own()}, **options)

    def both(other, name="b"):
        return loaded(MultiTask({"a": own(), name: other}))

    return [
        *of_base(make),
        (lambda: MultiTask(None), TypeError, r"tasks must be a mapping from names to data sets, got None"),
        (lambda: MultiTask([own(), own()]), TypeError, r"tasks must be a mapping from names to data sets, got \[<"),
        (lambda: MultiTask({}), DataError, r"tasks must be two or more, not 0"),
        (lambda: both(own(), 2), TypeError, r"the name of a task must be a text, got 2"),
        (lambda: both(own(), "b.c"), DataError, r"tasks must have names without dots and slashes, not 'b\.c'"),
        (lambda: both("cifar10"), TypeError, r"tasks\['b'\] must be a ClassificationData, got 'cifar10'"),
        (lambda: both(PlantedBands), TypeError, r"tasks\['b'\] must be a ClassificationData, got the class PlantedBands"),
        (lambda: make(batch_size=1), DataError, r"batch_size must be at least the number of tasks, 2, not 1"),
        (lambda: both(make()), DataError, r"tasks must be of one task each, but b is a MultiTask: name its tasks here"),
        (lambda: both(own(num_classes=1)), DataError, r"task b: labels of train_set must be from 0 to .*, 0, not from 0"),
        (lambda: both(own(train_set=(X[:, 0], Y))), DataError, r"inputs of one shape, not \(1, 8, 8\) for a and \(8, 8\) for"),
        (lambda: both(own(axes=(Axis("time", 1.0, "Hz"),))), DataError, r"axes of one spacing, not none for a and 1 \(time"),
    ]  # fmt: skip


def of_classifier():
    def make(**options):
        return Classifier(**{"network": MODEL} | options)

    def watched(folder):
        fit(folder, make(), ClampStrides(), StrideHistory(folder / "strides.csv"), num_classes=3)

    rates, milestones = r"learning_rates must be", r"milestones must be"
    return [
        (lambda: make(network=None), TypeError, r"network must be a torch\.nn\.Module, got None"),
        (lambda: make(network=TinyCNN), TypeError, r"network must be a torch\.nn\.Module, got the class TinyCNN"),
        (lambda: make(network="TinyCNN"), TypeError, r"network must be a torch\.nn\.Module, got 'TinyCNN'"),
        (lambda: make(learning_rates=0.1), TypeError, rf"{rates} a sequence of numbers, got 0\.1"),
        (lambda: make(learning_rates=["0.1"]), TypeError, rf"{rates} a number, got '0\.1'"),
        (lambda: make(learning_rates="0.1"), TypeError, rf"{rates} a sequence of numbers, got '0\.1'"),
        (lambda: make(learning_rates=[]), ValueError, r"learning_rates must have one entry more than milestones, got 0 for"),
        (lambda: make(learning_rates=[NAN]), ValueError, rf"{rates} > 0 and finite, got \[nan\]"),
        (lambda: make(milestones=10), TypeError, rf"{milestones} a sequence of numbers, got 10"),
        (lambda: make(learning_rates=[1, 1], milestones=[2.5]), TypeError, rf"{milestones} an int, got 2\.5"),
        (lambda: make(learning_rates=[1, 1], milestones=[0]), ValueError, rf"{milestones} increasing steps >= 1, got \[0\]"),
        (lambda: make(momentum=1), ValueError, r"momentum must be >= 0 and < 1, got 1"),
        (lambda: make(momentum="0.9"), TypeError, r"momentum must be a number, got '0\.9'"),
        (lambda: make(weight_decay=-1), ValueError, r"weight_decay must be >= 0 and finite, got -1"),
        (lambda: make(stride_lr=NAN), ValueError, r"stride_lr must be >= 0 and finite, got nan"),
        (lambda: make(stride_lr=None), TypeError, r"stride_lr must be a number, got None"),
        (lambda: make(stride_clip=0), ValueError, r"stride_clip must be > 0, got 0"),
        (lambda: make(stride_clip="1"), TypeError, r"stride_clip must be a number, got '1'"),
        (lambda: make(label_smoothing=1), ValueError, r"label_smoothing must be >= 0 and < 1, got 1"),
        (lambda: make(cost_weight=INF), ValueError, r"cost_weight must be >= 0 and finite, got inf"),
        (lambda: make(task_weights=[1.0]), TypeError, r"task_weights must be a mapping from tasks to .*, got \[1\.0\]"),
        (lambda: make(task_weights={"a": -1}), ValueError, r"task_weights must be >= 0 and finite, got -1 for a"),
        (lambda: make(task_weights={"a": "1"}), TypeError, r"task_weights must be a number, got '1'"),
        (lambda: make(budget=0), ValueError, r"budget must be > 0, got 0"),
        (lambda: make(budget="half"), TypeError, r"budget must be a number, got 'half'"),
        (lambda: make(exploration="Sweep"), TypeError, r"exploration must be a Sweep, a Jitter or None, got 'Sweep'"),
        (lambda: make(exploration=ds.Sweep), TypeError, r"exploration must be .* or None, got the class Sweep"),
        (lambda: make(channels_last=1), TypeError, r"channels_last must be True or False, got 1"),
        (lambda: make().training_step(X, 0), TypeError, r"batch must be two tensors, \(inputs, labels\), got a Tensor"),
        (lambda: make().training_step({"a": X}, 0), TypeError, r"batch of a must be two tensors, .* got a Tensor"),
        (lambda: make().validation_step(None, 0), TypeError, r"batch must be two tensors, \(inputs, labels\), got None"),
        (lambda folder: watched(folder), UserError, r"the data has 3 classes but the network 2 outputs: set model\.network"),
        (lambda folder: fit(folder, make(), train_set=(X.tile(1, 3, 1, 1), Y)), UserError, r"the network cannot take inputs of \(3, 8, 8\) \(change the data, or"),
        (lambda folder: fit(folder, make(task_weights={"a": 1})), UserError, r"task_weights must be null: "),
        (lambda folder: fit(folder, make(budget=1e-9)), UserError, r"budget must be between .*, got 1e-09"),
        (lambda folder: fit(folder, Classifier(Unusual())), UserError, r"network must give logits, .*, got \[a?tensor"),
    ]  # fmt: skip


class Unusual(nn.Module):
    """Gives a list."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 2)

    def forward(self, x):
        return [self.linear(x)]


class ByHand(LightningModule):
    """Optimises by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return torch.optim.SGD([nn.Parameter(torch.zeros(()))])

    def training_step(self, batch, batch_idx):
        return None

    validation_step = training_step


def fit(folder, module, *callbacks, max_epochs=1, **left):
    """A training on four samples that leaves no files of its own."""
    data = own(**left)
    data.batch_size = 2
    trainer = Trainer(
        accelerator="cpu", max_epochs=max_epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    with quiet():
        trainer.fit(module, datamodule=data)
    return trainer


def of_callbacks():
    learn = functools.partial(Classifier, MODEL)
    other = Classifier(TinyCNN(in_channels=1, num_classes=2))
    history, exploring = (
        r"path must lie in a folder that is there, got",
        r"exploration must be a Sweep, a Jitter or another",
    )
    return {
        "training.ExploreStrides": [
            (lambda: ExploreStrides(None), TypeError, rf"{exploring} Exploration, got None"),
            (lambda: ExploreStrides("Sweep"), TypeError, rf"{exploring} Exploration, got 'Sweep'"),
            (lambda: ExploreStrides(ds.Jitter), TypeError, rf"{exploring} Exploration, got the class Jitter"),
            (lambda: ExploreStrides(ds.Jitter(), seed="0"), TypeError, r"seed must be an int, got '0'"),
            (lambda: ExploreStrides(ds.Jitter(), seed=0.5), TypeError, r"seed must be an int, got 0\.5"),
            (lambda: ExploreStrides(ds.Jitter()).samples(0), ValueError, r"batch_size must be >= 1, got 0"),
            (lambda: ExploreStrides(ds.Jitter()).samples(None), TypeError, r"batch_size must be an int, got None"),
            (lambda folder: fit(folder, ByHand(), ExploreStrides(ds.Jitter())), UserError, r"needs automatic optimization"),
            (lambda folder: fit(folder, learn(), ExploreStrides(ds.Jitter()), max_epochs=-1), UserError, r"how many steps there are: set max_epochs or"),
        ],
        "training.StrideHistory": [
            (lambda: StrideHistory(None), TypeError, r"path must be a path, got None"),
            (lambda: StrideHistory(3), TypeError, r"path must be a path, got 3"),
            (lambda: StrideHistory("strides.csv", 0), ValueError, r"every_n_steps must be >= 1, got 0"),
            (lambda: StrideHistory("strides.csv", 2.5), TypeError, r"every_n_steps must be an int, got 2\.5"),
            (lambda: StrideHistory("strides.csv", "10"), TypeError, r"every_n_steps must be an int, got '10'"),
            (lambda folder: fit(folder, learn(), StrideHistory(folder / "none" / "strides.csv")), UserError, rf"{history} .*none: make it"),
            (lambda folder: fit(folder, learn(), StrideHistory(folder)), UserError, r"path must be a CSV file, got the folder "),
            (lambda folder: fit(folder, learn(), StrideHistory(folder / "file" / "a.csv")), UserError, rf"{history} .*file: make"),
            (lambda folder: fit(folder, learn(), StrideHistory(str(SETS["table"]))), UserError, r"table is damaged, it has rows that are no strides"),
        ],
        "training.WriteResult": [
            (lambda: WriteResult(None), TypeError, r"folder must be a path, got None"),
            (lambda: WriteResult(["runs"]), TypeError, r"folder must be a path, got \['runs'\]"),
            (lambda folder: fit(folder, learn(), WriteResult(folder / "none")), UserError, r"folder must be one that is there, .*none: "),
            (lambda folder: fit(folder, learn(), WriteResult(str(folder / "file"))), UserError, r"folder must be one that is there, .*file: "),
            (lambda folder: WriteResult(folder).write(None, learn()), TypeError, r"trainer must be a Trainer, got None"),
            (lambda folder: WriteResult(folder).write(fit(folder, other), MODEL), TypeError, r"module must be a Classifier, got the module TinyCNN"),
            (lambda folder: WriteResult(folder).write(fit(folder, other), learn()), UserError, r"trainer must have trained this module, with"),
        ],
    }  # fmt: skip


CASES = {
    "data.AudioData": [
        *of_stored(AudioData, "sound", "wav"),
        *of_sounds(functools.partial(AudioData, "nowhere")),
        (lambda: AudioData("nowhere", crop_seconds=-1), DataError, r"crop_seconds must be above 0 and finite, not -1"),
        (lambda: AudioData("nowhere", crop_seconds="1"), TypeError, r"crop_seconds must be a number, got '1'"),
        (lambda: loaded(AudioData(SETS["no samples"])), DataError, r"not a readable sound \(it has no samples\): repair it"),
        (lambda: loaded(AudioData(SETS["sounds"], seconds=0.05, crop_seconds=1.0)), DataError, r"crop_seconds must be from one sample to seconds, 0\.05, not 1\.0"),
        (lambda: loaded(AudioData(SETS["sounds"], seconds=0.01)), DataError, r"seconds must be at least the window of 0\.025 s"),
    ],
    "data.Augment": of_augment(),
    "data.BatchDataset": [
        (lambda: len(BatchDataset()), NotImplementedError, r"BatchDataset must have __len__, the number of samples"),
        (lambda: BatchDataset()[0], NotImplementedError, r"BatchDataset must have __getitems__, the batch at some indices"),
        (lambda: OwnDataset([(X[0], Y[0])])[0], TypeError, r"what OwnDataset\.__getitems__ gives must be two tensors, .*got"),
        (lambda: OwnDataset((X, None))[0], TypeError, r"what OwnDataset\.__getitems__ gives must be two tensors"),
        (lambda: OwnDataset((X[0, 0, 0, 0], Y[0]))[0], ValueError, r"gives must have a batch axis, got shapes \(\) and \(\)"),
        (lambda: OwnDataset((X, Y))[0], DataError, r"__getitems__ must give an input and a label for each index, not 4 and 4"),
        (lambda: loaded(own(train_set=OwnDataset((X, Y), 0))), DataError, r"train_set must have samples, not 0"),
    ],
    "data.ClassificationData": of_classification_data(),
    "data.ImageData": [
        *of_stored(ImageData, "image", "png"),
        (lambda: ImageData("nowhere", image_size=0), DataError, r"image_size must be at least 1, not 0"),
        (lambda: ImageData("nowhere", image_size=(8, 8)), TypeError, r"image_size must be an int, got \(8, 8\)"),
        (lambda: ImageData("nowhere", augment={"flip": True}), TypeError, r"augment must be an Augment or None, got \{'flip'"),
        (lambda: ImageData("nowhere", augment=Augment), TypeError, r"augment must be an Augment or None, got the class Au"),
        (lambda: loaded(ImageData(SETS["sizes"])), DataError, r"train images are 8x8 and test images 9x9: set image_size"),
        (lambda: loaded(ImageData(SETS["images"], augment=Augment(resized_crop=9))), DataError, r"resized_crop 9 is larger than the images \(8x8\): set image"),
    ],
    "data.InMemory": [
        (lambda: InMemory(None, Y), TypeError, r"inputs and labels must be two tensors, \(inputs, labels\), got \(None"),
        (lambda: InMemory(X, [0, 1, 0, 1]), TypeError, r"inputs and labels must be two tensors"),
        (lambda: InMemory(X.numpy(), Y.numpy()), TypeError, r"inputs and labels must be two tensors"),
        (lambda: InMemory(X[0, 0, 0, 0], Y[0]), ValueError, r"must have a batch axis, got shapes \(\) and \(\)"),
        (lambda: InMemory(X, Y[:2]), ValueError, r"inputs and labels differ in length: 4 and 2"),
        (lambda: InMemory(X, Y.float()), DataError, r"labels must be int64 of shape \[N\], not torch\.float32 of shape \(4,\)"),
        (lambda: InMemory(X, Y[:, None]), DataError, r"labels must be int64 of shape \[N\], not torch\.int64 of shape \(4, 1\)"),
        (lambda: InMemory(X, Y)[9], IndexError, r"indices must be whole numbers below 4, got \[9\]"),
        (lambda: InMemory(X, Y).__getitems__("ab"), IndexError, r"indices must be whole numbers below 4, got 'ab'"),
        (lambda: InMemory(X, Y).__getitems__([0.5]), IndexError, r"indices must be whole numbers below 4, got \[0\.5\]"),
    ],
    "data.LogMel": of_log_mel(),
    "data.MultiTask": of_multi_task(),
    "data.PlantedBands": [
        *of_generated(PlantedBands),
        (lambda: PlantedBands(size=32), TypeError, r"size must be a sequence with one number per axis, got 32"),
        (lambda: PlantedBands(size="32"), TypeError, r"size must be a sequence with one number per axis, got '32'"),
        (lambda: PlantedBands(size=(32.0, 32)), TypeError, r"size must be an int, got 32\.0"),
        (lambda: PlantedBands(size=(32, 0)), DataError, r"size must be two positive numbers \(height, width\), not \(32, 0\)"),
        (lambda: PlantedBands(band=(4, 8, 8)), DataError, r"band must be two positive numbers .*, not \(4, 8, 8\)"),
        (lambda: PlantedBands(band=(4, "8")), TypeError, r"band must be an int, got '8'"),
        (lambda: PlantedBands(band=(4, 12)), DataError, r"band must be even and band < nuisance <= size / 2, not 12, 12"),
        (lambda: PlantedBands(nuisance=()), ValueError, r"nuisance must have one entry per spatial axis, got none"),
        (lambda: PlantedBands(nuisance_waves=-1), DataError, r"nuisance_waves must be 0 or more, not -1"),
        (lambda: PlantedBands(nuisance_waves=1.5), TypeError, r"nuisance_waves must be an int, got 1\.5"),
        (lambda: PlantedBands(nuisance_amplitude=NAN), DataError, r"nuisance_amplitude must be 0 or more and finite, not nan"),
    ],
    "data.SyntheticSounds": [
        *of_generated(SyntheticSounds),
        *of_sounds(SyntheticSounds),
        (lambda: SyntheticSounds("ptich"), DataError, r"task must be one of pitch, .*, not 'ptich': did you mean pitch\?"),
        (lambda: SyntheticSounds(None), DataError, r"task must be one of pitch, timbre, chirp, not None"),
        (lambda: SyntheticSounds(["pitch"]), DataError, r"task must be one of pitch, timbre, chirp, not \['pitch'\]"),
        (lambda: SyntheticSounds(pitches=440.0), TypeError, r"pitches must be a sequence of numbers, got 440\.0"),
        (lambda: SyntheticSounds(pitches="440"), TypeError, r"pitches must be a sequence of numbers, got '440'"),
        (lambda: SyntheticSounds(pitches=("a4",)), TypeError, r"pitches must be a number, got 'a4'"),
        (lambda: SyntheticSounds(pitches=()), DataError, r"pitches must be rising, .*, not \(\)"),
        (lambda: SyntheticSounds(pitches=(440.0, NAN)), DataError, r"pitches must be rising, .*, not \(440\.0, nan\)"),
        (lambda: loaded(SyntheticSounds(seconds=0.02)), DataError, r"seconds must be at least the window of 0\.025 s, not 0\.02"),
    ],
    "training.Classifier": of_classifier(),
    **of_callbacks(),
}  # fmt: skip

EXCEPTIONS = {
    "training.ClampStrides": "takes no arguments, and does nothing where a module has no learnable strides",
    "training.StopWhenDiverged": "takes no arguments, and serves any LightningModule",
    "training.StrideProgressBar": "its arguments are Lightning's",
}


@pytest.mark.parametrize(("name", "value"), public(ROOMS).items(), ids=public(ROOMS))
def test_every_public_class_has_cases(name, value):
    cases = CASES.get(name, [])
    assert name in EXCEPTIONS or len({message for _, _, message in cases}) >= 5, (
        f"{name} needs five kinds of wrong input"
    )


def test_cases_are_of_public_classes():
    assert CASES.keys() | EXCEPTIONS.keys() <= public(ROOMS).keys()
    assert not CASES.keys() & EXCEPTIONS.keys()


ALL = [(name, *case) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("call", "error", "message"), [case[1:] for case in ALL], ids=[f"{c[0]}: {c[3]}" for c in ALL])
def test_one_line_that_names_the_cure(call, error, message, tmp_path):
    refuses(call, error, message, tmp_path, {"the network": MODEL})
