"""Training: the Lightning module, its callbacks, and the `fit` command."""

from diffstride.experiments.training.callbacks import StrideHistory, StrideProgressBar, WriteResult
from diffstride.experiments.training.classifier import Classifier
from diffstride.experiments.training.diverged import StopWhenDiverged, StopWhenStridesExplode
from diffstride.experiments.training.runs import Prediction, TrainedNetwork, load
from diffstride.integrations.lightning import ClampStrides, ExploreStrides

__all__ = [
    "ClampStrides",
    "Classifier",
    "ExploreStrides",
    "Prediction",
    "StopWhenDiverged",
    "StopWhenStridesExplode",
    "StrideHistory",
    "StrideProgressBar",
    "TrainedNetwork",
    "WriteResult",
    "load",
]
