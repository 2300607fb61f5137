"""Plans: patterns, options, reasons to leave modules alone, files, and single modules of every kind."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffstride as ds
from diffstride.convert.apply import layer_of
from diffstride.errors import UsageError
from diffstride.nn.attach import attached
from tests.helpers import reference, zoo
from tests.helpers.zoo import block, head

IMAGE = (2, 3, 32, 32)


def sizes_of(model, name, x):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.shape[2:]))
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    (size,) = set(map(tuple, seen))
    return size


def test_patterns_choose_sites():
    x = torch.randn(IMAGE)
    plan = lambda **options: [site.name for site in ds.plan(zoo.vgg(), x, **options).sites]
    assert plan() == ["2", "5", "8"]
    assert plan(include="5") == ["5"]
    assert plan(include=["2", "8"]) == ["2", "8"]
    assert plan(exclude="[58]") == ["2"]
    assert plan(include=["2", "5"], exclude=("5",)) == ["2"]
    left = ds.plan(zoo.vgg(), x, include="[25]", exclude="5").left_alone
    assert left == {"8": "not among those to include", "5": "excluded"}


@pytest.mark.parametrize("what", ["include", "exclude"])
def test_patterns_that_match_nothing_name_what_there_is(what):
    with pytest.raises(UsageError, match=rf"{what} must match a downsampling \(there are: 2, 5, 8\), got 'stem\*'"):
        ds.plan(zoo.vgg(), torch.randn(IMAGE), **{what: ["2", "stem*"]})


def test_one_branch_alone_keeps_its_size_for_the_other():
    with pytest.raises(UsageError, match=r"1\.main\.0\.0: its map .* 1 \(Residual\), at add"):
        ds.plan(zoo.resnet_d(), torch.randn(IMAGE), include="1.main*")
    plan = ds.plan(zoo.resnet_d(), torch.randn(IMAGE), exclude="1.main*")
    assert plan.groups == [["0.0"], ["3.main.0.0", "3.shortcut.0"]]
    assert [site.size_multiple for site in plan.sites] == [2, 1, 1]  # the two fixed branches agree on even maps alone
    assert plan.left_alone.keys() == {"1.main.0.0", "1.shortcut.0"}
    assert "1 (Residual), at add" in plan.left_alone["1.shortcut.0"]


class Unequal(nn.Module):
    """A shortcut of stride 4 beside two layers of stride 2."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.short = block(3, 8, 3, 2), block(8, 8, 3, 2), nn.Conv2d(3, 8, 1, 4)
        self.last, self.head = block(8, 8, 3, 2), nn.Sequential(*head(8))

    def forward(self, x):
        return self.head(self.last(self.two(self.one(x)) + self.short(x)))


def test_unequal_strides_that_meet_are_left_alone():
    plan = ds.plan(Unequal(), torch.randn(IMAGE))
    assert plan.groups == [["last.0"]]
    for name in ("two.0", "short"):
        assert plan.left_alone[name] == "outputs of different strides meet: two.0 (2, 2), short (4, 4)"
    assert "the model itself (Unequal), at add" in plan.left_alone["one.0"]
    assert "left alone: two.0, short: outputs of different strides meet" in str(plan)


