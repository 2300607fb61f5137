"""Hold the compute of a converted network at a budget. Needs transformers for the network; takes seconds on a CPU."""

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import diffstride as ds


def main(steps: int = 150, share: float = 0.7) -> float:
    """Train on random images with a budget, and return the cost at the end over that of the original model."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=10)
    model = ResNetForImageClassification(config)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    ds.convert(model, {"pixel_values": images})

    cost = ds.CostModel(model, {"pixel_values": images[:1]})  # MACs of one image as a function of the strides
    budget = cost.budget(share)  # of the model before its conversion; a loss term
    optimizer = torch.optim.SGD(ds.param_groups(model, lr=0.01, stride_lr=0.1), momentum=0.9)
    for step in range(steps):
        loss = model(pixel_values=images, labels=labels).loss + budget()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ds.clamp_strides_(model)
        if step % 30 == 0:
            print(f"step {step:3}: {cost.exact() / cost.baseline():.3f} of the original MACs")

    reached = cost.exact() / cost.baseline()
    print(f"at the end {reached:.3f}, strides {ds.strides(model)}")
    return reached


if __name__ == "__main__":
    main()
