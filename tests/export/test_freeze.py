"""Frozen models: equal to the eager one, plain torch throughout, and traced by every compiler of PyTorch."""

import copy
import io
import pickletools
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import diffstride as ds
from diffstride import geometry
from diffstride.errors import UsageError
from diffstride.experiments.models import ResNet
from diffstride.export import freeze
from diffstride.integrations.input_sizes import InputSizes
from diffstride.nn.attach import attach
from diffstride.nn.resize import ResizeTo
from tests.helpers.exported import image_model, relative

PRODUCTS = {"matmul.default", "conv1d.default", "conv2d.default", "conv3d.default", "clone.default", "pad.default",
            "flatten.using_ints", "unflatten.int", "conv2d.padding"}  # fmt: skip


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv1d(2, 2, 3), nn.Upsample(scale_factor=2)
        self.down = ds.DiffStride1d(2.0, 1)
        resize = ResizeTo(1)
        resize.follow(self.conv)
        attach(self.up, resize)

    def forward(self, x):
        y = self.conv(x)
        return y + self.up(self.down(y))


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.extra = ds.DiffStride1d(2.0, 1), ds.DiffStrideConv1d(1, 1, 3)

    def forward(self, x):
        return (self.main(x), self.extra(x)) if self.training else self.main(x)


# The numbers are those of the eager layer


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("norm", ["forward", "ortho"])
@pytest.mark.parametrize("window", ["outer", "inner", "hard"])
@pytest.mark.parametrize("basis", ["dft", "dct"])
@pytest.mark.parametrize("size", [(17,), (12, 15), (6, 9, 10)])
def test_a_layer(size, window, basis, norm, batched):
    make = [ds.DiffStride1d, ds.DiffStride2d, ds.DiffStride3d][len(size) - 1]
    layer = make([1.7, 1.0, 2.5][: len(size)], 1.5, window=window, basis=basis, norm=norm)
    x = torch.randn(*([3] if batched else []), 2, *size)
    frozen = freeze(layer, x)
    assert relative(frozen(x), layer(x)) < 2e-6
    names = enumerate(geometry.AXIS_NAMES[len(size)])
    identity = None if window == "outer" else 1  # the axis of stride 1
    assert set(dict(frozen.named_buffers())) == {name for i, name in names if i != identity}
    if batched:
        other = torch.randn(5, 2, *size)
        assert relative(frozen(other), layer(other)) < 2e-6


