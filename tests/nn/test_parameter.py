"""The parameter of strides: shared strides stay shared wherever torch makes new parameters; parametrizations work."""

import copy
import io

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import diffstride as ds

X = torch.randn(1, 3, 32, 32)


class Branches(nn.Module):
    """Two branches whose outputs are added, so that their strides must be one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 1, 2)

    def forward(self, x):
        return self.a(x) + self.b(x)

    @property
    def strides_of_both(self):
        return [self.a.strides, self.b.strides]


PLAN = ds.plan(Branches(), X)


def converted(context=None):
    with context or torch.device("cpu"):
        model = Branches()
        PLAN.apply(model)
    return model


def assigned(model):
    model.load_state_dict(converted().state_dict(), assign=True)
    return model


def loaded_in_part(model):
    state = converted().state_dict()
    del state["b.stride"]  # as safetensors' writers drop the second name of a tensor
    model.load_state_dict(state, assign=True, strict=False)
    return model


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def under(option, move):
    def moved():
        getattr(torch.__future__, f"set_{option}")(True)
        try:
            return move()
        finally:
            getattr(torch.__future__, f"set_{option}")(False)

    return moved


META = torch.device("meta")
OVERWRITE, SWAP = "overwrite_module_params_on_conversion", "swap_module_params_on_conversion"
MOVES = {
    "to_empty from meta": lambda: converted(META).to_empty(device="cpu"),
    "to_empty": lambda: converted().to_empty(device="cpu"),
    "assign on meta": lambda: assigned(converted(META)),
    "assign": lambda: assigned(converted()),
    "assign in part": lambda: loaded_in_part(converted(META)),
    "assign twice": lambda: assigned(assigned(converted(META))),
    "overwrite": under(OVERWRITE, lambda: converted().double().float()),
    "overwrite, unchanged": under(OVERWRITE, lambda: converted().cpu().half().float()),
    "swap": under(SWAP, lambda: converted().double().float()),
    "swap from meta": under(SWAP, lambda: converted(META).to_empty(device="cpu")),
    "swap, assign": under(SWAP, lambda: assigned(converted(META))),
    "half and back": lambda: converted().half().float(),
    "a file": lambda: through_a_file(converted()),
    "a copy": lambda: copy.deepcopy(converted(META)).to_empty(device="cpu"),
    "accelerate": lambda: converted(accelerate.init_empty_weights()).to_empty(device="cpu"),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_branches_still_meet_after_their_model_was_moved(move):
    model = move()
    (stride,) = {id(layer.stride): layer.stride for layer in (model.a, model.b)}.values()
    with torch.no_grad():
        stride.fill_(3.0)
    assert model.a.strides == model.b.strides == (3.0, 3.0)
    assert [name for name, _ in model.named_parameters() if "stride" in name] == ["a.stride"]
    model(X).sum().backward()
    assert stride.grad is not None


def test_a_model_without_values_is_converted_like_any_other():
    def branches():
        return nn.ModuleDict({"a": nn.Conv2d(3, 4, 3, 2, 1), "b": nn.Conv2d(3, 4, 1, 2)})

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.of = branches()

        def forward(self, x):
            return self.of["a"](x) + self.of["b"](x)

    plan = ds.plan(Sum(), X)
    with META:
        model = Sum()
    assert ds.convert(model, X.to("meta")) == plan
    assert {p.device for p in model.parameters()} == {META}
    model.to_empty(device="cpu")
    model.of.apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
    assert model.of["a"].stride is model.of["b"].stride
    assert model.of["b"].strides == (2.0, 2.0)


def test_layers_that_part_stay_apart():
    model = converted()
    model.b.stride = nn.Parameter(torch.tensor([4.0, 4.0]))
    model = under(OVERWRITE, lambda: model.double())()
    assert (model.a.strides, model.b.strides) == ((2.0, 2.0), (4.0, 4.0))


def test_a_shared_stride_is_saved_under_every_name_and_written_through_the_first(tmp_path):
    """As safetensors asks for it, and as averages of weights that write to the tensors of `state_dict` do."""
    model = converted()
    with torch.no_grad():
        model.a.stride.copy_(torch.tensor([2.5, 3.5]))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = converted()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert fresh.a.stride is fresh.b.stride
    assert fresh.strides_of_both == model.strides_of_both == [(2.5, 3.5)] * 2
    for tensor in model.state_dict().values():
        tensor.mul_(2.0)
    assert model.strides_of_both == [(5.0, 7.0)] * 2
    assert model.state_dict(keep_vars=True)["b.stride"] is model.a.stride


class Logarithm(nn.Module):
    """The parametrization `S = exp(raw)`."""

    def forward(self, raw):
        return raw.exp()

    def right_inverse(self, stride):
        return stride.log()


class Scaled(nn.Module):
    """A parametrization with a parameter of its own that cannot be inverted."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, raw):
        return self.scale * raw


def network(parametrization=None):
    torch.manual_seed(0)
    layers = ds.DiffStride2d(2.0, window="inner"), ds.DiffStrideConv2d(4, 4, 3, 2.0, padding=1, window="inner")
    if parametrization is not None:
        for layer in layers:
            parametrize.register_parametrization(layer, "stride", parametrization())
    return nn.Sequential(nn.Conv2d(3, 4, 3), layers[0], nn.Conv2d(4, 4, 3, padding=1), layers[1], nn.Conv2d(4, 2, 3))


@pytest.mark.parametrize(("kind", "chain"), [(Logarithm, 2.0), (Scaled, 1.0)])
def test_a_parametrized_stride_has_the_cost_of_a_plain_one_and_its_gradient_by_the_chain_rule(kind, chain):
    plain, model = network(), network(kind)
    costs = [ds.CostModel(each, X) for each in (plain, model)]
    terms = [torch.stack([cost(), 1e6 * cost.budget(0.8)()]) for cost in costs]
    torch.testing.assert_close(*terms)
    for term in terms:
        term.sum().backward()
    for i in (1, 3):
        raw = model[i].parametrizations.stride.original
        torch.testing.assert_close(raw.grad, chain * plain[i].stride.grad)
    assert [cost.exact() for cost in costs] == [cost.initial() for cost in costs]
    assert (costs[0].minimum(), costs[0].maximum()) == (costs[1].minimum(), costs[1].maximum())


@pytest.mark.parametrize("kind", [Logarithm, Scaled])
def test_no_part_of_a_parametrized_stride_decays_or_loses_precision(kind):
    model = network(kind)
    strides = {name for name, _ in model.named_parameters() if "stride" in name}
    names = {p: name for name, p in model.named_parameters()}
    *_, group = ds.param_groups(model, 0.1, weight_decay=0.5)
    assert (group["name"], group["weight_decay"]) == ("strides", 0.0)
    assert {names[p] for p in group["params"]} == strides
    model.half()
    assert {p.dtype for name, p in model.named_parameters() if name in strides} == {torch.float32}


def test_strides_are_reset_and_clamped_through_a_parametrization():
    model = network(Logarithm)
    with torch.no_grad():
        for i in (1, 3):
            model[i].parametrizations.stride.original.fill_(-1.0)
    ds.clamp_strides_(model)
    torch.testing.assert_close(model[1].parametrizations.stride.original, torch.zeros(2))
    model[3].reset_parameters()
    torch.testing.assert_close(model[3].parametrizations.stride.original, torch.full((2,), 2.0).log())


def test_a_reset_that_a_parametrization_does_not_allow_is_refused_and_changes_nothing():
    model = network(Scaled)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^stride must have a parametrization with right_inverse .* got Scaled$"):
        model[3].reset_parameters()
    ds.clamp_strides_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
