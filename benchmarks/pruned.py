"""The network of a run with channels removed by Torch-Pruning, for the study `compress-small`.

It needs `pip install torch-pruning`, and this folder on PYTHONPATH.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffstride.cost import count_macs
from diffstride.experiments.models import Network
from diffstride.experiments.training.runs import load

STEPS = 400  # so many that a step removes a channel or two


class Pruned(Network):
    """The trained network of a run without the channels of least magnitude.

    Coupled channels are ranked by the L2 norm of their weights (`GroupMagnitudeImportance`). The least important ones
    are removed, the same fraction of all layers, until the budget is met.

    Args:
        run: folder of the run.
        budget: multiply-accumulates to keep, over those of the network.
    """

    def __init__(self, run: str, budget: float) -> None:
        import torch_pruning  # optional

        super().__init__()
        loaded = load(run)
        self.model = loaded.network.float()
        example = torch.zeros(1, *loaded.data.sample_shape)
        target = budget * sum(count_macs(self.model, example))
        pruner = torch_pruning.pruner.BasePruner(
            self.model,
            example,
            torch_pruning.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.9,
            max_pruning_ratio=0.9,
            iterative_steps=STEPS,
            ignored_layers=[module for module in self.model.modules() if isinstance(module, nn.Linear)],
        )
        for _ in range(STEPS):
            if sum(count_macs(self.model, example)) <= target:
                break
            pruner.step()
        else:
            raise ValueError(f"budget must be in reach of pruning, got {budget}")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(x)
