"""Mistakes of users: one line of the library's own names the argument, and nothing is changed or written.

The cases would otherwise give wrong results, lose files, or fail much later with an unreadable message. Mistakes that
Python or PyTorch reject a line later have no case.
"""

import math
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride import export
from diffstride import functional as F
from diffstride.experiments import models
from diffstride.experiments.commands.main import main
from diffstride.experiments.data import AudioData, Augment, ImageData
from diffstride.experiments.training import Classifier
from tests.helpers.errors import content, refuses, without_bars
from tests.helpers.workplace import DESCRIBED, DONE, LAST, PICTURES, RESULT, RESUME, binary, cut, pickled, text

X = torch.randn(2, 3, 8, 8)
LAYER, POOL = ds.DiffStride2d(), ds.SpectralPool2d(2)
CONV, WIDE = ds.DiffStrideConv2d(3, 4, 3, padding=1), ds.DiffStrideConv2d(3, 4, 9)
LOST = ds.DiffStride2d((2.0, 3.0), window="inner")
with torch.no_grad():
    LOST.stride[1] = math.nan
STRIDED = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
PLAIN = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
LEARNED = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), ds.DiffStride2d(window="inner"), nn.ReLU())
TINY = models.TinyCNN(in_channels=1, num_classes=2)
MODELS = [LAYER, CONV, POOL, LOST, STRIDED, PLAIN, LEARNED, TINY]


