"""Learn strides in a training loop of your own. Needs torch alone; takes seconds on a CPU.

Images have a wave of 2 or 6 cycles along the width, in noise. A small cost makes strides grow. The first layer must
keep 6 cycles along the width but nothing along the height, so its two strides move apart.
"""

import torch
from torch import nn

import diffstride as ds


def make_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images `[size, 1, 32, 32]` and their labels, 0 for 2 cycles and 1 for 6."""
    labels = torch.randint(2, (size,))
    cycles = torch.tensor([2.0, 6.0])[labels].view(-1, 1, 1, 1)
    phase = torch.rand(size, 1, 1, 1)
    waves = torch.cos(2 * torch.pi * (cycles * torch.arange(32) / 32 + phase))
    return waves + torch.randn(size, 1, 32, 32), labels


def main(steps: int = 101) -> float:
    """Train, print strides on the way, and return the accuracy."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ds.DiffStride2d(stride=2.0, smoothness=2.0),  # behind a convolution of stride 1
        ds.DiffStrideConv2d(16, 32, 3, stride=1.5, padding=1, smoothness=2.0),  # or in place of a strided one
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),  # map sizes change while strides are learned
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    weights, strides = ds.param_groups(model, lr=0.05, stride_lr=0.1, weight_decay=1e-4)
    optimizer = torch.optim.SGD([weights, strides], momentum=0.9)

    for step in range(steps):
        images, labels = make_batch(64)
        # Eq. 6 of the paper: small maps are cheap, so strides grow until the classification loss stops them.
        loss = nn.functional.cross_entropy(model(images), labels) + 0.3 * ds.stride_cost(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(strides["params"], 1.0)
        optimizer.step()
        ds.clamp_strides_(model)
        if step % 25 == 0:
            shown = [[round(s, 2) for s in layer] for layer in ds.strides(model).values()]
            print(f"step {step:3}: loss {loss.item():.3f}, strides {shown}")

    model.eval()
    images, labels = make_batch(512)
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
