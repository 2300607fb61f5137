"""The whole way on real images: convert, train, save; in another process load, freeze, export; the same predictions."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ResNetConfig, ResNetForImageClassification

import diffstride as ds

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"

MODEL = """
import torch
from transformers import ResNetConfig, ResNetForImageClassification

def build():
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=10)
    )
"""

ANOTHER_PROCESS = (
    MODEL
    + """
import onnxruntime
import diffstride as ds
from diffstride.export import to_onnx

model = build()
ds.Plan.load("report.json").apply(model)
model.load_state_dict(torch.load("model.pt", weights_only=True))
model.eval()
images = torch.load("images.pt", weights_only=True)
frozen = ds.freeze(model, {"pixel_values": images})
to_onnx(model, {"pixel_values": images[:4]}, "model.onnx")
session = onnxruntime.InferenceSession("model.onnx")
(name,) = [given.name for given in session.get_inputs()]
with torch.no_grad():
    logits = [model(images).logits, frozen(images).logits]
logits.append(torch.from_numpy(session.run(None, {name: images.numpy()})[0]))
torch.save(logits, "logits.pt")
"""
)


def normal(images):
    return images.float() / 64 - 2


@pytest.mark.long
@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not at hand")
def test_convert_train_save_load_freeze_export(tmp_path):
    from diffstride.experiments.data import ImageData

    names = {}
    exec(MODEL, names)
    torch.manual_seed(0)
    model = names["build"]()
    data = ImageData(str(CIFAR10), batch_size=64, train_samples=1280, test_samples=200)
    data.prepare_data()
    data.setup("fit")
    images, labels = data.test_set
    images = normal(images)
    report = ds.convert(model, images[:1], smoothness=1.0)
    start = ds.strides(model)
    cost = ds.CostModel(model, images[:1])
    budget = cost.budget(0.9)
    optimizer = torch.optim.SGD(ds.param_groups(model, 0.05, stride_lr=0.1), momentum=0.9)
    losses = []
    for _ in range(4):
        for batch, targets in data.train_dataloader():
            loss = torch.nn.functional.cross_entropy(model(normal(batch)).logits, targets)
            losses.append(loss.item())
            optimizer.zero_grad()
            (loss + budget()).backward()
            for _, layer in ds.nn.learnable_layers(model):
                torch.nn.utils.clip_grad_norm_(layer.stride, 1.0)
            optimizer.step()
            ds.clamp_strides_(model)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])  # it learns
    assert all(a != b for name, value in ds.strides(model).items() for a, b in zip(value, start[name], strict=True))
    assert abs(cost.exact() / (0.9 * cost.baseline()) - 1) < 0.1  # so soon

    report.save(tmp_path / "report.json")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", ANOTHER_PROCESS], cwd=tmp_path, check=True)
    with torch.no_grad():
        here = model.eval()(images).logits
    assert (here.argmax(-1) == labels).float().mean() > 0.15
    for logits in torch.load(tmp_path / "logits.pt", weights_only=True):
        torch.testing.assert_close(logits, here, atol=1e-4 * here.abs().max().item(), rtol=0)
        assert torch.equal(logits.argmax(-1), here.argmax(-1))


def test_a_budget_is_what_torch_counts_in_the_frozen_model():
    """With the example of README.md, resampling included."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(depths=[1, 1, 1, 1])).eval()
    images = torch.randn(2, 3, 64, 64)
    original = macs(model, images[:1])
    ds.convert(model, images)
    cost = ds.CostModel(model, images[:1])
    budget = cost.budget(0.7)
    optimizer = torch.optim.SGD(ds.param_groups(model, lr=0.05), momentum=0.9)
    for _ in range(120):
        optimizer.zero_grad()
        budget().backward()
        optimizer.step()
        ds.clamp_strides_(model)
    frozen = ds.freeze(model, images)
    assert macs(frozen, images[:1]) == pytest.approx(0.7 * original, rel=0.02)
    assert cost.exact() == macs(model, images[:1])


def macs(model, images):
    with torch.no_grad():
        model(images)  # builds the operators
        with FlopCounterMode(display=False) as counter:
            model(images)
    return counter.get_total_flops() // 2