CONVOLUTIONS = {
    "resample first": {"kernel_size": 3, "stride": 3.2, "padding": 1},
    "convolve first": {"kernel_size": 5, "stride": 1.1, "padding": 2},
    "first axis": {"kernel_size": 3, "stride": (4.0, 1.05, 1.0), "padding": 1},
    "groups, dilation": {"kernel_size": 3, "stride": 2.4, "padding": 2, "dilation": 2, "groups": 2},
    "no bias, valid": {"kernel_size": 2, "stride": 2.0, "padding": "valid", "bias": False},
    "same, even kernel": {"kernel_size": 4, "stride": 1.05, "padding": "same"},
    "same, one axis before": {"kernel_size": 4, "stride": (6.0, 1.02, 1.02), "padding": "same"},
    "reflect": {"kernel_size": 3, "stride": 2.0, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "stride": 2.0, "padding": 1, "padding_mode": "circular"},
    "ortho": {"kernel_size": 3, "stride": 3.0, "padding": 1, "norm": "ortho", "shared": True},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("size", [(41,), (20, 23), (9, 10, 11)])
def test_a_convolution(size, options):
    ndim = len(size)
    make = [ds.DiffStrideConv1d, ds.DiffStrideConv2d, ds.DiffStrideConv3d][ndim - 1]
    stride = options["stride"]
    layer = make(16, 64, **options | {"stride": stride[:ndim] if isinstance(stride, tuple) else stride}, smoothness=1)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(2, 16, *size)
    frozen = freeze(layer, x)
    assert relative(frozen(x), layer(x)) < 3e-6
    assert relative(frozen(x[0]), layer(x[0])) < 3e-6
    for name in ("kernel_size", "padding", "dilation", "groups", "in_channels", "out_channels", "padding_mode"):
        assert getattr(frozen, name) == getattr(layer, name)
    assert frozen.stride == (1,) * ndim
    assert torch.equal(frozen.weight, layer.weight)
    assert (frozen.bias is None) == (layer.bias is None)
    again = copy.deepcopy(frozen).double()
    assert again.weight is again.convolution.weight
    assert again.weight.dtype == torch.float64


def test_the_order_of_a_convolution_is_that_of_the_layer():
    x = torch.randn(2, 16, 20, 20)
    shapes = {}
    for stride in (3.2, (4.0, 1.02), 1.02):
        layer = ds.DiffStrideConv2d(16, 64, 3, stride, padding=1, smoothness=1)
        fused_axes = layer.schedule((20, 20), layer.output_size((20, 20))).fused_axes
        shapes[fused_axes] = {name: tuple(b.shape) for name, b in freeze(layer, x).named_buffers()}
    assert shapes == {
        2: {"before.height": (3 * 8, 20), "before.width": (20, 3 * 8)},
        1: {"before.height": (3 * 7, 20), "after.width": (20, 20)},
        0: {"after.height": (20, 20), "after.width": (20, 20)},
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_dtypes(dtype, tolerance):
    model = nn.Sequential(ds.DiffStrideConv2d(3, 8, 3, 2.2, padding=1), ds.DiffStride2d(1.5, 2)).to(dtype)
    x = torch.randn(2, 3, 24, 24, dtype=dtype)
    frozen = freeze(model, x)
    assert {t.dtype for t in frozen.state_dict().values()} == {dtype}
    assert frozen(x).dtype == dtype
    assert relative(frozen(x), model(x)) < tolerance


def test_under_autocast():
    model = nn.Sequential(ds.DiffStrideConv2d(3, 8, 3, 2.2, padding=1), ds.DiffStride2d(1.5, 2))
    x = torch.randn(2, 3, 24, 24)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        frozen = freeze(model, x)
        assert frozen(x).dtype == model(x).dtype == torch.bfloat16
        assert relative(frozen(x), model(x)) < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model, x = image_model().double().cuda(), torch.randn(2, 3, 32, 30, dtype=torch.float64, device="cuda")
    random = torch.cuda.get_rng_state()
    frozen = freeze(model, x)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert relative(frozen(x), model(x)) < 1e-12


def test_identities_are_left_out_and_what_follows_may_work_in_place():
    pool = ds.SpectralPool2d((1, 2))
    assert set(dict(freeze(pool, torch.randn(1, 2, 2000, 8)).named_buffers())) == {"width"}
    short = ds.DiffStride2d((1.0, 2.0))
    assert set(dict(freeze(short, torch.randn(1, 2, 1, 16)).named_buffers())) == {"width"}

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = ds.SpectralPool1d(1)

        def forward(self, x):
            return x + self.pool(x).relu_()

    x = torch.randn(2, 3, 8)
    frozen = freeze(Residual(), x)
    assert not frozen.state_dict()
    assert torch.equal(frozen(x), x + x.relu())


def test_a_whole_model_and_one_of_every_kind():
    model, x = image_model(), torch.randn(3, 3, 32, 30)
    frozen = freeze(model, x)
    assert relative(frozen(x), model(x)) < 1e-5
    assert [type(m) for m in frozen if not isinstance(m, torch.fx.GraphModule)] == [
        nn.Sequential, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear
    ]  # fmt: skip


def test_learned_strides_are_what_is_frozen():
    layer, x = ds.DiffStride2d(2.0, 2), torch.randn(1, 2, 16, 16)
    with torch.no_grad():
        layer.stride.copy_(torch.tensor([3.3, 0.2]))  # the second is clamped
    frozen = freeze(layer, x)
    assert relative(frozen(x), layer(x)) < 2e-6
    before = frozen(x)
    layer.reset_strides()
    assert torch.equal(frozen(x), before)


def test_positional_and_keyword_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = ds.DiffStride1d(1.5, 1)

        def forward(self, x, scale=1.0, *, shift):
            return {"y": self.down(x) * scale + shift, "n": None}

    model, x, shift = Two(), torch.randn(2, 3, 12), torch.randn(1)
    by_name = freeze(model, {"x": x, "shift": shift})
    assert relative(by_name(x, shift=shift)["y"], model(x, shift=shift)["y"]) < 1e-6
    with pytest.raises(UsageError, match="shift"):
        freeze(model, (x, 2.0))


# Modules that are shared, attached, hooked


def test_a_shared_layer_stays_shared_and_a_shared_weight_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = ds.DiffStride1d(1.5, 1)
            self.b = self.a
            self.first = ds.DiffStrideConv1d(2, 2, 3, 2.0, padding=1, smoothness=1)
            self.second = ds.DiffStrideConv1d(2, 2, 3, 2.0, padding=1, smoothness=1)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.first(self.a(x)) + self.second(self.b(-x))

    model, x = Twice(), torch.randn(2, 2, 20)
    frozen = freeze(model, x)
    assert frozen.a is frozen.b
    assert frozen.first.weight is frozen.second.weight
    assert relative(frozen(x), model(x)) < 1e-5


def test_one_layer_at_several_sizes_is_refused_by_name():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = ds.DiffStride1d(2.0, 1)

        def forward(self, x):
            return self.down(self.down(x))

    with pytest.raises(ValueError, match=r"down must see maps of one size.*\(10,\) of torch.float32 and \(16,\)"):
        freeze(Pyramid(), torch.randn(1, 1, 16))


def test_long_axes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^1's length must have at most 65536 samples to be frozen, got 65537$"):
        freeze(nn.Sequential(nn.ReLU(), ds.DiffStride1d(2.0)), torch.randn(1, 1, 65537))
    with pytest.raises(ValueError, match="DiffStride2d's width must have at most 65536 samples"):
        freeze(ds.DiffStride2d(2.0), torch.randn(1, 1, 4, 70000))


@pytest.mark.parametrize("placement", ["after", "before"])
def test_an_attached_layer_leaves_its_module_what_it_is(placement):
    seen = []
    module = nn.Conv2d(3, 4, 3, padding=1)
    module.register_forward_hook(lambda m, args, y: seen.append(("before", y.shape[-1])))
    module.register_forward_pre_hook(lambda m, args: seen.append(("input", args[0].shape[-1])))
    attach(module, ds.DiffStride2d(2.0, 1), placement)
    module.register_forward_pre_hook(lambda m, args: seen.append(("input", args[0].shape[-1])))
    module.register_forward_hook(lambda m, args, y: seen.append(("after", y.shape[-1])))
    module.register_forward_hook(lambda m, args, y: seen.append(("first of all", y.shape[-1])), prepend=True)
    model, x = nn.Sequential(module, nn.ReLU(inplace=True)), torch.randn(2, 3, 16, 16)
    frozen = freeze(model, x)
    expected, seen[:] = model(x), []
    model(x)
    order, seen[:] = list(seen), []
    assert relative(frozen(x), expected) < 1e-6
    assert seen == order
    assert type(frozen[0]) is nn.Conv2d
    child = {"after": "diffstride", "before": "diffstride_before"}[placement]
    assert set(frozen.state_dict()) == {"0.weight", "0.bias", f"0.{child}.height", f"0.{child}.width"}
    # A hook by number could be overwritten in a process that gives out numbers anew.
    plain = freeze(nn.Sequential(image_model()[4]), torch.randn(1, 8, 16, 16))
    assert not any(isinstance(key, int) for key in plain[0]._forward_hooks)
    assert relative(copy.deepcopy(frozen).double()(x.double()), expected) < 1e-6
    assert relative(freeze(frozen, x)(x), expected) < 1e-6


def test_a_resized_map_and_the_hook_that_measures_the_other():
    model, x = Skip(), torch.randn(2, 2, 21)
    frozen = freeze(model, x)
    assert relative(frozen(x), model(x)) < 1e-6
    assert not frozen.conv._forward_hooks
    assert_plain(frozen)


def test_users_hooks_on_a_replaced_layer_stay_and_notes_of_ours_go():
    model, x = nn.Sequential(ds.DiffStride1d(2.0, 1)), torch.randn(1, 2, 16)
    calls = []
    model[0].register_forward_hook(lambda module, args, kwargs, y: y * 2, with_kwargs=True)
    model[0].register_forward_pre_hook(lambda module, args: calls.append(len(args)))
    notes = InputSizes(model)
    frozen = freeze(model, x)
    assert notes.sizes == {}
    assert len(frozen[0]._forward_hooks) == len(frozen[0]._forward_pre_hooks) == 1
    calls.clear()
    assert relative(frozen(x), model(x)) < 1e-6
    assert relative(copy.deepcopy(frozen)(x), model(x)) < 1e-6
    assert calls == [1, 1, 1, 1]


def test_layers_that_the_examples_do_not_reach_refuse_to_run():
    model, x = Auxiliary(), torch.randn(1, 1, 16)
    frozen = freeze(model, x)
    assert relative(frozen(x), model.eval()(x)) < 1e-6
    with pytest.raises(AssertionError, match="extra was frozen with example inputs that do not reach it"):
        frozen.extra(x)
    assert_plain(frozen)


def test_code_that_asks_for_our_classes_is_found_out():
    class Asks(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.down, self.factor = ds.DiffStride1d(2.0, 1), factor

        def forward(self, x):
            y = self.down(x)
            return y if isinstance(self.down, ds.DiffStride1d) else self.factor(y)

    for factor, message in (
        (lambda y: y * 1.01, r"outputs differ by 1.0e-02, relative, with fixed strides"),
        (lambda y: y[:1], "other shapes"),
        (lambda y: y.reshape(-1, 7), r"cannot run with fixed strides .*RuntimeError"),
    ):
        with pytest.raises(ValueError, match=message):
            freeze(Asks(factor), torch.randn(2, 1, 16))


def test_the_model_is_left_as_it_is_also_where_it_fails():
    model = image_model().train()
    model[5].eval()
    model.register_forward_hook(hook := lambda m, args, y: torch.nn.functional.dropout(y, 0.5, training=True))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    x = torch.randn(2, 3, 32, 30)
    given, random = x.clone(), torch.get_rng_state()
    freeze(model, x)
    model.append(nn.Flatten(0)).append(nn.Unflatten(0, (1, 1, 10))).append(pyramid := ds.DiffStride1d(2.0, 1))
    model.append(pyramid)
    with pytest.raises(ValueError, match="one size"):
        freeze(model, x)
    del model[-4:]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, given)
    assert modes == [m.training for m in model.modules()]
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert list(model._forward_hooks.values()) == [hook]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_compiled_model_and_a_model_without_strides():
    model, x = image_model(), torch.randn(2, 3, 32, 30)
    assert relative(freeze(torch.compile(model, backend="eager"), x)(x), model(x)) < 1e-5
    plain = nn.Linear(3, 2).train()
    frozen = freeze(plain, torch.randn(4, 3))
    assert frozen is not plain
    assert not frozen.training
    assert plain.training


@pytest.mark.parametrize("preactivation", [False, True])
def test_a_resnet(preactivation):
    model, x = ResNet(width=1 / 16, downsample="diffstride", preactivation=preactivation), torch.randn(2, 3, 16, 16)
    assert relative(freeze(model, x)(x), model.eval()(x)) < 1e-5


# Nothing of ours is left


def assert_plain(model):
    """Check that a model has no class or function of this package."""
    for module in model.modules():
        assert type(module).__module__.partition(".")[0] != "diffstride"
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            assert hook.__module__.partition(".")[0] != "diffstride"
    file = io.BytesIO()
    torch.save(model, file)
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        strings = [argument for _, argument, _ in pickletools.genops(archive.read(name)) if isinstance(argument, str)]
    # Names of modules, and generated code, in which a child may be called so.
    assert not [text for text in strings if re.search(r"(?<!self\.)\bdiffstride[. ]\w", text)]


def test_a_frozen_model_works_where_this_package_is_not(tmp_path):
    model, x = image_model(), torch.randn(2, 3, 32, 30)
    frozen = freeze(model, x)
    assert_plain(frozen)
    torch.save({"model": frozen, "x": x, "y": model(x)}, tmp_path / "frozen.pt")
    script = f"""
import sys
sys.modules["diffstride"] = None
import torch
saved = torch.load({str(tmp_path / "frozen.pt")!r}, weights_only=False)
y = saved["model"](saved["x"])
assert torch.allclose(y, saved["y"], atol=1e-5), (y - saved["y"]).abs().max()
print(sorted(name for name in sys.modules if name.startswith("diffstride")))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (out.stdout, out.stderr) == ("['diffstride']\n", "")


# Ways out of PyTorch


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_sees_products_and_convolutions_alone(strict):
    model, x = image_model()[:7], torch.randn(2, 3, 32, 30)
    frozen = freeze(model, x)
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(frozen, (x,), dynamic_shapes=batch, strict=strict)
    called = [str(node.target).removeprefix("aten.") for node in program.graph.nodes if node.op == "call_function"]
    assert set(called) <= PRODUCTS | {"relu_.default", "batch_norm.default"}
    assert called.count("matmul.default") == 2 + 2 + 2 + 1
    other = torch.randn(5, 3, 32, 30)
    assert relative(program.module()(other), model(other)) < 1e-5


@pytest.mark.parametrize("size", [(20,), (20, 20), (8, 9, 10)])
def test_a_layer_is_products_and_convolutions_alone(size):
    for layer in (
        [ds.DiffStride1d, ds.DiffStride2d, ds.DiffStride3d][len(size) - 1](1.5, 1),
        [ds.DiffStrideConv1d, ds.DiffStrideConv2d, ds.DiffStrideConv3d][len(size) - 1](2, 4, 3, 2.5, 1, smoothness=1),
    ):
        x = torch.randn(2, 2, *size)
        program = torch.export.export(freeze(layer, x), (x,))
        called = {str(node.target).removeprefix("aten.") for node in program.graph.nodes if node.op == "call_function"}
        layout = {"flatten.using_ints", "unflatten.int"} if len(size) == 3 else set()
        assert called <= {"matmul.default", f"conv{len(size)}d.default"} | layout


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # in torch's own backend
def test_torch_compile(backend):
    model, x = image_model(), torch.randn(2, 3, 32, 30)
    compiled = torch.compile(freeze(model, x), fullgraph=True, backend=backend)
    with torch.no_grad():
        assert relative(compiled(x), model(x)) < 1e-5


REPARAMETRIZATIONS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "pruned bias": lambda conv: prune.random_unstructured(conv, "bias", 0.5),
}


@pytest.mark.parametrize("place", [0, 2], ids=["converted", "another"])
@pytest.mark.parametrize("first", [False, True], ids=["after conversion", "before conversion"])
@pytest.mark.parametrize("change", REPARAMETRIZATIONS.values(), ids=REPARAMETRIZATIONS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_models_with_reparametrized_weights_are_frozen_after_a_step_of_training(change, first, place):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(2, 3, 32, 32)
    if first:
        change(model[place])
    ds.convert(model, x)
    if not first:
        change(model[place])
    optimizer = torch.optim.SGD(ds.param_groups(model, 0.1), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()  # what is computed from the parameters is from before this step
    frozen = ds.freeze(model, x)
    assert all(type(module).__module__.split(".")[0] == "torch" for module in frozen.modules())
    expected = model.eval()(x)
    assert 0.01 < expected.std() < 10
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)


def test_tensors_that_a_model_keeps_from_its_last_pass_do_not_stop_freezing():
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.kept, self.last = nn.Conv1d(2, 2, 3, 2), [], {}

        def forward(self, x):
            y = self.conv(x)
            self.kept[:], self.last["map"] = [y], (y.softmax(-1), y)
            return y

    model, x = Attentive(), torch.randn(2, 2, 16)
    ds.convert(model, x)
    expected = model(x)
    torch.testing.assert_close(ds.freeze(model, x)(x), expected)
    assert model.kept[0] is expected
