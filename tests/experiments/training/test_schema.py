"""Kinds of values from files: a wrong one is refused with its place."""

import pytest

from diffstride.experiments.training.schema import check_kind, check_result

RESULT = {
    "accuracy": 0.5, "macs": 1e6, "resampling_macs": 0, "step_time_ms": 5.0, "strides": {"down": [2.0, 3]},
    "strides_initial": {"down": [2, 2]}, "axes": {"time": "Hz", "frequency": "cycles per bin"},
    "cutoffs": {"exact": {"down": [1.0, 2.0]}, "whole_bins": {"down": [1.0, 2.0]}},
}  # fmt: skip


def test_kinds_are_named_with_their_place():
    with pytest.raises(ValueError, match=r"it\['down'\]\[1\] must be a number, got 'x'"):
        check_kind({"down": [1, "x"]}, dict[str, list[float]])
    with pytest.raises(ValueError, match=r"it\['a'\]\[0\] must be a text, got 1"):
        check_kind({"a": [1]}, None | dict[str, list[str]])
    check_kind({"a": (1, 2.5, float("inf"))}, dict[str, list[float]] | None)


def test_a_missing_value_of_a_result_is_none():
    assert check_result(RESULT)["parameters"] is None
    assert check_result(RESULT | {"accuracy": None, "strides": {}, "strides_initial": {}, "cutoffs": None})


@pytest.mark.parametrize(
    "wrong",
    [
        {"accuracy": "x"}, {"accuracy": True}, {"macs": None}, {"steps": 1.5}, {"axes": ["time"]}, {"versions": "1.0"},
        {"strides": {"down": "2"}}, {"cutoffs": {"exact": {}}},
    ],
)  # fmt: skip
def test_a_result_with_a_wrong_value(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        check_result(RESULT | wrong)


def test_a_result_without_a_value():
    with pytest.raises(ValueError, match="must have macs"):
        check_result({name: value for name, value in RESULT.items() if name != "macs"})