class Selective(nn.Module):
    """Branches with kernels of two sizes, stacked and weighed, as in a selective kernel network."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 5, 2, 2)
        self.weigh = nn.Conv2d(8, 16, 1)

    def forward(self, x):
        both = torch.stack([self.small(x), self.large(x)], 1)
        weights = self.weigh(both.sum(1).mean((-2, -1), keepdim=True)).unflatten(1, (2, 8)).softmax(1)
        return (both * weights).sum(1).mean((-2, -1))


def test_branches_that_are_stacked_share_a_stride():
    """`stack` asks for all sizes at once."""
    model, x = Selective(), torch.randn(2, 3, 32, 24)
    plan = ds.convert(model, x)
    assert plan.groups == [["small", "large"]]
    for stride in (1.3, 2.6):
        with torch.no_grad():
            model.small.stride.copy_(torch.tensor([stride, 2.0]))
        assert model(x).shape == (2, 8)


class Shortcut(nn.Module):
    """A block whose shortcut downsamples in the code of its forward."""

    def __init__(self, inputs, outputs, downsample):
        super().__init__()
        self.conv, self.project = nn.Conv2d(inputs, outputs, 3, 2, 1), nn.Conv2d(inputs, outputs, 1)
        self.downsample = downsample

    def forward(self, x):
        return F.relu(self.conv(x) + self.project(self.downsample(x)))


SHORTCUTS = {
    "average": (lambda x: F.avg_pool2d(x, 2), 4),
    "maximum": (lambda x: F.max_pool2d(x, 3, 2, 1), 1),
    "slice": (lambda x: x[..., ::2, ::2], 1),
    "interpolation": (lambda x: F.interpolate(x, scale_factor=0.5), 4),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_downsampling_in_code_keeps_only_the_convolution_that_meets_it(name):
    """Two blocks halve the map of the stem: where a half is rounded down, that map must be a multiple of 4."""
    downsample, multiple = SHORTCUTS[name]
    stem = nn.Conv2d(3, 8, 3, 2, 1)
    model = nn.Sequential(stem, Shortcut(8, 12, downsample), Shortcut(12, 16, downsample), *head(16))
    x = torch.randn(2, 3, 64, 64)
    inserted = ds.insert(copy.deepcopy(model), x)
    assert inserted.groups == [["(input)"], ["0"]]
    plan = ds.convert(model, x)
    assert [(site.name, site.size_multiple) for site in plan.sites] == [("0", multiple)]
    assert set(plan.left_alone) >= {"1.conv", "2.conv"}
    for stride in (1.2, 2.3, 3.1):
        with torch.no_grad():
            model[0].stride.fill_(stride)
        assert model(x).shape == (2, 10)


class Causal(nn.Module):
    """A convolution that reads its padding from a buffer of integers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 8, 4)
        self.register_buffer("padding", torch.tensor(4), persistent=False)

    def forward(self, x):
        return self.conv(nn.functional.pad(x, (self.padding, 0)))


def test_integers_in_buffers_are_constants_of_the_model():
    model, x = nn.Sequential(Causal(), nn.BatchNorm1d(8)), torch.randn(2, 1, 400)
    size = model(x).shape
    plan = ds.convert(model, x)
    assert plan.groups == [["0.conv"]]
    assert model(x).shape == size
    assert model[0].padding == 4


class Rows(nn.Module):
    """A head on rows of 64 samples. A larger map gives more rows and no error."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 4, 8, 4, 2), nn.Linear(4 * 64, 10)

    def forward(self, x):
        return self.head(self.conv(x).reshape(-1, 4 * 64))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_site_on_which_the_batch_of_the_output_depends_is_left_alone(batch):
    with pytest.raises(UsageError, match="conv: the batch of the model's output depends on the size of its map"):
        ds.plan(Rows(), torch.randn(batch, 1, 256))
    assert ds.plan(Rows(), torch.randn(batch, 1, 1024)).groups == [["conv"]]  # rows are no batch there


class PaddedToItsStride(nn.Module):
    """TensorFlow's padding by a module that knows the stride: a map of an odd size gets a sample more."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.short = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2), nn.Conv2d(4, 4, 1, 2)

    def forward(self, x):
        x = self.stem(x)
        missing = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:]]
        sides = [missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2]
        return self.conv(nn.functional.pad(x, sides)) + self.short(x)


def test_maps_whose_difference_varies_are_left_alone():
    """The search for such a number once never ended."""
    model = PaddedToItsStride()
    plan = ds.convert(model, torch.randn(1, 3, 31, 37))
    assert plan.groups == [["stem"]]
    reason = "maps that meet differ by a varying number of samples: conv, short"
    assert plan.left_alone == {"conv": reason, "short": reason}
    for stride in (1.3, 2.0, 2.4, 3.1):
        with torch.no_grad():
            model.stem.stride.fill_(stride)
        model(torch.randn(1, 3, 45, 64))


