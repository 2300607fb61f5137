"""Every model of the zoo converted: the right sites and groups, sizes as before, gradients, weights, copies."""

import copy
import io

import pytest
import torch
from torch import nn

import diffstride as ds
from diffstride.convert.apply import layer_of
from diffstride.nn.attach import CHILDREN
from diffstride.nn.learnable import LearnableStrides
from tests.helpers import zoo

ALL = pytest.mark.parametrize("name", list(zoo.CASES))
SCALES = (0, 1)


def stages(start, prefix, numbers, *names):
    """Return the groups of a stem, then one group per stage with a layer for each name."""
    return [[name] for name in start] + [[f"{prefix.format(i)}.{name}" for name in names] for i in numbers]


# Read off the models' code: for each case the groups, in the order of registration.
GROUPS = {
    "resnet": stages(
        ["resnet.embedder.embedder.convolution", "resnet.embedder.pooler"],
        "resnet.encoder.stages.{}.layers.0", (1, 2), "shortcut.convolution", "layer.0.convolution",
    ),
    "resnet-bottleneck": stages(  # the 3x3 convolution has the stride
        ["resnet.embedder.embedder.convolution", "resnet.embedder.pooler"],
        "resnet.encoder.stages.{}.layers.0", (1, 2), "shortcut.convolution", "layer.1.convolution",
    ),
    "convnext": stages(["convnext.embeddings.patch_embeddings"], "convnext.encoder.stages.{}", (1, 2),
                       "downsampling_layer.1"),
    "regnet": stages(["regnet.embedder.embedder.convolution"], "regnet.encoder.stages.{}.layers.0", (0, 1, 2),
                     "shortcut.convolution", "layer.1.convolution"),
    "mobilenet-v1": stages(["mobilenet_v1.conv_stem.convolution"], "mobilenet_v1.layer.{}", (2, 6, 10, 22),
                           "convolution"),
    "mobilenet-v2": stages(["mobilenet_v2.conv_stem.first_conv.convolution"], "mobilenet_v2.layer.{}", (0, 2, 5),
                           "conv_3x3.convolution"),
    "efficientnet": stages(["efficientnet.embeddings.convolution"], "efficientnet.encoder.blocks.{}", (1, 3, 4),
                           "depthwise_conv.depthwise_conv"),
    "swin": [["swin.embeddings.patch_embeddings.projection"]],
    "wav2vec2": stages([], "feature_extractor.conv_layers.{}", range(4), "conv"),
    "vgg": [["2"], ["5"], ["8"]],
    "densenet": [["0.0"], ["2.1"], ["4.1"]],
    "inception": stages(["0.0"], "{}", (1, 3), "short.0", "long.2.0", "pool"),
    "resnet-d": stages(["0.0"], "{}", (1, 3), "main.0.0", "shortcut.0"),
    "unet": [["pool.0"], ["pool.1"], ["pool.2"]],
    "unet-transposed": [["down.0.0"], ["down.1.0"]],
    "resnet-blur": [["1"], ["2.main.1", "2.shortcut.0"], ["3.main.1", "3.shortcut.0"]],
    "pool-in-code": [["stem.0"], ["last.0"]],
    "slices": [["stem.0"], ["last.0"]],
    "pyramid": [["down.0.0"]],
    "unet-by-size": [["pool.0"], ["pool.1"], ["pool.2"]],
    "selective-kernel": [["stem.0"], ["small.0", "large.0"]],
    "detr": [["backbone.0.0"], ["backbone.1"], ["backbone.2.0"]],
    "resnet-3d": [["0.0"], ["2.main.0.0", "2.shortcut.0"], ["4.0"]],
    "audio-1d": [["0.0"], ["1.0"], ["2"], ["3.0"]],
    "mixed": [["stem.0"], ["grouped.0"], ["pool"], ["dilated.0"], ["average"]],
}  # fmt: skip
# Strides other than 2 on every axis, by the start of the name.
STRIDES = {
    "convnext": {"convnext.embeddings": (4, 4)},
    "swin": {"swin": (4, 4)},
    "wav2vec2": {"feature_extractor.conv_layers.0": (5,)},
    "resnet-3d": {"0.0": (1, 2, 2)},
    "audio-1d": {"0.0": (4,)},
    "mixed": {"grouped": (2, 1), "average": (1, 2)},
}
# Stride-1 selves that fall short of the group's largest, or of what ceil_mode gives.
EXCESS = {
    "resnet-d": {"1.shortcut.0": (1, 1), "3.shortcut.0": (1, 1)},
    "mixed": {"pool": (1, 1), "average": (0, 1)},
}
# Modules that keep their class, with a layer behind: poolings, forwards of their own, strides that the code reads.
KEPT = {
    "resnet": ["resnet.embedder.pooler"],
    "resnet-bottleneck": ["resnet.embedder.pooler"],
    "mobilenet-v1": "all",
    "mobilenet-v2": "all",
    "vgg": "all",
    "densenet": ["2.1", "4.1"],
    "inception": ["1.pool", "3.pool"],
    "resnet-d": ["1.shortcut.0", "3.shortcut.0"],
    "unet": "all",
    "unet-by-size": "all",
    "resnet-blur": "all",
    "detr": ["backbone.1"],
    "audio-1d": ["2"],
    "mixed": ["stem.0", "pool", "average"],
}
# Convolutions that do not keep the size of their map at stride 1, or have a forward of their own, where layers come
# before the others.
AFTER = {"mixed-before": ["stem.0"]}
RESIZES = {
    "unet": [("grow.2", "down.2.2"), ("grow.1", "down.1.2"), ("grow.0", "down.0.2")],
    "unet-transposed": [("up.0", "down.0.2"), ("up.1", "stem.2")],
}
LEFT = {
    "swin": [f"swin.encoder.layers.{i}.downsample" for i in (0, 1)],
    "pool-in-code": ["(the model)"],
    "slices": ["(the model)"],
    "pyramid": ["down.2.0", "down.1.0"],
}
for same in (GROUPS, STRIDES, EXCESS, RESIZES):
    same |= {name: same[after] for name, after in zoo.BEFORE.items() if after in same}
