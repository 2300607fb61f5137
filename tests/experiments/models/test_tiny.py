"""The network with one stride."""

import torch
from torch.nn import functional as F

from diffstride.experiments.models import TinyCNN


def test_it_is_its_formula_and_wraps_around():
    torch.manual_seed(0)
    net = TinyCNN(width=3, downsample="avg", strides=[2]).eval()
    x = torch.randn(2, 1, 8, 6)
    y = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), net.conv.weight)
    y = F.avg_pool2d(y, 2) / (1 + net.norm.eps) ** 0.5
    y = F.conv2d(F.pad(y.relu(), (1, 1, 1, 1), mode="circular"), net.conv2.weight) / (1 + net.norm2.eps) ** 0.5
    torch.testing.assert_close(net(x), net.classifier(y.relu().mean((-2, -1))))
    torch.testing.assert_close(net(x.roll((2, 4), (-2, -1))), net(x))
