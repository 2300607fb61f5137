"""Inserted strides: the model computes what it computed, and every stride can make it cheaper."""

import copy

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride.convert.apply import layer_of
from diffstride.errors import UsageError
from diffstride.nn.learnable import LearnableStrides
from tests.helpers import zoo
from tests.helpers.zoo import block, head

CASES = [name for name in zoo.CASES if name not in zoo.BEFORE]
# Maps of a different batch are normalised by other statistics; here the statistics are those of evaluation mode.
PLACES = {
    "resnet": [
        ["(input)"], ["resnet.embedder.embedder.convolution"], ["resnet.embedder.pooler"],
        *([f"resnet.encoder.stages.{i}.layers.0.{part}.convolution" for part in ("shortcut", "layer.0")]
          for i in (1, 2)),
    ],
    "resnet-d": [["(input)"], ["0.0"], *([f"{i}.main.0.0", f"{i}.shortcut.0"] for i in (1, 3))],
    "inception": [["(input)"], ["0.0"], *([f"{i}.{part}" for part in ("short.0", "long.2.0", "pool")] for i in (1, 3))],
    "unet": [["(input)"], ["pool.0"], ["pool.1"], ["pool.2"]],
    "wav2vec2": [["(input)"], *([f"feature_extractor.conv_layers.{i}.conv"] for i in range(4))],
}  # fmt: skip


def outputs(model, name):
    with torch.no_grad():
        return [zoo.tensor_of(zoo.bare_call(model.eval(), zoo.CASES[name].inputs(scale))) for scale in (0, 1)]


def set_strides(model, value):
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LearnableStrides):
                layer.stride.fill_(value)


@pytest.mark.parametrize("name", CASES)
def test_the_model_computes_what_it_computed(name):
    """Outputs at two sizes are the same; weights keep their names; a frozen copy has no trace of the layers."""
    torch.manual_seed(1)
    model = zoo.CASES[name].build()
    torch.manual_seed(2)
    before = outputs(model, name)
    state, modules = dict(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
    plan = ds.insert(model, zoo.CASES[name].inputs(0))
    torch.manual_seed(2)
    for old, new in zip(before, outputs(model, name), strict=True):
        assert (new - old).abs().max() <= 1e-5 * old.abs().max()
    assert plan.groups == PLACES.get(name, plan.groups)
    if name == "vgg":  # the mean of the whole map is all that follows the last pooling
        assert plan.left_alone == {"8": "no multiply-accumulates follow it"}
    assert plan.groups[0] == ["(input)"]
    assert plan.macs_after == plan.macs_before
    assert ds.CostModel(model, zoo.CASES[name].inputs(0)).baseline() == plan.macs_before
    kept = {n: t for n, t in model.state_dict().items() if not n.endswith("stride")}
    assert kept.keys() == state.keys()
    assert all(kept[n].data_ptr() == t.data_ptr() for n, t in state.items())
    poolings = {n: type(model.get_submodule(n)) for n in plan.global_poolings}
    assert {n: type(m) for n, m in model.named_modules() if n in modules} == modules | poolings
    assert all(layer_of(model, site).shared for site in plan.sites)


@pytest.mark.parametrize("name", ["resnet", "resnet-d", "unet", "unet-transposed", "inception", "mixed", "audio-1d"])
def test_larger_strides_make_it_cheaper_and_branches_still_meet(name, tmp_path):
    torch.manual_seed(1)
    model = zoo.CASES[name].build().eval()
    fresh = copy.deepcopy(model)
    plan = ds.insert(model, zoo.CASES[name].inputs(0))
    inputs, cost = zoo.CASES[name].inputs(0), ds.CostModel(model, zoo.CASES[name].inputs(0))
    whole = convolutions = plan.macs_before
    assert cost.exact() == whole
    for value in (1.05, 1.2, 1.35):
        set_strides(model, value)
        total, resampling = zoo.products(model, inputs)
        before, convolutions = convolutions, total[""] - sum(resampling.values())
        assert convolutions <= before
        assert value == 1.05 or cost.exact() < whole  # behind strides of 1, which cost nothing, resampling begins
        whole = cost.exact()
        assert whole == total[""]
        for scale in (0, 1):
            assert zoo.tensor_of(zoo.bare_call(model, zoo.CASES[name].inputs(scale))).isfinite().all()
    assert convolutions < 0.7 * plan.macs_before
    plan.save(tmp_path / "plan.json")
    loaded = ds.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert str(loaded) == str(plan)
    loaded.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = zoo.tensor_of(zoo.bare_call(model, inputs))
        assert torch.equal(zoo.tensor_of(zoo.bare_call(fresh, inputs)), expected)
        frozen = ds.freeze(model, inputs)
        torch.testing.assert_close(zoo.tensor_of(zoo.bare_call(frozen, inputs)), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, LearnableStrides) for module in frozen.modules())


