"""The cost of strides: Eq. 6 of the paper, multiply-accumulates, memory, budgets and cut-off frequencies."""

from diffstride.cost.budget import Budget
from diffstride.cost.count import Macs, count_macs, evaluation
from diffstride.cost.cutoff import cutoff_frequencies
from diffstride.cost.model import CostModel
from diffstride.cost.sensitivity import Allocation, Change, Sensitivity
from diffstride.cost.stride_cost import stride_cost

__all__ = [
    "Allocation",
    "Budget",
    "Change",
    "CostModel",
    "Macs",
    "Sensitivity",
    "count_macs",
    "cutoff_frequencies",
    "evaluation",
    "stride_cost",
]
