"""torch.compile: whole graphs without breaks, and one of them for all sizes that strides pass through."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diffstride as ds
from diffstride import _graph
from diffstride.experiments.models import TinyCNN
from diffstride.integrations.input_sizes import InputSizes

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles


class Graphs:
    """A backend that counts the graphs and runs them as they are, with their backward traced too."""

    def __init__(self, traced_backward=False):
        torch._dynamo.reset()
        self.count = 0
        self.traced_backward = traced_backward

    def __call__(self, graph, inputs):
        self.count += 1
        if self.traced_backward:
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        return graph.forward

    def compile(self, model):
        return torch.compile(model, fullgraph=True, backend=self)

    def compile_parts(self, function):
        """Compile the parts that torch can compile."""
        return torch.compile(function, backend=self)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        ds.DiffStride2d((2.0, 1.6), 1.0),
        nn.ReLU(),
        ds.DiffStrideConv2d(8, 8, 3, 1.5, padding=1, smoothness=1.0),
        ds.DiffStrideConv2d(8, 32, 1, 1.3, window="inner", basis="dct"),
        ds.SpectralPool2d(1.5),
    )


def gradients(model, y):
    return torch.autograd.grad(y.square().mean(), list(model.parameters()))


def test_forward_and_backward_in_one_graph_are_those_of_eager_mode():
    model = network()
    compiled = Graphs(traced_backward=True).compile(model)
    x = torch.randn(2, 3, 24, 21)
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(gradients(model, compiled(x)), gradients(model, model(x)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ds.DiffStride1d(2.3, 1.0), (2, 3, 40)),
        (ds.DiffStride1d(2.3, 1.0, backend="fft", basis="dct"), (2, 3, 41)),
        (ds.DiffStride2d(2.3, 1.0, backend="fft"), (2, 3, 12, 15)),
        (ds.DiffStride2d(2.3, 1.0, size_multiple=4), (3, 12, 15)),
        (ds.DiffStride3d(2.3, 1.0, shared=True), (2, 3, 8, 9, 10)),
        (ds.DiffStrideConv1d(3, 3, 3, 2.3, smoothness=1.0), (2, 3, 40)),
    ],
    ids=lambda v: repr(v) if isinstance(v, nn.Module) else "",
)
def test_every_layer_compiles(layer, shape):
    compiled = Graphs().compile(layer)
    x = torch.randn(shape)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(gradients(layer, y), gradients(layer, layer(x)), rtol=1e-4, atol=1e-6)


def test_modes_and_layouts():
    layer = ds.DiffStride2d(2.0, 1.0)
    x = torch.randn(2, 3, 16, 12)
    compiled = Graphs().compile(layer)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    last = x.contiguous(memory_format=torch.channels_last)
    assert compiled(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(compiled(last), layer(last))
    torch.testing.assert_close(compiled(x.bfloat16()), layer(x.bfloat16()), rtol=0.05, atol=0.05)
    conv = ds.DiffStrideConv2d(3, 4, 3, 2.0, padding=1)
    compiled = Graphs().compile(conv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
        torch.testing.assert_close(compiled(x), conv(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(2, 3, 16, 12), (2, 3, 140, 4)], ids=["dense", "dense and fft"])
def test_gradients_of_a_graph_under_autocast_keep_their_precision(shape):
    """The backward is traced under the autocast around the graph; in eager mode it runs outside of it."""
    layer = ds.DiffStride2d((2.0, 1.6), 1.0)
    x = torch.randn(shape, requires_grad=True)
    compiled = Graphs(traced_backward=True).compile(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x)
    assert y.dtype == torch.float32
    upstream = torch.randn_like(y)
    found, expected = (torch.autograd.grad(z, [x, layer.stride], upstream) for z in (y, layer(x)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_training_makes_one_graph_for_all_sizes():
    model = nn.Sequential(ds.DiffStride2d((2.0, 2.0), 1.0), nn.Conv2d(2, 3, 3, 2), ds.DiffStrideConv2d(3, 3, 3, 1.5))
    graphs = Graphs(traced_backward=True)
    compiled = graphs.compile(model)
    x = torch.randn(1, 2, 60, 50, requires_grad=True)
    optimizer = torch.optim.SGD([model[0].stride, model[2].stride], lr=1.0)
    seen = set()
    for stride in (2.05, 2.051, 2.2, 2.201, 1.0, 2.2, 2.6, 7.0):
        # The optimizer writes the stride, as any would: by its step alone the sizes are known.
        optimizer.zero_grad()
        model[0].stride.grad = model[0].stride.detach() - stride
        optimizer.step()
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        upstream = torch.randn_like(y)
        found, expected = (torch.autograd.grad(z, [x, *model.parameters()], upstream) for z in (y, model(x)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        seen.add(tuple(y.shape))
    assert len(seen) > 4
    assert graphs.count <= 3  # one, and the others where the fused convolution works in another order


def test_a_compiled_training_step_makes_no_graph_for_new_sizes():
    network = TinyCNN(strides=[(2.0, 2.0)], downsample_options={"size_multiple": 2})
    optimizer = torch.optim.SGD(ds.param_groups(network, 0.02, stride_lr=1.0), momentum=0.9)
    images, labels = torch.randn(4, 1, 24, 20), torch.tensor([0, 1, 2, 3])
    graphs = Graphs(traced_backward=True)

    @graphs.compile_parts
    def step():
        loss = F.cross_entropy(network(images), labels) + ds.stride_cost(network)
        loss.backward()
        optimizer.step()

    sizes, made = [], []
    for count in range(14):
        if count == 8:
            optimizer.param_groups[1]["lr"] = 1e-6
        before = graphs.count
        sizes.append(network.down.output_size((24, 20)))
        step()
        optimizer.zero_grad()
        ds.clamp_strides_(network)
        made.append(graphs.count - before)
    # Those of the optimizer itself: the first steps, the first with momentum, and a new rate.
    assert [made[i] for i in range(14) if i not in (0, 1, 8)] == [0] * 11
    assert len(set(sizes[1:8])) > 3


def test_fifty_sizes():
    graphs = Graphs(traced_backward=True)
    model = nn.Sequential(
        ds.DiffStride1d(1.0, 1.0), nn.Conv1d(1, 2, 3), nn.ReLU(), ds.DiffStride1d(2.0, 1.0, basis="dct")
    )
    compiled = graphs.compile(model)
    x = torch.randn(1, 1, 120)
    for size in range(50, 100):
        model[0].load_state_dict({"stride": torch.tensor([120 / (size - 1.5)])})
        y = compiled(x)
        assert model[0](x).shape[-1] == size
        torch.testing.assert_close(y, model(x))
        torch.testing.assert_close(gradients(model, y), gradients(model, model(x)), rtol=1e-4, atol=1e-6)
    assert graphs.count == 1


def test_a_layer_that_sees_maps_of_several_sizes():
    shared, other = ds.DiffStride2d(2.0, 1.0), ds.DiffStride2d(1.5, 1.0)
    model = nn.Sequential(shared, other, shared)
    graphs = Graphs()
    compiled = graphs.compile(model)
    x = torch.randn(1, 2, 40, 36)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = set()
    for stride in (2.0, 2.3, 2.0, 2.9):
        shared.stride.grad = shared.stride.detach() - stride
        optimizer.step()
        torch.testing.assert_close(compiled(x), model(x))
        seen.add(shared.output_size((40, 36)) + tuple(model(x).shape))
    assert len(seen) == 3
    assert graphs.count == 1
    torch.testing.assert_close(compiled(x[..., :30]), model(x[..., :30]))


def test_batches_of_any_size_share_a_graph():
    graphs = Graphs()
    layer = ds.DiffStride2d(2.0, 1.0)
    compiled = graphs.compile(layer)
    for batch in (4, 5, 6, 7, 9):
        assert compiled(torch.randn(batch, 2, 16, 16)).shape == (batch, 2, 10, 10)
    assert graphs.count == 2  # a fixed batch, then a symbolic one


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.load_state_dict({"stride": torch.tensor([3.0, 3.0])}),
        lambda layer: layer.reset_parameters(),
        lambda layer: (layer.stride.data.fill_(0.5), ds.clamp_strides_(layer)),
        lambda layer: (layer.stride.data.fill_(5.0), ds.refresh_sizes(layer)),
    ],
    ids=["load_state_dict", "reset_parameters", "clamp_strides_", "refresh_sizes"],
)
def test_other_writes_are_seen(write):
    layer = ds.DiffStride2d(2.0, 1.0)
    layer.stride.data.fill_(1.5)
    compiled = Graphs().compile(layer)
    x = torch.randn(1, 2, 20, 20)
    before = compiled(x).shape
    write(layer)
    assert compiled(x).shape == layer(x).shape != before


def test_a_shared_stride_is_seen_through_its_other_owner():
    pool = ds.DiffStride2d(2.0, 1.0)
    fused = ds.DiffStrideConv2d.fuse(nn.Conv2d(2, 2, 3, padding=1), pool)
    compiled = Graphs().compile(fused)
    x = torch.randn(1, 2, 20, 20)
    compiled(x)
    for write in (lambda: pool.load_state_dict({"stride": torch.tensor([4.0, 4.0])}), pool.reset_parameters):
        write()
        assert compiled(x).shape == fused(x).shape


def test_other_optimizers_are_none_of_its_business():
    layer = ds.DiffStride2d(2.0, 1.0)
    Graphs().compile(layer)(torch.randn(1, 2, 20, 20))
    layer.stride.data.fill_(float("nan"))
    other = nn.Linear(2, 2)
    other(torch.randn(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    layer.stride.grad = torch.zeros(2)
    with pytest.raises(ValueError, match="stride must be finite, got nan"):
        torch.optim.SGD(layer.parameters(), lr=0.1).step()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_settle_their_own_sizes(duplicate):
    layer = ds.DiffStride2d(2.0, 1.0)
    x = torch.randn(1, 2, 20, 20)
    Graphs().compile(layer)(x)
    twin = duplicate(layer)
    with torch.no_grad():
        twin.stride.fill_(4.0)
    assert torch.compile(twin, fullgraph=True, backend="eager")(x).shape == twin(x).shape
    assert layer(x).shape != twin(x).shape


def test_a_compiled_layer_is_not_kept_alive():
    layer = ds.DiffStride1d(2.0, 1.0)
    Graphs().compile(layer)(torch.randn(1, 1, 20))
    assert any(found is layer for found in _graph.layers())
    gone = weakref.ref(layer)
    del layer
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("exploration", [ds.Jitter(0.2), ds.Sweep()], ids=["jitter", "sweep"])
def test_exploration_in_compiled_graphs(exploration):
    """A compiled layer explores as in eager mode."""
    pool, conv = ds.DiffStride2d((2.0, 1.6), 1.0), ds.DiffStrideConv2d(3, 4, 3, 1.5, padding=1, smoothness=1.0)
    model = nn.Sequential(pool, conv)
    graphs = Graphs(traced_backward=True)
    compiled = graphs.compile(model)
    x = torch.randn(2, 3, 24, 21)
    sizes, factors = set(), set()
    for step in range(0, 12, 4):
        exploration.set_strides(model, step, 20)
        factors.add((pool.stride_scale, conv.stride_scale))
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        torch.testing.assert_close(gradients(model, y), gradients(model, model(x)), rtol=1e-4, atol=1e-6)
        sizes.add((pool(x).shape, y.shape, pool.stride_scale is None, conv.stride_scale is None))
    assert len(factors) == 3
    assert 1 < graphs.count == len(sizes)
    model.eval()
    exploration.set_strides(model, 1, 20)
    assert compiled(x).shape[-2:] == conv.output_size(pool.output_size((24, 21))) != y.shape[-2:]
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("watched", [False, True])
def test_factors_that_change_no_size_make_no_graph(watched):
    first, second = ds.DiffStride2d(1.85, 1.0, size_multiple=8), ds.DiffStride2d(1.8, 1.0, size_multiple=8)
    model = nn.Sequential(first, second)
    if watched:  # as in every run of `diffstride fit`
        notes = InputSizes(model)
        model(torch.randn(1, 2, 64, 64))
    graphs = Graphs()
    compiled = graphs.compile(model)
    x = torch.randn(1, 2, 64, 64)
    for step in range(20):
        ds.Jitter(0.02, 1.0).set_strides(model, step, 20)
        torch.testing.assert_close(compiled(x), model(x))
    assert graphs.count <= (2 if watched else 1)
    if watched:
        assert notes.sizes == {"0": (64, 64), "1": (40, 40)}