@pytest.mark.parametrize("name", ["resnet", "vgg", "unet", "mixed", "audio-1d"])
def test_every_stride_has_a_gradient_at_the_start(name):
    """Of the loss and of the cost; a budget then reaches its target."""
    torch.manual_seed(1)
    model = zoo.CASES[name].build().eval()
    inputs = zoo.CASES[name].inputs(0)
    ds.insert(model, inputs)
    strides = {layer.stride_id: layer.stride for layer in model.modules() if isinstance(layer, LearnableStrides)}
    cost = ds.CostModel(model, inputs)
    cost().backward()
    assert all(stride.grad.item() < 0 for stride in strides.values())  # larger strides are cheaper
    for stride in strides.values():
        stride.grad = None
    for sign in (1, -1):  # the clamp stops a gradient that points below 1
        (sign * zoo.tensor_of(zoo.bare_call(model, inputs)).square().sum()).backward()
    assert all(stride.grad is not None and stride.grad.abs().sum() > 0 for stride in strides.values())
    if name == "mixed":  # so thin that resampling takes more than its convolutions can save
        with pytest.raises(UsageError, match="amount must be between the least and the most"):
            cost.budget(0.6)
        return
    budget = cost.budget(0.6)
    optimizer = torch.optim.SGD(strides.values(), lr=0.1, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        budget().backward()
        optimizer.step()
        ds.clamp_strides_(model)
    assert cost.exact() / cost.baseline() == pytest.approx(0.6, abs=0.03)


def test_a_network_without_downsampling_needs_include():
    model = nn.Sequential(block(2, 8, dim=1), block(8, 8, dim=1), *head(8, dim=1)).eval()
    x = torch.randn(4, 2, 60)
    before = model(x)
    plan = ds.insert(copy.deepcopy(model), x)
    assert plan.groups == [["(input)"]]
    plan = ds.insert(model, x, include="0", exclude="(input)")
    assert plan.groups == [["0"]]
    assert plan.left_alone == {"(input)": "excluded"}
    torch.testing.assert_close(model(x), before)
    set_strides(model, 2.0)
    seen = []
    model[1].register_forward_hook(lambda module, args, y: seen.append(y.shape[-1]))
    model(x)
    assert seen == [30]
    assert "0" in str(plan)
    assert "followed by DiffStride1d" in str(plan)
    frozen = ds.freeze(model, x)
    torch.testing.assert_close(frozen(x), model(x))


def test_a_map_that_must_keep_its_size_has_no_layer():
    model = zoo.UNet()
    model.skip = nn.Conv2d(3, 5, 1)
    forward = model.forward
    model.forward = lambda x: forward(x) + model.skip(x)
    plan = ds.insert(model, torch.randn(2, 3, 32, 32))
    assert plan.groups == [["pool.0"], ["pool.1"], ["pool.2"]]
    assert "its map must keep its size for the model itself (UNet), at add" in plan.left_alone["(input)"]


def test_nothing_that_can_shrink_is_an_error_and_changes_nothing():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x)

    model = Skip()
    with pytest.raises(UsageError, match=r"\(input\): its map must keep its size for .*Skip.*, at add"):
        ds.insert(model, torch.randn(2, 3, 16, 16))
    assert list(model.state_dict()) == ["conv.weight", "conv.bias"]


def test_sizes_that_must_be_even_make_the_plan_round():
    """The shortcut of a ResNet-D averages pairs; the main path rounds up."""
    torch.manual_seed(1)
    model, x = zoo.resnet_d().eval(), torch.randn(2, 3, 32, 32)
    plan = ds.insert(model, x)
    assert {site.key: site.size_multiple for site in plan.sites if site.size_multiple > 1} == {
        "0.0": 2, "1.main.0.0": 2, "1.shortcut.0": 2
    }  # fmt: skip
    for value in (1.1, 1.25, 1.4, 1.9):
        set_strides(model, value)
        model(x)
    windows = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.PixelUnshuffle(2), nn.Conv2d(32, 4, 1), *head(4))
    converted = ds.convert(copy.deepcopy(windows), torch.randn(2, 3, 64, 64))
    assert [site.size_multiple for site in converted.sites] == [2]
    ds.convert(windows, torch.randn(2, 3, 64, 64), size_multiple=3)
    assert windows[0].size_multiple == 6


class Windows(nn.Module):
    """Three convolutions of stride 2, and windows of 7 x 7 behind each."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, 4, 3, 2, 1) for i in (3, 4, 4))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
            assert x.shape[-1] % 7 == 0, "windows of 7"
        return self.head(x).mean((-1, -2))


def test_a_place_where_no_other_stride_runs_is_left_alone():
    """At 1.07, the input of 56 samples becomes 53, then 27, 21, 11, 7 and 4."""
    model, x = Windows(), torch.randn(1, 3, 56, 56)
    expected = model(x)
    plan = ds.insert(model, x)
    assert plan.groups == [["convs.0"], ["convs.1"], ["convs.2"]]
    assert {site.size_multiple for site in plan.sites} == {7}
    assert "raised AssertionError: windows of 7" in plan.left_alone["(input)"]
    torch.testing.assert_close(model(x), expected)


def test_a_module_whose_output_has_many_axes_is_left_alone():
    class Six(nn.Module):
        def forward(self, x):
            return x.unflatten(-1, (-1, 4)).unflatten(2, (-1, 4))

    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), Six(), nn.Flatten(1))
    plan = ds.insert(model, torch.randn(1, 3, 64, 64), include="2")
    assert "2" in plan.left_alone


@pytest.mark.parametrize("change", [ds.insert, ds.convert])
def test_strides_that_are_added_in_inference_mode_learn(change):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    models = [network, copy.deepcopy(network)]
    images = torch.randn(2, 3, 24, 24)
    with torch.inference_mode():
        plan = change(models[0], images.clone())
    assert plan == change(models[1], images)
    set_strides(models[0], 1.5)
    set_strides(models[1], 1.5)
    gradients = []
    for model in models:
        model(images).square().sum().backward()
        gradients.append([layer.stride.grad for layer in model.modules() if isinstance(layer, LearnableStrides)])
    assert all(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])
