"""The modules: what their parameter is and survives, and when the host reads it."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import diffstride as ds
from diffstride import functional, geometry
from diffstride.nn import _parameter
from diffstride.nn._parameter import StrideParameter, host_values
from tests.helpers import reference


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
    """Stands for a stride on a GPU: it takes the path that avoids copies to the host."""

    def _is_remote(self):
        return True


@pytest.fixture
def copies(monkeypatch):
    """Count the copies of strides to the host."""
    made, copy_to_host = [], _parameter._copy_to_host

    def counting(strides):
        made.append(len(strides))
        return copy_to_host(strides)

    monkeypatch.setattr(_parameter, "_copy_to_host", counting)
    return made


def on_device(layer):
    layer.stride = DeviceStride(layer.stride.detach().clone())
    return layer


@pytest.mark.parametrize("clamp", [False, True])
def test_all_strides_are_read_at_once_after_a_step_and_never_in_a_forward_pass(copies, clamp):
    layers = [on_device(ds.DiffStride2d((2.0, 2.5), 1)), on_device(ds.DiffStride2d(1.0, 1))]
    model = nn.Sequential(layers[0], nn.Conv2d(1, 1, 3), layers[1], layers[0])  # one is shared by two branches
    x = torch.randn(2, 1, 20, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    model(x)
    copies.clear()
    for step in range(1, 4):
        model(x).square().mean().backward()
        model.eval()(x)
        assert sum(copies) == 2 * (step - 1), "a forward pass reads the device"
        model.train()
        layers[1].stride.grad.fill_(3.0)  # the step leaves the bounds
        optimizer.step()
        if clamp:
            ds.clamp_strides_(model)
            assert ds.strides(model)["2"] == (1.0, 1.0)
        assert copies == [2] * step
        for layer in layers:
            assert layer.raw_strides == tuple(torch.Tensor.tolist(layer.stride.as_subclass(torch.Tensor)))
    assert copies == [2] * 3


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_layer_reads_nothing_in_a_forward_pass(copies):
    torch._dynamo.reset()
    layer = on_device(ds.DiffStride2d((2.0, 2.5), 1, shared=False))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 1, 20, 20)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    compiled(x)
    copies.clear()
    for step in range(1, 4):
        compiled(x).square().mean().backward()
        assert len(copies) == step - 1
        optimizer.step()
        assert len(copies) == step
    torch.testing.assert_close(compiled(x), layer(x))


def test_no_write_is_missed_on_a_device(copies):
    stride = on_device(ds.DiffStride2d((2.0, 2.5), 1)).stride
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
    made = len(copies)
    assert host_values(stride) == (8.0, 4.0)
    assert len(copies) == made
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
    layer = ds.DiffStride2d((np.float32(2), np.int64(3)))
    assert layer.strides == (2.0, 3.0)
    assert layer.output_size(np.int64(32)) == layer.output_size(32)


def test_a_layer_made_in_inference_mode_works():
    with torch.inference_mode():
        layer = ds.DiffStride1d(2.0, 1)
        assert layer(torch.randn(1, 1, 16)).shape[-1] == 10


LAYERS = {1: ds.DiffStride1d, 2: ds.DiffStride2d, 3: ds.DiffStride3d}
OPTIONS = [
    pytest.param({"backend": b, "basis": s, "window": w}, id=f"{b}-{s}-{w}")
    for b in ("fft", "matmul")
    for s in ("dft", "dct")
    for w in ("outer", "inner")
]


def with_excess(stride, smoothness, size_offset, **options):
    layer = LAYERS[len(size_offset)](stride, smoothness, **options).double()
    layer.size_offset = size_offset
    return layer


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.half()])
def test_excess_is_no_state_and_survives_copies(duplicate):
    layer = ds.DiffStride2d(2.0, 1.0, window="inner")
    assert layer.size_offset == (0, 0)
    assert "size_offset" not in repr(layer)
    layer.size_offset = (0, 1)
    twin = duplicate(nn.Sequential(layer))[0]
    assert twin.size_offset == (0, 1)
    assert repr(twin).endswith("window='inner', size_offset=(0, 1))")
    assert list(twin.state_dict()) == ["stride"]
    assert twin.output_size(8) == (4, 5)
    twin.reset_parameters()
    assert twin.size_offset == (0, 1)


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    size=st.integers(2, 80),
    smoothness=st.floats(0.1, 12),
    window=st.sampled_from(["outer", "inner", "hard"]),
    basis=st.sampled_from(["dft", "dct"]),
    multiple=st.integers(1, 4),
    bounds=st.sampled_from([(1.0, None), (1.5, 3.0)]),
    size_offset=st.integers(1, 3),
)
def test_siblings_come_out_alike(data, size, smoothness, window, basis, multiple, bounds, size_offset):
    stride = data.draw(st.floats(1, size / 2))
    layer = with_excess(2.0, smoothness, (0,), window=window, basis=basis, size_multiple=multiple, bounds=bounds)
    sibling = copy.deepcopy(layer)
    sibling.stride, sibling.size_offset = layer.stride, (size_offset,)
    with torch.no_grad():
        layer.stride.fill_(stride)
    assert sibling.output_size(size) == layer.output_size(size + size_offset)
    x = torch.randn(1, 2, size, dtype=torch.float64)
    assert sibling(x).shape[2:] == layer.output_size(size + size_offset)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("shape", "size_offset"), [((6,), (1,)), ((7,), (1,)), ((6, 7), (1, 1)), ((4, 5, 4), (1, 0, 3))], ids=str
)
def test_gradients_where_an_axis_grows(options, shape, size_offset):
    outer = options["window"] == "outer"
    strides = ((1.37, 1.43, 1.4) if outer else (1.06, 1.04, 1.05))[: len(shape)]
    layer = with_excess(strides, 1.3, size_offset, **options)
    sizes = layer.output_size(shape)
    assert sizes == tuple(n + more for n, more in zip(shape, size_offset, strict=True))
    x = torch.randn(1, 2, *shape, dtype=torch.float64, requires_grad=True)

    def f(x, strides, on_host=True):
        return functional.downsample(x, strides, tuple(strides.tolist()) if on_host else None, sizes, layer.options)

    assert gradcheck(f, (x, layer.stride))
    assert gradgradcheck(f, (x, layer.stride), fast_mode=True)
    y = f(x, layer.stride)
    upstream = torch.randn_like(y)
    by_autograd = torch.autograd.grad(f(x, layer.stride, on_host=False), [x, layer.stride], upstream)
    torch.testing.assert_close(torch.autograd.grad(y, [x, layer.stride], upstream), by_autograd)
    torch.testing.assert_close(torch.autograd.grad(layer(x), [x, layer.stride], upstream), by_autograd)
    with torch.no_grad():
        layer.stride.fill_(1.0)  # at the lower bound, where the Nyquist frequency lies on every ramp
    found, expected = (
        torch.autograd.grad(f(x, layer.stride, on_host), [x, layer.stride], upstream) for on_host in (True, False)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", ["outer", "inner"])
@pytest.mark.parametrize("basis", ["dft", "dct"])
def test_ramps_of_axes_that_grow(window, basis):
    """The coefficients whose weight moves, and by how much: the Nyquist coefficient that splits counts half."""
    splits = 0
    for size in range(2, 20):
        for new in (size, size + 1, size + 2):
            for smoothness in (0.5, 1.3, 4.0):
                bounds = geometry.stride_range(size, smoothness, (1.0, None), window, basis)
                axis = geometry.Axis(size, new, basis, 0.7, smoothness, window, *bounds)
                assert axis.kept == geometry.num_coefficients(size, basis)
                for raw in (1.0, 1.1, 1.37, 2.0, size / 2):
                    stride = torch.tensor(axis.clamp(raw), dtype=torch.float64)
                    first, last = axis.ramp(stride.item())
                    slopes = torch.zeros(axis.kept, dtype=torch.float64)
                    slopes[first:last] = axis.slopes(stride, stride, first, last)
                    expected = torch.autograd.functional.jacobian(lambda s, a=axis: a.weights(s, s), stride)
                    torch.testing.assert_close(slopes, expected, rtol=1e-12, atol=1e-12)
                    splits += new > size and size % 2 == 0 and basis == "dft" and bool(slopes[-1] != 0)
    assert (splits > 0) == (basis == "dft")


def test_an_axis_of_one_sample():
    x = torch.randn(2, 3, 1, 6)
    for window in ("outer", "inner", "hard"):
        for basis in ("dft", "dct"):
            layer = ds.DiffStride2d((1.0, 1.5), window=window, basis=basis)
            layer.size_offset = (0, 1)
            y = layer(x)
            assert y.shape[2] == 1
            layer.size_offset = (1, 1)  # its sibling has two samples, which no stride takes away
            grown = layer(x)
            assert layer.output_size((1, 6)) == grown.shape[2:] == (2, y.shape[3])
            torch.testing.assert_close(grown, y.expand_as(grown))
            grown.square().sum().backward()
            assert layer.stride.grad[0] == 0
            assert torch.isfinite(layer.stride.grad).all()


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_excess_in_a_compiled_graph():
    layers = [ds.DiffStride2d(1.2, 1.0), ds.DiffStrideConv2d(3, 3, 3, 1.2, padding=1, smoothness=1.0)]
    x = torch.randn(2, 3, 8, 9)
    for layer in [*layers, ds.DiffStrideConv3d(2, 4, (1, 3, 3), 1.2, smoothness=1.0)]:
        layer.size_offset = (1,) * layer.ndim
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        y = compiled(x)
        expected = layer(x)
        torch.testing.assert_close(y, expected)
        for g, e in zip(*(torch.autograd.grad(z.square().sum(), layer.stride) for z in (y, expected)), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
        layer.size_offset = (0,) * layer.ndim
        ds.refresh_sizes(layer)
        assert compiled(x).shape == layer(x).shape != expected.shape


def test_the_hard_window_is_spectral_pooling_whose_stride_has_no_gradient():
    """Of `ceil(N/S)` samples; at stride 1 it hands on its input, and where a stride rounds to all samples."""
    x = torch.randn(2, 3, 9, 16, requires_grad=True)
    layer = ds.DiffStride2d((9 / 4, 2.0), window="hard")
    expected = ds.SpectralPool2d((9 / 4, 2.0))(x)
    torch.testing.assert_close(layer(x), expected)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(layer(x), [x, layer.stride], upstream)
    torch.testing.assert_close(grads[0], torch.autograd.grad(expected, x, upstream)[0])
    assert grads[1].tolist() == [0, 0]
    for stride in (1.0, 1.05):
        assert torch.equal(ds.DiffStride2d(stride, window="hard")(x), x)
    waves = torch.cos(torch.pi * torch.arange(16.0)).expand(1, 1, 16)  # the highest frequency of 16 samples
    assert torch.equal(ds.DiffStride1d(1.0, window="hard")(waves), waves)
    half = torch.cos(torch.pi / 2 * torch.arange(16.0)).expand(1, 1, 16)  # that of 8
    assert ds.DiffStride1d(2.0, window="hard")(half).std() > 0.5
    assert ds.DiffStride1d(2.0, window="inner")(half).std() < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_stride_that_went_astray_names_its_layer(value):
    layer = ds.DiffStride2d((2.0, 3.0), window="inner")
    with torch.no_grad():
        layer.stride[1] = value
    with pytest.raises(ValueError, match=r"stride must be finite, got 2, \w+ in DiffStride2d\(stride=\(2, "):
        layer(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("layer", [ds.DiffStride2d, ds.SpectralPool2d])
@pytest.mark.parametrize("backend", ["fft", "matmul"])
def test_an_empty_batch_works(layer, backend):
    layer = layer(2.0, backend=backend)
    y = layer(torch.empty(0, 3, 16, 17, requires_grad=True))
    assert y.shape == (0, 3, *layer.output_size((16, 17)))
    y.sum().backward()


@pytest.mark.parametrize("window", ["inner", "outer", "hard"])
@pytest.mark.parametrize("shared", [False, True])
def test_an_axis_with_bounds_of_1_stays_as_it_is(window, shared):
    options = {"window": window, "smoothness": 2.0}
    layer = ds.DiffStride2d(
        2.3 if shared else (2.3, 1.0), bounds=((1.0, 4.0), (1.0, 1.0)), size_multiple=4, shared=shared, **options
    ).double()
    x = torch.randn(2, 3, 18, 15, dtype=torch.float64, requires_grad=True)
    rows = x.detach().mT.numpy()
    expected = torch.from_numpy(reference.diffstride(rows, (2.3,), 2.0, window=window, multiple=4)).mT
    torch.testing.assert_close(layer(x), expected)
    assert layer.strides == (pytest.approx(2.3), 1.0)
    assert layer.output_size((18, 15)) == layer(x).shape[2:] == (expected.shape[2], 15)
    layer(x).square().sum().backward()
    alone = ds.DiffStride1d(2.3, size_multiple=4, **options).double()
    alone(x.detach().mT.flatten(1, 2)).square().sum().backward()
    assert layer.stride.grad[0] == pytest.approx(alone.stride.grad.item())
    assert shared or layer.stride.grad[1] == 0
    torch.testing.assert_close(ds.stride_cost(layer), torch.tensor(1 / 2.3, dtype=torch.float64), rtol=1e-6, atol=0)
    with torch.no_grad():
        layer.stride.fill_(9.0)
    ds.clamp_strides_(layer)
    assert layer.stride.tolist() == ([4.0] if shared else [4.0, 1.0])


def test_bounds_by_axis_must_be_as_many_as_there_are_axes():
    with pytest.raises(ValueError, match=r"bounds must be one pair, or 2 \(one per axis\), got 3"):
        ds.DiffStride2d(2.0, bounds=((1, None), (1, 1), (1, 1)))
