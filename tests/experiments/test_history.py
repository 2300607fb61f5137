"""Histories of strides as rows."""

import torch
from torch import nn

from diffstride import DiffStride1d, DiffStride2d
from diffstride.experiments import history
from diffstride.integrations.input_sizes import InputSizes


def test_rows_of_a_model_have_strides_and_the_sizes_they_give():
    model = nn.Sequential(DiffStride2d((2.0, 3.0), 1), nn.Identity(), DiffStride2d((1.5, 1.0), 1))
    watch = InputSizes(model)
    model[0](x=torch.randn(1, 1, 8, 8))  # by keyword
    assert watch.sizes == {"0": (8, 8)}
    model(torch.randn(1, 1, 20, 24))
    rows = list(history.stride_rows(model, 7, watch.sizes))
    assert rows == [
        (7, "0", "height", 2.0, 12),
        (7, "0", "width", 3.0, 10),
        (7, "2", "height", 1.5, 10),
        (7, "2", "width", 1.0, 10),
    ]
    watch.close()
    model(torch.randn(1, 1, 8, 8))
    assert watch.sizes["0"] == (20, 24)
    assert list(history.stride_rows(nn.Sequential(DiffStride1d(2.0)), 0, {})) == []


def test_rows_survive_the_file_and_can_be_cut(tmp_path):
    path = tmp_path / "strides.csv"
    rows = [history.StrideRow(step, "a,b", "height", 2.0 + step / 8, 9) for step in range(5)]
    history.append_rows(path, rows[:3])
    history.append_rows(path, rows[3:])
    assert history.read_rows(path) == rows
    with path.open("a") as file:
        file.write("1,torn")
    history.drop_rows_from(path, 3)
    assert history.read_rows(path) == rows[:3]
    history.drop_rows_from(tmp_path / "none.csv", 2)
    assert not (tmp_path / "none.csv").exists()
