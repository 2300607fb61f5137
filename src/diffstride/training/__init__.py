"""Training: the Lightning module, its callbacks, and the `fit` command."""

from diffstride.training.callbacks import ClampStrides, StrideHistory, StrideProgressBar, WriteResult
from diffstride.training.classifier import Classifier
from diffstride.training.diverged import StopWhenDiverged
from diffstride.training.explore import ExploreStrides

__all__ = [
    "ClampStrides",
    "Classifier",
    "ExploreStrides",
    "StopWhenDiverged",
    "StrideHistory",
    "StrideProgressBar",
    "WriteResult",
]
