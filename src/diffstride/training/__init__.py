"""Training: the Lightning module, its callbacks, and the `fit` command."""

from diffstride.training.callbacks import ClampStrides, StrideHistory, StrideProgressBar, WriteResult
from diffstride.training.classifier import Classifier

__all__ = ["ClampStrides", "Classifier", "StrideHistory", "StrideProgressBar", "WriteResult"]