@pytest.mark.parametrize("build", [zoo.UNet, zoo.TransposedUNet])
def test_a_unet_needs_upsample(build):
    x = torch.randn(IMAGE)
    with pytest.raises(UsageError, match=r"upsample=True lets the upsampling follow"):
        ds.plan(build(), x)


@pytest.mark.parametrize("window", ["inner", "outer"])
@pytest.mark.parametrize("name", ["resnet-d", "inception"])
def test_options_reach_the_layers_and_groups_agree_under_any(name, window):
    model, x = zoo.CASES[name].build(), zoo.CASES[name].inputs(0)
    options = {"smoothness": 2.0, "window": window, "basis": "dct", "norm": "ortho", "shared": True,
               "bounds": (1.0, 8.0), "size_multiple": 2, "backend": "matmul"}  # fmt: skip
    plan = ds.convert(model, x, **options)
    assert plan.options == options
    for site in plan.sites:
        layer = layer_of(model, site)
        assert {key: getattr(layer, key) for key in options} == options
        assert layer.stride.shape == (1,)
    for stride in (2.0, 1.3, 2.6):
        with torch.no_grad():
            for site in plan.sites:
                layer_of(model, site).stride.fill_(stride)
        for scale in (0, 1):
            for group in plan.groups:
                (size,) = {sizes_of(model, name, zoo.CASES["inception"].inputs(scale)) for name in group}
                assert all(n % 2 == 0 for n in size) or window == "outer" or min(size) <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "round"}, "window must be one of 'outer', 'inner', 'hard', got 'round'"),
        ({"bounds": (1.0, 1.5)}, r"stride must lie within bounds \(1.0, 1.5\), got \(2.0, 2.0\)"),
    ],
)
def test_options_that_no_layer_takes(options, message):
    model = zoo.vgg()
    before = dict(model.named_modules())
    for call in (ds.plan, ds.convert):
        with pytest.raises(ValueError, match=message) as caught:
            call(model, torch.randn(IMAGE), **options)
        assert "\n" not in str(caught.value)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    "module", [nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2), nn.AvgPool2d(3, (2, 3), 1)], ids=lambda m: type(m).__name__
)
def test_a_model_that_is_one_layer(module):
    x = torch.randn(1, 3, 30, 20)
    expected = module(x).shape
    report = ds.convert(module, x)
    assert report.groups == [[""]]
    assert "(the model)" in str(report)
    assert module(x).shape == expected
    assert list(ds.strides(module)) == ["diffstride"]
    with torch.no_grad():
        attached(module).stride.fill_(3.0)
    assert module(x).shape[2:] == attached(module).output_size(attached_input(module, x))


def attached_input(module, x):
    kernel, padding = (v if isinstance(v, tuple) else (v, v) for v in (module.kernel_size, module.padding))
    return tuple(n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], padding, kernel, strict=True))


@pytest.mark.parametrize("size", [30, 31, 32, 33, 34, 35])
@pytest.mark.parametrize(
    "pool",
    [
        lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        lambda: nn.MaxPool2d(2, ceil_mode=True),
        lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
        lambda: nn.MaxPool2d(3, 3, ceil_mode=True),
        lambda: nn.MaxPool2d(3, 2, 1),
        lambda: nn.MaxPool2d(3, 2, dilation=2),
        lambda: nn.AvgPool2d(2, 3),
        lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    ],
)
def test_poolings_start_with_the_sizes_that_they_had(pool, size):
    """The sizes have every remainder. Torch makes one exception: a last window that lies in the padding alone."""
    model, x = nn.Sequential(pool()), torch.randn(1, 1, size, size)
    expected = model(x).shape
    ds.convert(model, torch.randn(1, 1, 32, 32))
    assert model(x).shape == expected


