"""Parts that all networks share."""

import torch

from diffstride.experiments.models import Heads
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