CALLS = {
    # layers and functions
    "a stride below 1": (lambda: ds.DiffStride2d(0.5), "stride", ">= 1", "0.5"),
    "a stride for each of too many axes": (lambda: ds.DiffStride2d((2, 2, 2)), "stride", "2 entries", "(2, 2, 2)"),
    "a stride that is NaN": (lambda: ds.SpectralPool1d(math.nan), "stride", "finite", "nan"),
    "a stride outside of its bounds": (lambda: ds.DiffStride2d(5, bounds=(1, 4)), "stride", "(1.0, 4.0)", "5"),
    "unlike strides that are shared": (lambda: ds.DiffStride2d((2, 3), shared=True), "stride", "shared", "(2.0, 3.0)"),
    "bounds the wrong way round": (lambda: ds.DiffStride2d(bounds=(3, 2)), "bounds", "lower <= upper", "(3, 2)"),
    "a hard window": (lambda: ds.DiffStride2d(smoothness=0), "smoothness", "> 0", "0", "SpectralPool"),
    "a misspelt window": (lambda: ds.DiffStride2d(window="iner"), "window", "'inner'", "'iner'", "did you mean inner?"),
    "a backend that is a device": (lambda: ds.SpectralPool2d(2, backend="cuda"), "backend", "'matmul'", "'cuda'"),
    "images of whole numbers": (lambda: LAYER(X.byte()), "input", "floating point", "torch.uint8"),
    "an image without channels": (lambda: LAYER(X[0, 0]), "input", "4 dimensions", "(8, 8)"),
    "other channels": (lambda: CONV(X[:, :2]), "input", "3 channels", "(2, 2, 8, 8)"),
    "maps smaller than the stride": (lambda: ds.SpectralPool2d(9)(X), "strides", "(8, 8)", "9"),
    "a kernel larger than the map": (lambda: WIDE(X), "kernel_size", "(9, 9)", "(8, 8)"),
    "a stride that was lost": (lambda: LOST(X), "stride", "finite", "nan", "DiffStride2d"),
    "strides on the meta device": (lambda: ds.strides(ds.DiffStride2d(device="meta")), "stride", "to_empty"),
    "strides of whole numbers": (lambda: F.diffstride(X, torch.tensor([2, 2])), "strides", "float", "torch.int64"),
    "strides that are NaN": (lambda: F.diffstride(X, (math.nan, 2.0)), "strides must be finite", "nan"),
    "a strided convolution that is fused": (
        lambda: ds.DiffStrideConv2d.fuse(STRIDED[0], LAYER), "conv", "stride 1", "(2, 2)",
    ),
    # whole models
    "no downsampling to convert": (lambda: ds.convert(PLAIN, X), "model", "downsampling", "none"),
    "example inputs that do not fit": (lambda: ds.plan(STRIDED, X[:, :2]), "example inputs", "0 (Conv2d)", "channels"),
    "a pattern that matches nothing": (lambda: ds.plan(STRIDED, X, include="stem*"), "include", "0", "'stem*'"),
    "a plan for another model": (lambda: ds.plan(STRIDED, X).apply(PLAIN), "model", "stride (2, 2)"),
    "a plan that is not there": (lambda: ds.Plan.load("none.json"), "path", "none.json", "No such file"),
    "a file that is no plan": (lambda: ds.Plan.load("text"), "path", "Plan.save", "text"),
    "an unknown measure": (lambda: ds.CostModel(LEARNED, X, "flops"), "measure", "'macs'", "'flops'"),
    "a budget that no stride meets": (lambda: ds.CostModel(LEARNED, X).budget(1e-9), "amount", "between", "1e-09"),
    "the cost of no strides": (lambda: ds.stride_cost(PLAIN), "model", "learnable strides", "Sequential"),
    "a model without parameters": (lambda: ds.param_groups(nn.ReLU(), 0.1), "model", "parameters", "ReLU"),
    "a rate that is negative": (lambda: ds.param_groups(LAYER, 0.1, stride_lr=-1), "stride_lr", ">= 0", "-1"),
    "a step that is past": (lambda: ds.Jitter().set_strides(LAYER, -1, 10), "step", ">= 0", "-1"),
    "a frozen model of other inputs": (lambda: ds.freeze(LEARNED, X[:, :2]), "example inputs", "3 channels"),
    "a folder that is not there": (lambda: export.to_safetensors(LEARNED, "no/it"), "no", "there is no folder"),
    # networks, data, training
    "a misspelt way of downsampling": (
        lambda: models.TinyCNN(downsample="bluur"), "downsample", "'blur'", "'bluur'", "did you mean blur?",
    ),
    "a misspelt option": (
        lambda: models.TinyCNN(downsample="diffstride", downsample_options={"smothness": 1}), "smoothness", "smothness",
    ),
    "too many strides": (lambda: models.TinyCNN(strides=[2, 2]), "strides", "1 entr", "[2, 2]"),
    "data that are not there": (lambda: ImageData("./no").setup(), "no", "does not exist"),
    "an empty folder of sounds": (lambda: AudioData("folder").setup(), "folder", "audio", "<class>"),
    "a misspelt column": (lambda: ImageData("set", label_column="lable").setup(), "label_column", "'lable'"),
    "more samples than there are": (lambda: ImageData("set", train_samples=9).setup(), "8 samples", "9"),
    "two crops at once": (lambda: Augment(1, resized_crop=8), "resized_crop", "pad_crop"),
    "unsorted milestones": (lambda: Classifier(TINY, [1, 1, 1], [3, 2]), "milestones", "increasing", "[3, 2]"),
    "a momentum below 0": (lambda: Classifier(TINY, momentum=-1.0), "momentum", ">= 0", "-1.0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CALLS)
def test_a_mistake_in_python(mistake, here, cache):
    call, *names = CALLS[mistake]
    refuses(call, names, here, MODELS)


COMMANDS = {
    # command: words of the answer, and what happened to the folder before
    "fti": (("'fti'", "did you mean fit?"), None),
    "fit --config demo.yaml --model.cost_wieght 1": (("cost_wieght", "did you mean model.cost_weight?"), None),
    "fit --config demo.yaml --data.batch_size many": (("batch_size", "many"), None),
    "fit --config demo.yaml --data.batch_size 1000": (("batch_size", "64 training samples"), None),
    "fit --config demo.yaml --model.network.num_classes 7": (("model.network.num_classes", "4"), None),
    "fit --config demo.yaml --model.budget 1e-9": (("budget", "between", "1e-09"), None),
    "fit --config demo.yaml --name ../x": (("--name", "plain file name", "'../x'"), None),
    "fit --config nowhere.yaml": (("nowhere.yaml", "No such file"), None),
    "fit --config broken.yaml": (("broken.yaml", "not YAML", "line 1"), None),
    "fit --config pictures.yaml": (("runs/pictures", "--name", "--ckpt_path last"), None),
    "fit --config pictures.yaml --name new": (("row 0", "0.png", "readable"), binary("set/train/class0/0.png")),
    "fit --config pictures.yaml --ckpt_path last": (("finished", "max_steps 2"), None),
    f"fit --config pictures.yaml --ckpt_path {LAST}": (("last good", "epoch=0.ckpt", "step 2"), cut(LAST)),
    "fit --config pictures.yaml --ckpt_path bad.ckpt": (("bad.ckpt", "not a readable"), pickled("bad.ckpt")),
    f"fit {RESUME}": (("strides.csv", "damaged"), binary(f"{PICTURES}/strides.csv")),
    "study tiny.yaml --process 2": (("--process", "did you mean --processes?"), None),
    "study tiny.yaml --model.cost_weight 3": (("model.cost_weight 0.3", "now 3", "--name"), None),
    "study other.yaml": (
        ("axes", "'sede'", "did you mean seed?"), text("other.yaml", "base: demo.yaml\naxes: {sede: [0]}"),
    ),
    "study tiny.yaml": (("result.json", "damaged"), text(DONE, "{")),
    "report folder": (("folder", "run", "study"), None),
    f"report {PICTURES}": (("result.json", "damaged"), cut(RESULT)),
    f"report {PICTURES} --out page.txt": (("--out", ".html", "page.txt"), None),
    f"predict {PICTURES} set --top 0": (("--top", "at least 1", "0"), None),
    f"predict {PICTURES} set --csv text": (("text", "--force"), None),
    f"predict {PICTURES} set": (("config.yaml", "network"), text(DESCRIBED, "")),
    f"export {PICTURES} model.onx": (("model.onx", ".onnx", ".safetensors"), None),
    f"export {PICTURES} model.safetensors": (("not a readable checkpoint", "epoch=0"), pickled(LAST)),
}  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_a_mistake_on_the_command_line(line, here, capsys):
    words, change = COMMANDS[line]
    if change is not None:
        change()
    before = content(Path())
    assert main(shlex.split(line)) == 2
    error = without_bars(capsys.readouterr().err)
    assert error.startswith("diffstride: error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert content(Path()) == before
