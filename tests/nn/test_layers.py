"""The modules: what their parameter is and survives, and when the host reads it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride.nn._parameter import StrideParameter, host_values


def raw(layer):
    return layer.stride.detach().tolist()


def test_the_state_is_the_stride_and_nothing_else():
    layer = ds.DiffStride2d((2.0, 3.0))
    assert isinstance(layer.stride, nn.Parameter)
    assert {k: v.tolist() for k, v in layer.state_dict().items()} == {"stride": [2.0, 3.0]}
    assert type(layer.state_dict()["stride"]) is torch.Tensor
    assert dict(ds.SpectralPool2d(2).state_dict()) == {}
    assert ds.DiffStride3d(2, shared=True).stride.shape == (1,)


def test_state_dict_round_trip_without_executing_pickled_code():
    buffer = io.BytesIO()
    torch.save(nn.Sequential(ds.DiffStride2d((2.5, 3.0))).state_dict(), buffer)
    buffer.seek(0)
    parameters = io.BytesIO()
    torch.save(dict(ds.DiffStride2d(2.5).named_parameters()), parameters)
    parameters.seek(0)
    assert torch.load(parameters, weights_only=True)["stride"].tolist() == [2.5, 2.5]
    other = nn.Sequential(ds.DiffStride2d(1.0))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other[0].strides == (2.5, 3.0)
    assert other[0].output_size(32) == ds.DiffStride2d((2.5, 3.0)).output_size(32)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(duplicate):
    layer = ds.DiffStride2d((1.7, 2.4), 1, window="inner", basis="dct")
    layer.stride.data
    twin = duplicate(layer)
    x = torch.randn(1, 2, 12, 13)
    assert torch.equal(twin(x), layer(x))
    assert isinstance(twin.stride, StrideParameter)
    with torch.no_grad():
        twin.stride.fill_(3)
    assert raw(layer) == pytest.approx([1.7, 2.4])


def test_the_stride_stays_wide_in_half_precision_and_widens_in_double():
    for convert in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)):
        model = convert(nn.Sequential(nn.Conv2d(1, 1, 1), ds.DiffStride2d(1.2345678)))
        assert model[0].weight.dtype != torch.float32
        assert model[1].stride.dtype == torch.float32
        assert raw(model[1])[0] == pytest.approx(1.2345678, abs=1e-7)  # never went through half precision
    assert ds.DiffStride2d(2).double().stride.dtype == torch.float64
    assert ds.DiffStride2d(2).double().half().stride.dtype == torch.float64
    assert ds.DiffStride2d(2, dtype=torch.float16).stride.dtype == torch.float32
    assert ds.DiffStride2d(2, dtype=torch.float64).stride.dtype == torch.float64


def test_meta_construction_then_materialised():
    layer = ds.DiffStride2d((1.7, 2.4), device="meta")
    assert layer.stride.is_meta
    assert "meta" in repr(layer)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert isinstance(layer.stride, StrideParameter)
    x = torch.randn(1, 1, 9, 8)
    assert torch.equal(layer(x), ds.DiffStride2d((1.7, 2.4))(x))
    with torch.device("meta"):
        assert ds.DiffStride1d(2).stride.is_meta


def test_functional_call_uses_the_strides_it_is_given_and_is_differentiable():
    layer = ds.DiffStride2d((2.0, 2.0), 1)
    x = torch.randn(1, 2, 16, 16)
    given = {"stride": torch.tensor([1.5, 3.1])}
    expected = ds.DiffStride2d((1.5, 3.1), 1)
    torch.testing.assert_close(torch.func.functional_call(layer, given, x), expected(x))
    assert raw(layer) == [2.0, 2.0]
    (grad,) = torch.autograd.grad(expected(x).square().sum(), expected.stride)
    functional_grad = torch.func.grad(lambda p: torch.func.functional_call(layer, p, x).square().sum())(given)
    torch.testing.assert_close(functional_grad["stride"], grad)


def test_forward_changes_no_state():
    layer = ds.DiffStride2d(1.0)
    before, version = raw(layer), layer.stride._version
    for size in (4, 1, 9):
        layer.eval()(torch.randn(1, 1, size, size))
        layer.train()(torch.randn(1, 1, size, size)).sum().backward()
    assert raw(layer) == before
    assert layer.stride._version == version


def test_every_way_of_writing_the_stride_is_seen():
    layer = ds.DiffStride1d(2.0, 1)
    size = lambda s: ds.DiffStride1d(s, 1).output_size(40)
    layer.stride.data.fill_(3.0)
    assert layer.output_size(40) == size(3.0)
    with torch.no_grad():
        layer.stride.mul_(2)
    assert layer.output_size(40) == size(6.0)
    layer.load_state_dict({"stride": torch.tensor([5.0])})
    assert layer.output_size(40) == size(5.0)
    layer.load_state_dict({"stride": torch.tensor([4.0])}, assign=True)
    assert layer.output_size(40) == size(4.0)
    layer.stride = nn.Parameter(torch.tensor([8.0]))
    assert layer.output_size(40) == size(8.0)
    layer.reset_parameters()
    assert layer.output_size(40) == size(2.0)


class DeviceStride(StrideParameter):
    """Stands for a stride on a GPU: counts the copies to the host, and takes the path that avoids them."""

    copies = 0

    def tolist(self):
        type(self).copies += 1
        return super().tolist()

    def host(self):
        return self._cached_host()


@pytest.fixture
def on_device():
    DeviceStride.copies = 0
    layer = ds.DiffStride2d((2.0, 2.5), 1)
    layer.stride = DeviceStride(layer.stride.detach().clone())
    return layer


def test_the_device_is_read_once_per_optimiser_step_and_never_in_evaluation(on_device):
    x = torch.randn(1, 1, 20, 20)
    optimizer = torch.optim.SGD(on_device.parameters(), lr=1e-2, momentum=0.9)
    for step in range(1, 4):
        loss = sum(on_device(x).square().mean() for _ in range(3))  # shared by three branches
        optimizer.zero_grad()
        loss.backward()
        assert DeviceStride.copies == step
        optimizer.step()
    for _ in range(5):
        on_device.eval()(x)
        assert on_device.strides == tuple(torch.Tensor.tolist(on_device.stride))
    assert DeviceStride.copies == 4


def test_no_write_is_missed_on_a_device(on_device):
    stride = on_device.stride
    assert host_values(stride) == (2.0, 2.5)
    stride.data.fill_(3.0)
    assert host_values(stride) == (3.0, 3.0)
    with torch.no_grad():
        stride.add_(1.0)
    assert host_values(stride) == (4.0, 4.0)
    alias = stride.data  # an optimiser that keeps `.data` and writes to it later
    assert host_values(stride) == (4.0, 4.0)
    alias[:1].mul_(2)
    assert host_values(stride) == (8.0, 4.0)
    del alias
    host_values(stride)
    copies = DeviceStride.copies
    assert host_values(stride) == (8.0, 4.0)
    assert DeviceStride.copies == copies
    stride.detach().data.mul_(0.5)
    assert host_values(stride) == (4.0, 2.0)
    state = {"stride": stride.detach()}  # as in a moving average over a state_dict
    assert host_values(stride) == (4.0, 2.0)
    state["stride"].data.mul_(2)
    assert host_values(stride) == (8.0, 4.0)
    del state
    stride.data = torch.tensor([1.5, 1.5])
    assert host_values(stride) == (1.5, 1.5)
    torch._foreach_mul_([stride.detach()], 2.0)
    assert host_values(stride) == (3.0, 3.0)


def test_param_groups_keep_strides_apart_and_free_of_decay():
    shared = ds.DiffStride2d(2.0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), shared, nn.BatchNorm2d(2), shared, ds.DiffStride2d(1.5))
    model[0].bias.requires_grad_(False)
    weights, strides = ds.param_groups(model, 0.1, stride_lr=0.02, weight_decay=5e-4)
    assert {id(p) for p in strides["params"]} == {id(shared.stride), id(model[4].stride)}
    assert (strides["lr"], strides["weight_decay"]) == (0.02, 0.0)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 5e-4)
    assert [p.shape for p in weights["params"]] == [(2, 1, 3, 3), (2,), (2,)]
    optimizer = torch.optim.SGD([weights, strides], momentum=0.9)
    model(torch.zeros(1, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert shared.strides == (2.0, 2.0)  # nothing to learn from zeros, and no decay
    assert len(ds.param_groups(nn.Linear(1, 1), 0.1)) == 1


def test_clamp_strides_projects_to_the_users_bounds():
    model = nn.Sequential(ds.DiffStride1d(2.0, bounds=(1.5, 3.0)), ds.DiffStride2d(2.0))
    with torch.no_grad():
        model[0].stride.fill_(7.0)
        model[1].stride.copy_(torch.tensor([-2.0, 50.0]))
    ds.clamp_strides_(model)
    assert [raw(layer) for layer in model] == [[3.0], [1.0, 50.0]]
    assert ds.strides(model) == {"0": (3.0,), "1": (1.0, 50.0)}


def test_strides_without_values_say_what_to_do():
    layer = ds.DiffStride1d(2.0, device="meta")
    with pytest.raises(ValueError, match="got none on the meta device: use to_empty, then reset_parameters"):
        layer.output_size(8)


def test_a_parametrization_keeps_its_place():
    class Twice(nn.Module):
        def forward(self, stride):
            return 2 * stride

    layer = ds.DiffStride1d(2.0, 1)
    nn.utils.parametrize.register_parametrization(layer, "stride", Twice())
    layer = layer.double().float()
    assert layer.output_size(32) == ds.DiffStride1d(4.0, 1).output_size(32)
    layer(torch.randn(1, 1, 32)).square().sum().backward()
    assert layer.parametrizations.stride.original.grad.abs().item() > 0


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    layer = ds.DiffStride2d((np.float32(2), np.int64(3)))
    assert layer.strides == (2.0, 3.0)
    assert layer.output_size(np.int64(32)) == layer.output_size(32)


def test_a_layer_made_in_inference_mode_works():
    with torch.inference_mode():
        layer = ds.DiffStride1d(2.0, 1)
        assert layer(torch.randn(1, 1, 16)).shape[-1] == 10
