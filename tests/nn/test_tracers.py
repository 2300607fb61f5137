"""Torch's tracers on the layers: leaves of a graph, or an error that names freeze."""

import io

import pytest
import torch
from torch import fx, nn
from torch.utils.tensorboard import SummaryWriter

import diffstride as ds
from diffstride.errors import UsageError

X = torch.randn(2, 3, 16, 16)
LAYERS = {
    "DiffStride2d": lambda: ds.DiffStride2d(2.0),
    "DiffStrideConv2d": lambda: ds.DiffStrideConv2d(3, 3, 3),
    "SpectralPool2d": lambda: ds.SpectralPool2d(2.0),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_are_leaves_of_fx_that_go_on_learning(make):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), make(), nn.ReLU())
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    for stride in (2.0, 3.0):
        for parameter in (p for name, p in model.named_parameters() if "stride" in name):
            parameter.data.fill_(stride)
        torch.testing.assert_close(traced(X), model(X))
    assert all(p.grad is None for p in model.parameters())
    traced(X).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_converted_model_gives_its_features_through_fx():
    """As torchvision's and timm's feature extraction does it, with submodules nested and layers attached by a hook."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pool = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()), nn.MaxPool2d(2)

        def forward(self, x):
            return self.pool(self.body(x)).flatten(1)

    model = nn.Sequential(Branch())
    ds.convert(model, X)
    graph = fx.Tracer().trace(model)
    feature = next(node for node in graph.nodes if node.target == "0.pool")
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (feature,)
    extracted = fx.GraphModule(model, graph)
    torch.testing.assert_close(extracted(X).flatten(1), model(X))


TRACERS = {
    "jit.trace": lambda m, _: torch.jit.trace(m, X),
    "jit.script": lambda m, _: torch.jit.script(m),
    "add_graph": lambda m, folder: SummaryWriter(folder).add_graph(m, X),
    "onnx, older": lambda m, _: torch.onnx.export(m, (X,), io.BytesIO(), dynamo=False),
    "export": lambda m, _: torch.export.export(m, (X,)),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
@pytest.mark.filterwarnings("ignore")
def test_tracers_that_cannot_follow_strides_are_referred_to_freeze(trace, make, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), make()).eval()
    if trace is TRACERS["export"] and make is LAYERS["SpectralPool2d"]:
        torch.testing.assert_close(trace(model, tmp_path).module()(X), model(X))  # nothing is learned
        return
    model(X)  # what a layer keeps of this call is of no use to a tracer
    with pytest.raises(UsageError, match=r"give it diffstride\.freeze\(model, example_inputs\)$"):
        trace(model, tmp_path)
