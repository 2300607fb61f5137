"""A handler for a class of one's own."""

import torch
from torch import nn

import diffstride as ds
from diffstride.convert import handlers


class PowerPool1d(nn.Module):
    """The root of the average of squares over windows."""

    def __init__(self, kernel_size, stride):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, (stride,)

    def forward(self, x):
        return nn.functional.avg_pool1d(x.square(), self.kernel_size, self.stride, self.kernel_size // 2).sqrt()


def test_a_model_with_a_registered_class_is_converted(monkeypatch):
    monkeypatch.setattr(handlers, "_handlers", [*handlers._handlers])

    @handlers.handles(PowerPool1d)
    def _power_pool(module):
        return handlers.Downsampling(stride=module.stride, extent=(module.kernel_size,))

    model, x = nn.Sequential(PowerPool1d(3, 2), nn.Conv1d(1, 4, 3, padding=1)), torch.rand(1, 1, 32) + 0.1
    size = model(x).shape
    plan = ds.convert(model, x)
    assert [(site.name, site.stride, site.fused) for site in plan.sites] == [("0", (2,), False)]
    pool = model[0]
    torch.testing.assert_close(pool(x), pool.diffstride(PowerPool1d(3, 1)(x)))
    y = model(x)
    assert y.shape == size
    y.square().sum().backward()
    assert pool.diffstride.stride.grad.abs() > 0
    assert not ds.plan(nn.Sequential(model, nn.Conv1d(4, 4, 3, 2)), x).groups[1:]  # the stride of 1 is no candidate
