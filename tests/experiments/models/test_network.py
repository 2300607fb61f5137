"""Parts that all networks share."""

from functools import partial

import pytest
import torch

from diffstride.experiments.models import DenseNet, Heads, ResNet, TinyCNN
from diffstride.experiments.models.network import widened


def test_heads_are_one_linear_layer_for_each_task():
    heads = Heads(4, {"digit": 3, "speaker": 2})
    x = torch.randn(5, 4)
    found = heads(x)
    assert {task: logits.shape for task, logits in found.items()} == {"digit": (5, 3), "speaker": (5, 2)}
    torch.testing.assert_close(found["speaker"], x @ heads["speaker"].weight.T + heads["speaker"].bias)


def test_widths_round_and_leave_one_channel():
    assert widened((64, 100), 1 / 32) == [2, 3]
    assert widened((16,), 0.01) == [1]


@pytest.mark.parametrize("network", [TinyCNN, ResNet, partial(DenseNet, depth=10)])
def test_networks_of_images_have_heads_for_several_tasks(network):
    logits = network(num_classes={"a": 3, "b": 2}, in_channels=3)(torch.randn(2, 3, 16, 16))
    assert {task: own.shape for task, own in logits.items()} == {"a": (2, 3), "b": (2, 2)}