KEPT |= dict.fromkeys(zoo.BEFORE, "all")


def given(table, case, name, default):
    return next((v for start, v in table.get(case, {}).items() if name.startswith(start)), default)


def layer_name(site):
    return site.name if site.fused else f"{site.name}.{CHILDREN[site.placement]}"


def by_site(model, plan):
    return {site.name: layer_of(model, site) for site in plan.sites}


def output_sizes(model, names, inputs):
    """Return the spatial sizes of modules' outputs, which must agree between calls, and the model's output."""
    sizes = {}

    def note(name):
        def hook(module, args, output):
            assert sizes.setdefault(name, tuple(output.shape[2:])) == tuple(output.shape[2:])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with torch.no_grad():
        output = zoo.tensor_of(zoo.bare_call(model.eval(), inputs))
    for handle in handles:
        handle.remove()
    return sizes, output


def random_strides(model, spread=0.4):
    """Set strides between 1 and 1.4 times the initial ones, with which no map becomes too small."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LearnableStrides):
                top = torch.tensor(module.initial_strides)[: len(module.stride)] * (1 + spread)
                module.stride.copy_(1 + (top - 1) * torch.rand(len(top)))


@ALL
def test_sites_and_groups_are_those_of_the_model(name):
    _, model, plan = zoo.converted(name)
    assert plan.groups == GROUPS[name]
    layers = by_site(model, plan)
    kept = KEPT.get(name, [])
    for site in plan.sites:
        layer, module = layers[site.name], model.get_submodule(site.name)
        assert site.stride == layer.initial_strides == given(STRIDES, name, site.name, (2,) * layer.ndim)
        assert site.size_offset == layer.size_offset == given(EXCESS, name, site.name, (0,) * layer.ndim)
        assert (kept == "all" or site.name in kept) == (module is not layer) == (not site.fused)
        first = (
            name in zoo.BEFORE and isinstance(module, nn.Conv2d | nn.Conv3d) and site.name not in AFTER.get(name, [])
        )
        assert site.placement == ("before" if first else "after")
        assert layer.window == "inner"
        assert tuple(getattr(module, "stride", ())) == (1,) * layer.ndim or module is layer
    strides = {id(layer.stride) for layer in layers.values()}
    for group in GROUPS[name]:
        assert len({id(layers[member].stride) for member in group}) == 1
    assert len(strides) == len(GROUPS[name]) == len(ds.strides(model))
    assert [(r.name, r.source) for r in plan.resizes] == RESIZES.get(name, [])
    assert plan.global_poolings == (("efficientnet.pooler",) if name == "efficientnet" else ())
    assert list(plan.left_alone) == LEFT.get(name, [])


@ALL
@pytest.mark.parametrize("scale", SCALES)
def test_maps_start_with_the_sizes_that_they_had(name, scale):
    original, model, plan = zoo.converted(name)
    names = [site.name for site in plan.sites]
    before, expected = output_sizes(original, names, zoo.CASES[name].inputs(scale))
    after, output = output_sizes(model, names, zoo.CASES[name].inputs(scale))
    assert after == before
    assert output.shape == expected.shape
    assert output.isfinite().all()
    if scale == 0:
        assert {site.name: site.size_after for site in plan.sites} == before
        assert {site.name: site.size_before for site in plan.sites} == before


@ALL
def test_groups_stay_together_at_other_strides(name):
    _, model, plan = zoo.converted(name)
    names, seen = [site.name for site in plan.sites], set()
    for i in range(4):
        random_strides(model)
        sizes, output = output_sizes(model, names, zoo.CASES[name].inputs(i % 2))
        assert output.isfinite().all()
        for group in GROUPS[name]:
            assert len({sizes[member] for member in group}) == 1
        seen.add(tuple(sizes.values()))
    assert len(seen) > 1  # strides did change sizes


@ALL
def test_ten_steps_move_every_stride(name):
    _, model, plan = zoo.converted(name)
    case, model = zoo.CASES[name], model.train()
    strides = [layer.stride for layer in by_site(model, plan).values()]
    before = [s.detach().clone() for s in strides]

    def loss(scale):
        output = zoo.tensor_of(zoo.bare_call(model, case.inputs(scale)))
        if name.startswith("unet"):
            assert output.shape[2:] == case.inputs(scale).shape[2:]
        torch.manual_seed(2)
        return (output - torch.randn(output.shape)).square().mean()

    alive, moved = [False] * len(strides), [False] * len(strides)
    optimizer = torch.optim.SGD(ds.param_groups(model, 1e-4, stride_lr=0.02))
    for step in range(10):
        optimizer.zero_grad()
        loss(step % 2).backward()
        for i, stride in enumerate(strides):
            assert stride.grad is not None
            assert stride.grad.isfinite().all()
            alive[i] |= bool(stride.grad.any())
        with torch.no_grad():
            for stride in {id(s): s for s in strides}.values():
                stride.grad /= stride.grad.abs().max().clamp(min=1e-20)  # which differ by orders of magnitude
        optimizer.step()
        ds.clamp_strides_(model)
        for i, (stride, start) in enumerate(zip(strides, before, strict=True)):
            assert stride.isfinite().all()
            moved[i] |= not torch.equal(stride, start)
    assert all(alive)
    assert all(moved)


@ALL
def test_weights_are_the_same_tensors(name, tmp_path):
    *_, plan = zoo.converted(name)
    model = zoo.CASES[name].build()
    parameters, state = dict(model.named_parameters()), model.state_dict()
    modes = {n: m.training for n, m in model.named_modules()}
    plan.apply(model)
    now = dict(model.named_parameters())
    names = {f"{layer_name(site)}.stride" for site in plan.sites}
    assert now.keys() - parameters.keys() <= names
    assert parameters.keys() <= now.keys()
    assert all(now[n] is p for n, p in parameters.items())
    after = model.state_dict()
    assert after.keys() - state.keys() == names
    assert state.keys() <= after.keys()
    assert all(after[n].data_ptr() == t.data_ptr() and torch.equal(after[n], t) for n, t in state.items())
    assert all(model.get_submodule(n).training == mode for n, mode in modes.items())
    torch.manual_seed(5)
    old = zoo.CASES[name].build().state_dict()
    missing, unexpected = model.load_state_dict(old, strict=False)
    assert (set(missing), unexpected) == (names, [])
    assert all(torch.equal(model.state_dict()[n], t) for n, t in old.items())


@ALL
def test_a_saved_plan_and_checkpoint_give_the_same_model(name, tmp_path):
    _, model, plan = zoo.converted(name)
    random_strides(model)
    plan.save(tmp_path / "plan.json")
    loaded = ds.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert str(loaded) == str(plan)
    torch.manual_seed(7)
    fresh = zoo.CASES[name].build()
    loaded.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    for scale in SCALES:
        inputs = zoo.CASES[name].inputs(scale)
        with torch.no_grad():
            expected = zoo.tensor_of(zoo.bare_call(model.eval(), inputs))
            assert torch.equal(zoo.tensor_of(zoo.bare_call(fresh.eval(), inputs)), expected)


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@ALL
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file], ids=["deepcopy", "torch.save"])
def test_copies_stay_linked_in_themselves(name, duplicate):
    if name == "wav2vec2" and duplicate is through_a_file:
        pytest.skip("torch does not pickle its weight norm")
    _, model, plan = zoo.converted(name)
    random_strides(model)
    twin = duplicate(model)
    inputs = zoo.CASES[name].inputs(0)
    with torch.no_grad():
        expected = zoo.tensor_of(zoo.bare_call(model.eval(), inputs))
        assert torch.equal(zoo.tensor_of(zoo.bare_call(twin.eval(), inputs)), expected)
    ours, theirs = by_site(model, plan), by_site(twin, plan)
    assert not {id(x.stride) for x in ours.values()} & {id(x.stride) for x in theirs.values()}
    for group in GROUPS[name]:
        assert len({id(theirs[member].stride) for member in group}) == 1
    names = [site.name for site in plan.sites]
    sizes, _ = output_sizes(model, names, inputs)
    with torch.no_grad():
        for layer in theirs.values():
            layer.stride.fill_(1.0)  # of the copy alone; its resizings must follow its own maps
    twins, output = output_sizes(twin, names, zoo.CASES[name].inputs(1))
    assert output.isfinite().all()
    assert all(twins[n] != size for n, size in sizes.items())
    assert output_sizes(model, names, inputs)[0] == sizes


@ALL
def test_the_costs_of_the_plan_are_those_of_the_real_models(name):
    original, model, plan = zoo.converted(name)
    inputs = zoo.CASES[name].inputs(0)
    before, _ = zoo.products(original, inputs)
    after, resampling = zoo.products(model, inputs)
    assert plan.macs_before == before[""]
    assert plan.macs_after == after[""]
    assert plan.resampling_macs == sum(resampling.values())
    for site in plan.sites:
        assert site.macs_before == before[site.name]
        # Torch counts a layer behind a module apart, unless both are one.
        behind = 0 if site.fused or site.placement == "before" else resampling.get(layer_name(site), 0)
        assert site.macs_after == after[site.name] + behind
