"""Export a network with learned strides as ONNX and run it. Needs the extra `export`; takes seconds on a CPU."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import diffstride as ds
from diffstride.export import to_onnx


def main() -> float:
    """Freeze, export, run in onnxruntime, and return the largest difference from PyTorch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        ds.DiffStrideConv2d(3, 16, 3, stride=(1.7, 2.3), padding=1),  # strides as training might leave them
        nn.ReLU(),
        ds.DiffStride2d(stride=2.6),
        nn.Conv2d(16, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    images = torch.randn(4, 3, 48, 48)

    frozen = ds.freeze(model, images)  # plain torch modules, one constant matrix per axis
    with torch.no_grad():
        expected = model(images)
        assert torch.allclose(frozen(images), expected, atol=1e-5)

    with tempfile.TemporaryDirectory() as folder:
        file = to_onnx(model, images[:1], Path(folder, "model.onnx"))  # freezes by itself, and checks the file
        print(f"{file.bytes / 1e6:.2f} MB, differs by {file.error:.0e}")
        session = onnxruntime.InferenceSession(Path(folder, "model.onnx").read_bytes())
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})  # any batch size
    return (torch.from_numpy(logits) - expected).abs().max().item()


if __name__ == "__main__":
    print(f"largest difference from PyTorch: {main():.0e}")
