"""ONNX files: equal to the eager model, with a free batch size, or not written."""

import sys

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride.errors import RunError, UsageError
from diffstride.export import freeze, to_onnx
from diffstride.nn.attach import attach
from tests.helpers import zoo
from tests.helpers.exported import image_model, relative


@pytest.fixture
def onnxruntime():
    return pytest.importorskip("onnxruntime")


def test_onnx(onnxruntime, tmp_path, capfd):
    import onnx

    model, x = image_model(), torch.randn(1, 3, 32, 30)
    random = torch.get_rng_state()
    written = to_onnx(model, x, tmp_path / "model.onnx")
    assert torch.equal(torch.get_rng_state(), random)
    assert written.error < 1e-5
    assert written.bytes == (tmp_path / "model.onnx").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    proto = onnx.load(written.path)
    operations = [node.op_type for node in proto.graph.node]
    assert operations.count("MatMul") == 2 + 2 + 2 + 1
    assert set(operations) <= {"Conv", "MatMul", "Relu", "BatchNormalization", "Gemm", "Reshape", "ReduceMean",
                               "GlobalAveragePool", "Flatten", "Shape", "Concat"}  # fmt: skip
    assert b"/" + b"tests" not in written.path.read_bytes()
    session = onnxruntime.InferenceSession(written.path)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 32, 30)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert relative(torch.from_numpy(y), model(x)) < 1e-5
    assert capfd.readouterr() == ("", "")


class ManyInputs(nn.Module):
    """Positional, keyword, nested, whole-number and unused inputs; an output that is none."""

    def __init__(self):
        super().__init__()
        self.down = ds.DiffStride1d(2.0, 1)

    def forward(self, x, classes=None, *, lists=(), scale=1.0, mask=None):
        y = self.down(x) * scale + lists[0] + lists[1].mean(-1, keepdim=True)
        return {"y": y, "classes": classes + 1, "none": None}


def test_onnx_inputs_of_every_kind(onnxruntime, tmp_path):
    inputs = {
        "lists": [torch.randn(1, 2, 1), torch.randn(1, 2, 5)],
        "mask": torch.ones(2, dtype=torch.bool),  # as long as the batch is while it is exported
        "x": torch.randn(1, 2, 12),
        "classes": torch.tensor([1]),
        "scale": 2.0,
    }
    written = to_onnx(ManyInputs(), inputs, str(tmp_path / "model.onnx"))
    assert written.error < 1e-6
    session = onnxruntime.InferenceSession(written.path)
    batched = dict.fromkeys(["lists_0", "lists_1", "x", "classes"], "batch")
    assert {i.name: i.shape[0] for i in session.get_inputs()} == batched | {"mask": 2}


class Normalised(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change, self.down = change, ds.DiffStride1d(2.0, 1)

    def forward(self, x):
        return self.change(self.down(x))


def drift(y):
    """Another function where it is exported than where it is run."""
    return y * 1.001 if torch.compiler.is_exporting() else y


REFUSALS = {
    "constant batch": (lambda y: y.reshape(2, 1, 8), "free batch size: Constraints violated"),
    "branch on values": (lambda y: y if y.sum() > 0 else -y, "free batch size: Could not guard on data-dependent"),
    "no such operation": (torch.linalg.svdvals, "free batch size: No ONNX function found for .*svd"),
    "other numbers": (drift, "was not written: onnxruntime's outputs differ from the model's by 1.0e-03"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_onnx_cannot_say_leaves_the_file_that_is_there(onnxruntime, tmp_path, capfd, change, message):
    path = tmp_path / "model.onnx"
    path.write_text("before")
    with pytest.raises(RunError, match=message) as error:
        to_onnx(Normalised(change), torch.randn(2, 1, 12), path)
    assert "\n" not in str(error.value)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")


def test_mistakes_with_onnx(onnxruntime, tmp_path, monkeypatch):
    layer, x = ds.DiffStride1d(2.0, 1), torch.randn(2, 1, 12)
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere: make it"):
        to_onnx(layer, x, tmp_path / "nowhere" / "model.onnx")
    with pytest.raises(UsageError, match=r"must be float32 for ONNX, got torch.bfloat16: use model.float\(\)"):
        to_onnx(layer, x.bfloat16(), tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="must have a floating-point tensor with a batch axis, got none"):
        to_onnx(layer, torch.ones(2, 1, 12, dtype=torch.int64), tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="at most 65536"):
        to_onnx(layer, torch.randn(2, 1, 65537), tmp_path / "model.onnx")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"cannot open .*folder .*: check the path"):
        to_onnx(layer, x, tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"need the package onnxscript: pip install 'diffstride\[export\]'"):
        to_onnx(layer, x, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "name", ["resnet-blur", "pool-in-code", "slices", "pyramid", "unet-by-size", "selective-kernel", "detr"]
)
def test_networks_that_downsample_or_resize_in_code(onnxruntime, tmp_path, name):
    _, model, _ = zoo.converted(name)
    with torch.no_grad():
        for stride in ds.param_groups(model, lr=1.0)[1]["params"]:
            stride.mul_(1.13)
    assert to_onnx(model, zoo.CASES[name].inputs(0), tmp_path / "model.onnx").error < 1e-4


def test_a_front_end_for_waveforms_of_a_second(onnxruntime, tmp_path):
    model = nn.Sequential(nn.Conv1d(1, 4, 10, 5), nn.GELU(), nn.Conv1d(4, 4, 3, 2), nn.GELU(), nn.Conv1d(4, 6, 3, 2))
    x = torch.randn(1, 1, 16000)
    ds.convert(model, x)
    with torch.no_grad():
        for _, stride in model.named_parameters():
            if stride.shape == (1,):
                stride.mul_(1.17)
    written = to_onnx(model, x, tmp_path / "model.onnx")
    assert written.error < 1e-5
    assert written.bytes < 20e6  # the matrix of the first layer alone would have 170 MB


@pytest.mark.long
def test_onnx_in_three_dimensions_and_a_frozen_model_once_more(onnxruntime, tmp_path):
    model = nn.Sequential(ds.DiffStrideConv3d(2, 4, 3, (1.6, 3.0, 1.2), 1, smoothness=1), ds.DiffStride3d(1.5, 1))
    x = torch.randn(2, 2, 9, 10, 11)
    assert to_onnx(freeze(model, x), x, tmp_path / "model.onnx").error < 1e-5


@pytest.mark.long
def test_a_network_of_other_people(onnxruntime, tmp_path):
    """Transformers' ResNet with a learned stride after its stem's convolution, whose attributes the code reads."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    model = ResNetForImageClassification(config).eval()
    stem = model.resnet.embedder.embedder.convolution
    stem.stride = (1, 1)
    attach(stem, ds.DiffStride2d(1.7, 2))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    frozen = freeze(model, inputs)
    with torch.no_grad():
        assert relative(frozen(**inputs).logits, model(**inputs).logits) < 1e-5
    assert to_onnx(model, inputs, tmp_path / "model.onnx").error < 1e-5


@pytest.mark.long
def test_the_file_can_be_quantised(onnxruntime, tmp_path):
    """Static quantisation finds products and convolutions, and the int8 outputs are close."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    model, images = image_model(), torch.randn(32, 3, 32, 30)
    to_onnx(model, images[:2], tmp_path / "model.onnx")

    class Batches(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(images.split(8))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch.numpy()}

    quantize_static(tmp_path / "model.onnx", tmp_path / "int8.onnx", Batches())
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    (y,) = session.run(None, {"input": images.numpy()})
    assert relative(torch.from_numpy(y), model(images)) < 0.1