def test_poolings_that_return_indices_and_adaptive_ones_are_left_alone():
    model = nn.Sequential(block(3, 8, 3, 2), nn.MaxPool2d(2, return_indices=True))
    assert ds.plan(model, torch.randn(IMAGE)).left_alone == {"1": "it returns indices, which belong to its own grid"}
    model = nn.Sequential(block(3, 8, 3, 2), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(48, 5))
    plan = ds.convert(model, torch.randn(IMAGE))
    assert plan.left_alone == {"1": "its output has the fixed size (2, 3)"}
    assert plan.groups == [["0.0"]]
    assert model(torch.randn(2, 3, 45, 37)).shape == (2, 5)


def test_poolings_of_whole_maps_by_a_fixed_kernel_follow_the_map():
    model = nn.Sequential(block(3, 8, 3, 2), block(8, 8, 3, 2), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8, 10)).eval()
    x = torch.randn(IMAGE)
    with torch.no_grad():
        features = model[1](model[0](x))
        expected = features.mean((2, 3))
        assert torch.allclose(model[2](features).flatten(1), expected)
    plan = ds.convert(model, x)
    assert plan.global_poolings == ("2",)
    assert plan.groups == [["0.0"], ["1.0"]]
    assert "2: global, no stride" in str(plan)
    assert torch.allclose(model[2](features).flatten(1), expected)
    with torch.no_grad():
        model[0][0].stride.fill_(3.1)
        features = model[1](model[0](x))
        assert features.shape[2:] == (6, 6)
        torch.testing.assert_close(model(x), model[4](features.mean((2, 3))))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.down, self.head = block(3, 8, 3, 2), block(8, 8, 3, 2), nn.Sequential(*head(8))

    def forward(self, x):
        x = self.first(x)
        self.sizes = [tuple(x.shape[2:])]
        for _ in range(2):
            x = self.down(x)
            self.sizes.append(tuple(x.shape[2:]))
        return self.head(x)


def test_a_layer_that_is_called_at_two_sizes_has_one_stride():
    model, x = Twice(), torch.randn(IMAGE)
    model(x)
    before = model.sizes
    plan = ds.convert(model, x)
    assert plan.groups == [["first.0"], ["down.0"]]
    model(x)
    assert model.sizes == before == [(16, 16), (8, 8), (4, 4)]
    with torch.no_grad():
        model.down[0].stride.fill_(1.6)
    model(x)
    assert model.sizes == [(16, 16), (10, 10), (7, 7)]
    cost = ds.CostModel(model, x)
    assert cost.exact() == zoo.products(model, x)[0][""]


class Aliased(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(*head(8))
        self.again = self.conv

    def forward(self, x):
        return self.head(self.again(x))


def test_a_module_under_two_names_stays_one():
    model = Aliased()
    weight = model.conv.weight
    plan = ds.convert(model, torch.randn(IMAGE))
    assert plan.groups == [["conv"]]
    assert model.conv is model.again
    assert isinstance(model.conv, ds.DiffStrideConv2d)
    assert model.conv.weight is weight
    model(torch.randn(IMAGE)).sum().backward()
    assert model.conv.stride.grad.any()


NORMS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", NORMS)
def test_normed_weights_stay_so(name):
    conv = NORMS[name](nn.Conv2d(3, 8, 3, 2, 1))
    model = nn.Sequential(conv, *head(8))
    keys, x = set(model.state_dict()), torch.randn(IMAGE)
    with torch.no_grad():
        plain = F.conv2d(x, model.eval()[0].weight, conv.bias, padding=1)
    plan = ds.convert(model, x)
    assert not plan.sites[0].fused
    assert model[0] is conv
    assert set(model.state_dict()) - keys == {"0.diffstride.stride"}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()[0](x), attached(conv)(plain))
    model.train()(x).square().sum().backward()
    assert attached(conv).stride.grad.any()
    assert all(p.grad is not None for p in model.parameters())


