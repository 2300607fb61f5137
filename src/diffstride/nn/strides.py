"""List the strides of a model, keep them in bounds, and give them to an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from diffstride import _graph, _validation
from diffstride.nn.learnable import LearnableStrides


def learnable_layers(model: nn.Module) -> Iterator[tuple[str, LearnableStrides]]:
    """Yield the model's learnable layers with their names, in the order of registration, each stride once.

    Of layers that share a stride (`b.stride = a.stride`, for branches whose outputs meet), only the first is yielded.
    """
    seen: set[int] = set()
    for name, layer in all_layers(model):
        if layer.stride_id not in seen:
            seen.add(layer.stride_id)
            yield name, layer


def all_layers(model: nn.Module) -> Iterator[tuple[str, LearnableStrides]]:
    """Yield every learnable layer with its name, also those that share a stride."""
    for name, module in model.named_modules():
        if isinstance(module, LearnableStrides):
            yield name, module


def strides(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """Return the strides in use by layer name, one per axis, clamped to the layers' `bounds`."""
    return {name: layer.strides for name, layer in learnable_layers(model)}


def clamp_strides_(model: nn.Module) -> None:
    """Project every raw stride to its layer's `bounds`, in place. Call it after each optimizer step.

    Forward passes clamp the strides that they use, not the parameter. Without the projection a raw value could move far
    outside the bounds and would take long to come back. A stride with a parametrization is set through its
    `right_inverse`, and is not changed where there is none.
    """
    for _, layer in all_layers(model):
        layer.clamp_strides_()
    refresh_sizes(model)


def refresh_sizes(model: nn.Module) -> None:
    """Update the output sizes that graphs of `torch.compile` use to the present strides.

    Call it after writing strides in another way than by an optimizer step, `load_state_dict`, `reset_parameters` or
    `clamp_strides_`. In eager mode sizes always follow the strides.
    """
    _graph.refresh([layer for _, layer in all_layers(model)])


def param_groups(
    model: nn.Module, lr: float, *, stride_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return parameter groups for any torch optimizer, with the strides in a group that never decays.

    Args:
        model: any module.
        lr: learning rate of the other parameters.
        stride_lr: learning rate of the strides; None for `lr`.
        weight_decay: decay of the other parameters. It would pull strides towards 0, where they have no meaning.

    Returns:
        `[{"params", "lr", "weight_decay", "name": "weights"}, {..., "name": "strides"}]`, without frozen parameters and
        without empty groups.

    Raises:
        ValueError: a rate or decay is negative, or the model has no trainable parameters.
    """
    rate: Any = lr if stride_lr is None else stride_lr
    given: Any = ("lr", lr), ("weight_decay", weight_decay), ("stride_lr", rate)
    for name, value in given:
        one = isinstance(value, Tensor) and value.numel() == 1  # torch's optimisers take such rates
        _validation.not_negative(name, value.item() if one else value)
    stride_ids = {id(p) for _, layer in learnable_layers(model) for p in layer.stride_parameters}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"model must have trainable parameters, got none in {type(model).__name__}")
    weights = [p for p in trainable if id(p) not in stride_ids]
    strides = [p for p in trainable if id(p) in stride_ids]
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay, "name": "weights"},
        {"params": strides, "lr": rate, "weight_decay": 0.0, "name": "strides"},
    ]
    return [group for group in groups if group["params"]]
