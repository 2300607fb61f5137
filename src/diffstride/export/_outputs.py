"""Run a model on its example inputs, compare the outputs of two models, and check that optional packages exist."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from diffstride.errors import UsageError

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def run(model: nn.Module, arguments: Arguments) -> Any:
    """Return the model's output for copies of the arguments, without gradients and without a trace in random states."""
    args, kwargs = tree_map_only(Tensor, Tensor.clone, arguments)
    everything = [*model.parameters(), *model.buffers(), *tensors(arguments)]
    with torch.random.fork_rng({t.device for t in everything if t.is_cuda}), torch.no_grad():
        return model(*args, **kwargs)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """Return the largest relative error of the floating-point outputs; None where shapes differ."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return None
    pairs = zip(found, expected, strict=True)
    return max((_relative_error(a, b) for a, b in pairs if a.is_floating_point()), default=0.0)


def _relative_error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference over the largest of `b`; equal infinities and NaNs agree."""
    a, b = a.cpu().double(), b.cpu().double()
    difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).abs()
    if not difference.any():
        return 0.0
    return float(difference.max() / torch.where(b.isfinite(), b, 0.0).abs().max())


def require(kind: str, *packages: str) -> None:
    """Raise a UsageError where a package for files of this kind is missing."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{kind} files need the package {name}: pip install 'diffstride[export]'")