def test_hooks_see_the_downsampled_output():
    model, x, seen = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *head(8)), torch.randn(IMAGE), []
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    plan = ds.convert(model, x)
    assert not plan.sites[0].fused
    seen.clear()  # it ran with symbols for sizes, too
    model(x)
    assert seen == [(2, 8, 16, 16)]
    with torch.no_grad():
        attached(model[0]).stride.fill_(4.0)
    model(x)
    assert seen[1:] == [(2, 8, 8, 8)]
    handle.remove()
    model(x)
    assert len(seen) == 2


def test_memory_formats_dtypes_and_frozen_weights_stay():
    model = zoo.densenet().to(memory_format=torch.channels_last).double().requires_grad_(False)
    x = torch.randn(IMAGE, dtype=torch.float64).to(memory_format=torch.channels_last)
    plan = ds.convert(model, x)
    weight = model[0][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.dtype == torch.float64
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "0.0.stride", "2.1.diffstride.stride", "4.1.diffstride.stride",
    ]  # fmt: skip
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(x).sum().backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[0].dtype == torch.float64
    assert all(layer_of(model, site).stride.grad.any() for site in plan.sites)
    groups = ds.param_groups(model, 0.1, stride_lr=0.2)
    assert [group["name"] for group in groups] == ["strides"]


