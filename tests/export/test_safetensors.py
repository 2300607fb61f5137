"""Safetensors files: all weights and strides, or a file that is as before."""

import sys

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride.errors import UsageError
from diffstride.export import to_safetensors
from tests.helpers.exported import image_model


class Shared(nn.Module):
    """A stride of two layers, a weight of two modules, and a weight in another layout."""

    def __init__(self):
        super().__init__()
        self.one, self.two = ds.DiffStride2d(2.0), ds.DiffStride2d(2.0)
        self.two.stride = self.one.stride
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight
        self.conv = nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last)


def converted():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    ds.convert(model, torch.randn(1, 3, 16, 16))
    return model


@pytest.mark.parametrize("make", [image_model, Shared, converted])
def test_weights_and_strides_come_back_from_safetensors_bit_by_bit(make, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    trained, fresh = make(), make()
    with torch.no_grad():
        for parameter in {*trained.parameters()}:
            parameter.add_(torch.rand_like(parameter))
    path = to_safetensors(trained, tmp_path / "model.safetensors", {"by": "a test"})
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    fresh.load_state_dict(safetensors.load_file(path))
    expected = trained.state_dict()
    assert fresh.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())
    assert len({*fresh.parameters()}) == len({*trained.parameters()})
    assert ds.strides(fresh) == ds.strides(trained)
    assert [p.stride() for p in trained.parameters()] == [p.stride() for p in make().parameters()]  # layouts stay
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"by": "a test"}


def test_a_compiled_model_is_written_under_its_own_names(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = image_model()
    path = to_safetensors(torch.compile(model, backend="eager"), tmp_path / "model.safetensors")
    assert safetensors.load_file(path).keys() == model.state_dict().keys()


class Remembers(nn.Module):
    def get_extra_state(self):
        return {"calls": 3}


def test_mistakes_with_safetensors(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_text("before")
    layer = ds.DiffStride1d(2.0)
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere: make it"):
        to_safetensors(layer, tmp_path / "nowhere" / "model.safetensors")
    with pytest.raises(UsageError, match=r"must be dense tensors for safetensors, got another type in 0\._extra_state"):
        to_safetensors(nn.Sequential(Remembers()), path)
    sparse = nn.Module()
    sparse.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(UsageError, match="must be dense tensors for safetensors, got another type in table"):
        to_safetensors(sparse, path)
    with pytest.raises(UsageError, match=r"types that safetensors has, got torch\.complex128"):
        to_safetensors(nn.Linear(2, 2, dtype=torch.complex128), path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"cannot write .*folder"):
        to_safetensors(layer, tmp_path / "folder")
    assert path.read_text() == "before"
    assert {p.name for p in tmp_path.iterdir()} == {"folder", "model.safetensors"}
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UsageError, match=r"need the package safetensors: pip install 'diffstride\[export\]'"):
        to_safetensors(layer, path)
