"""Two ways to apply the operator of an axis, as a dense matrix and through FFTs, and the choice between them."""

from diffstride.backends.axes import CHANNELS_LAST, Kind, Resampling, autocast_dtype, headroom, is_channels_last
from diffstride.backends.matmul import dense_matrix, is_small
from diffstride.backends.resample import BACKENDS, DENSE_UP_TO, Backend, is_dense, keeps_ramps

__all__ = [
    "BACKENDS",
    "CHANNELS_LAST",
    "DENSE_UP_TO",
    "Backend",
    "Kind",
    "Resampling",
    "autocast_dtype",
    "dense_matrix",
    "headroom",
    "is_channels_last",
    "is_dense",
    "is_small",
    "keeps_ramps",
]
