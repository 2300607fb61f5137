"""How much work a call is for the host: counts of operations, which are exact."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffstride as ds


class Operations(TorchDispatchMode):
    """Counts what PyTorch dispatches."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(layer, x, upstream):
    with Operations() as counted:
        layer(x).backward(upstream)
    return counted.count


@pytest.mark.parametrize(("basis", "window"), [("dft", "outer"), ("dft", "inner"), ("dct", "outer")])
def test_a_call_is_few_operations(basis, window):
    layer = ds.DiffStride2d((2.3, 1.9), basis=basis, window=window)
    x = torch.randn(2, 4, 32, 32, requires_grad=True)
    upstream = torch.ones_like(layer(x))
    for _ in range(2):
        operations(layer, x, upstream)
    assert operations(layer, x, upstream) <= 25
    with torch.no_grad():
        layer.stride.add_(1e-4)
    assert operations(layer, x, upstream) <= 40


def test_a_held_stride_builds_nothing_when_the_batch_changes():
    layer = ds.DiffStride2d((2.3, 1.9))
    inputs = [torch.randn(batch, 4, 32, 32, requires_grad=True) for batch in (2, 3)]
    for x in inputs:
        layer(x)
    for x in inputs:
        assert operations(layer, x, torch.ones_like(layer(x))) <= 25