class Deep(nn.Module):
    """An encoder and a decoder: the upsampled map meets nothing."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.last = block(3, 8, 3, 2), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        return self.last(self.up(self.down(x)))


@pytest.mark.parametrize("upsample", [False, True])
def test_an_upsampling_that_meets_nothing_stays(upsample):
    model, x = Deep(), torch.randn(IMAGE)
    plan = ds.convert(model, x, upsample=upsample)
    assert plan.resizes == ()
    assert isinstance(model.up, nn.Upsample)
    with torch.no_grad():
        model.down[0].stride.fill_(3.0)
    assert model(x).shape[2:] == (22, 22)


@torch.no_grad()
def test_a_layer_before_a_convolution_resamples_its_input():
    """The model starts with the sizes and the multiply-accumulates of the strided one."""
    torch.manual_seed(0)
    model, x = zoo.resnet_d().double().eval(), torch.randn(2, 3, 32, 40, dtype=torch.float64)
    conv, sizes = model[1].main[0][0], sizes_of(model, "1.main.0.0", x)
    plan = ds.convert(model, x, placement="before", smoothness=2.0)
    assert plan.macs_after - plan.resampling_macs == plan.macs_before == ds.CostModel(model, x).baseline()
    assert ds.plan(zoo.resnet_d().double(), x, smoothness=2.0).macs_after > 1.3 * plan.macs_before
    assert sizes_of(model, "1.main.0.0", x) == sizes
    assert model[1].main[0][0] is conv
    conv.diffstride_before.stride.copy_(torch.tensor([2.3, 1.6]))
    y = torch.randn(2, 8, 17, 20, dtype=torch.float64)
    coarse = reference.diffstride(y.numpy(), (2.3, 1.6), 2.0, window="inner")
    expected = reference.convolve(coarse, conv.weight.numpy(), padding=1)
    torch.testing.assert_close(conv(y), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)  # the stride is float32
    frozen = ds.freeze(model, x)
    torch.testing.assert_close(frozen(x), model(x))
    with pytest.raises(ValueError, match="placement must be one of 'after', 'before', got 'behind'"):
        ds.plan(zoo.resnet_d(), x, placement="behind")


def test_a_plan_shows_and_keeps_the_placement(tmp_path):
    plan = ds.plan(zoo.Mixed(), zoo.CASES["mixed"].inputs(0), placement="before")
    lines = {line.split()[0]: line for line in str(plan).splitlines()}
    assert "DiffStride2d, stride 1" in lines["grouped.0"]
    assert "stride 1, DiffStride2d" in lines["stem.0"]  # it pads by a forward of its own
    plan.save(path := tmp_path / "plan.json")
    assert ds.Plan.load(path) == plan
    values = json.loads(path.read_text())
    for site in values["sites"]:
        del site["placement"]  # as files of version 1 have it
    path.write_text(json.dumps(values))
    assert {site.placement for site in ds.Plan.load(path).sites} == {"after"}
    for name, placement in ("stem.0", "before"), ("grouped.0", "behind"):
        wrong = {site["name"]: site for site in values["sites"]}[name]
        wrong["placement"] = placement
        path.write_text(json.dumps(values))
        with pytest.raises(UsageError, match=f"placement of {name} must be .*, got '{placement}'"):
            ds.Plan.load(path).apply(zoo.Mixed())
        del wrong["placement"]


def test_a_plan_prints_a_table():
    plan = ds.plan(zoo.resnet_d(), torch.randn(IMAGE))
    head, *sites, total, least, note = (" ".join(line.split()) for line in str(plan).splitlines())
    assert head == "site was becomes stride group input before after MACs before after"
    assert "1.shortcut.0 AvgPool2d stride 1, DiffStride2d 2x2 1 16x16 8x8 8x8 0.00 M 0.02 M" in sites
    assert "3.main.0.0 Conv2d DiffStrideConv 2x2 2 8x8 4x4 4x4 0.06 M 0.23 M" in sites
    assert plan.examples == IMAGE[0] == 2
    assert f"{plan.macs_before / 2e6:.2f} M MACs per example before, {plan.macs_after / 2e6:.2f} M after" in total
    assert plan.macs_before == 2 * ds.plan(zoo.resnet_d(), torch.randn(1, *IMAGE[1:])).macs_before
    assert repr(plan) == str(plan)  # which notebooks show
    unbatched = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1))
    assert ds.plan(unbatched, torch.randn(3, 16, 16)).examples == 1
    assert f"{plan.macs_after / plan.macs_before:.3f} of the original" in total
    assert least == f"the largest strides leave {plan.macs_least / plan.macs_before:.3f} of the original MACs"
    assert note == "a trained model does not keep its function: ds.insert keeps it"
    assert note not in str(ds.insert(zoo.resnet_d(), torch.randn(IMAGE)))


@pytest.mark.parametrize("name", ["resnet-d", "resnet-3d"])
def test_the_least_cost_of_a_plan_is_that_of_the_largest_strides(name):
    _, model, plan = zoo.converted(name)
    with torch.no_grad():
        for _, stride in model.named_parameters():
            if type(stride) is not nn.Parameter:
                stride.fill_(1e6)
    assert plan.macs_least == zoo.products(model, zoo.CASES[name].inputs(0))[0][""]


def test_a_plan_for_another_model_is_refused_and_changes_nothing(tmp_path):
    plan = ds.plan(zoo.resnet_d(), torch.randn(IMAGE))
    for other, message in [
        (zoo.vgg(), r"model must have the modules of the plan: .* must be a Conv2d, got none"),
        (zoo.densenet(), r"model must have the modules of the plan: 1\.main\.0\.0 must be a Conv2d, got none"),
    ]:
        modules = dict(other.named_modules())
        with pytest.raises(UsageError, match=message):
            plan.apply(other)
        assert dict(other.named_modules()) == modules
    other = zoo.resnet_d()
    other[0][0].stride = (3, 3)
    with pytest.raises(UsageError, match=r"0\.0 must have stride \(2, 2\), got \(3, 3\)"):
        plan.apply(other)
    converted = zoo.resnet_d()
    plan.apply(converted)
    with pytest.raises(UsageError, match="model must"):
        plan.apply(converted)


def test_a_plan_through_a_file_keeps_everything(tmp_path):
    plan = ds.plan(zoo.UNet(), torch.randn(IMAGE), upsample=True, bounds=(1.0, None), exclude="pool.1")
    plan.save(str(tmp_path / "plan.json"))
    assert ds.Plan.load(str(tmp_path / "plan.json")) == plan
    assert plan.left_alone["pool.1"] == "excluded"
