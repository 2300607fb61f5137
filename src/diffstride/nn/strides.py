"""What one does with the strides of a whole model: list them, keep them in bounds, hand them to an optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from diffstride import _validation
from diffstride.nn.learnable import LearnableStrides


def learnable_layers(model: nn.Module) -> Iterator[tuple[str, LearnableStrides]]:
    """The model's learnable downsamplings with their names, in the order of registration, each stride once.

    Layers that share a stride (`b.stride = a.stride`: branches whose outputs meet) are one downsampling.
    """
    seen: set[int] = set()
    for name, layer in all_layers(model):
        if layer.stride_id not in seen:
            seen.add(layer.stride_id)
            yield name, layer


def all_layers(model: nn.Module) -> Iterator[tuple[str, LearnableStrides]]:
    """The same with every layer, also those that share a stride with one before."""
    for name, module in model.named_modules():
        if isinstance(module, LearnableStrides):
            yield name, module


def strides(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """What has been learned: the strides in use, by layer name, one per axis, clamped to the user's bounds."""
    return {name: layer.strides for name, layer in learnable_layers(model)}


def clamp_strides_(model: nn.Module) -> None:
    """Project every raw stride to its layer's `bounds`, in place. Call it after each optimiser step.

    Forward passes clamp what they use, not the parameter; without the projection a raw value could run far away from
    the bounds and would take long to come back. A stride with a parametrization is set through its `right_inverse`; one
    without that is left as it is.
    """
    for _, layer in all_layers(model):
        layer.clamp_strides_()
    refresh_sizes(model)


def refresh_sizes(model: nn.Module) -> None:
    """Tell graphs of `torch.compile` the output sizes that follow from the present strides.

    Not needed after an optimizer step, `load_state_dict`, `reset_parameters` or `clamp_strides_`; call it after
    writing strides in any other way. In eager mode sizes follow the strides by themselves.
    """
    for _, layer in all_layers(model):
        layer.refresh_sizes()


def param_groups(
    model: nn.Module, lr: float, *, stride_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser: the strides in a group of their own, which never decays.

    Args:
        model: any module.
        lr: learning rate of everything else.
        stride_lr: learning rate of the strides; None: `lr`.
        weight_decay: of everything else. Decay would pull strides towards 0, where they have no meaning.

    Returns:
        `[{"params", "lr", "weight_decay", "name": "weights"}, {..., "name": "strides"}]`; no group without parameters,
        frozen parameters left out.

    Raises:
        ValueError: a negative rate or decay, a model without trainable parameters.
    """
    given: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if stride_lr is not None:
        given["stride_lr"] = stride_lr
    for name, value in given.items():
        one = isinstance(value, Tensor) and value.numel() == 1  # torch's optimisers take such rates
        _validation.not_negative(name, value.item() if one else value)
    stride_ids = {id(p) for _, layer in learnable_layers(model) for p in layer.stride_parameters}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"model must have trainable parameters, got none in {type(model).__name__}")
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in trainable if id(p) not in stride_ids],
            "lr": lr,
            "weight_decay": weight_decay,
            "name": "weights",
        },
        {
            "params": [p for p in trainable if id(p) in stride_ids],
            "lr": lr if stride_lr is None else stride_lr,
            "weight_decay": 0.0,
            "name": "strides",
        },
    ]
    return [group for group in groups if group["params"]]
