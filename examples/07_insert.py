"""Make a trained network cheaper: insert strides of 1, let a budget grow them, and fine-tune. Seconds on a CPU."""

import torch
from torch import nn

import diffstride as ds


def make_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images `[size, 1, 64, 64]` and their labels, 0 for 2 cycles and 1 for 6."""
    labels = torch.randint(2, (size,))
    cycles = torch.tensor([2.0, 6.0])[labels].view(-1, 1, 1, 1)
    phase = torch.rand(size, 1, 1, 1)
    waves = torch.cos(2 * torch.pi * (cycles * torch.arange(64) / 64 + phase))
    return waves + 3 * torch.randn(size, 1, 64, 64), labels


def train(model: nn.Module, steps: int, lr: float, budget: nn.Module | None = None) -> None:
    """Train with SGD. Strides move under a budget, and stay where there is none."""
    model.train()
    optimizer = torch.optim.SGD(ds.param_groups(model, lr=lr, stride_lr=0.1 if budget else 0.0), momentum=0.9)
    for _ in range(steps):
        images, labels = make_batch(32)
        loss = nn.functional.cross_entropy(model(images), labels) + (budget() if budget else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ds.clamp_strides_(model)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the accuracy on new images."""
    images, labels = make_batch(512)
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main(steps: int = 80) -> tuple[float, float, float, float]:
    """Train, insert, fine-tune. Return the three accuracies and the part of the multiply-accumulates that is left."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    train(model, steps, lr=0.05)
    before = accuracy(model)
    example = make_batch(1)[0]
    print(ds.insert(model, example))
    inserted = accuracy(model)
    cost = ds.CostModel(model, example)
    budget = cost.budget(0.4)
    train(model, steps, lr=0.01, budget=budget)  # find the strides
    budget.settle()  # exactly onto the budget
    train(model, steps, lr=0.01)  # fine-tune at constant sizes
    after = accuracy(model)
    kept = cost.exact() / cost.baseline()
    print(f"accuracy {before:.3f} before, {inserted:.3f} inserted, {after:.3f} fine-tuned at {kept:.2f} of the MACs")
    return before, inserted, after, kept


if __name__ == "__main__":
    main()
