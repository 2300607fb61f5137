"""Check an installed package with torch alone. tools/smoke.sh runs it in an environment that has nothing else."""

import sys

import torch
from torch import nn

import diffstride as ds

OTHERS = {"numpy", "lightning", "rich", "jsonargparse", "kornia", "datasets", "matplotlib", "onnx", "safetensors"}


def waves(size, cycles):
    return torch.cos(2 * torch.pi * cycles * torch.arange(size) / size + 0.3)


def main() -> None:
    assert "site-packages" in ds.__file__, f"imported from {ds.__file__}, not from what was installed"
    torch.manual_seed(0)

    # A wave inside the window, also a constant, keeps its cycles and its level at the new size; one beyond is removed.
    pool = ds.DiffStride1d(2.0, 4.0)
    (size,) = pool.output_size(64)
    assert size == 40
    for cycles, gain in (0, 1.0), (5, 1.0), (25, 0.0):
        expected = gain * waves(size, cycles)
        torch.testing.assert_close(pool(waves(64, cycles)[None, None])[0, 0], expected, rtol=0, atol=1e-5)

    # The gradient of a stride agrees with finite differences.
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    strides = torch.tensor([1.7, 2.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: ds.functional.diffstride(x, s, 2.0, output_size=(11, 9)), strides)

    # A network converted, trained for a step and frozen gives the same numbers.
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(4))
    images = torch.randn(2, 3, 24, 24)
    ds.convert(model, images)
    optimizer = torch.optim.SGD(ds.param_groups(model, 0.1), momentum=0.9)
    before = ds.strides(model)
    model(images).square().mean().backward()
    optimizer.step()
    ds.clamp_strides_(model)
    assert ds.strides(model) != before
    frozen = ds.freeze(model.eval(), images)
    torch.testing.assert_close(frozen(images), model(images), rtol=1e-4, atol=1e-5)

    assert not (found := OTHERS & {name.partition(".")[0] for name in sys.modules}), f"imported {found}"
    print(f"diffstride {ds.__version__} works with torch {torch.__version__} alone")


if __name__ == "__main__":
    main()
