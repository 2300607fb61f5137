"""Wrong input to every public function: one line that names the argument, the bound and the value, or the cure.

`CASES` has at least five for each function and class that users are offered, its methods included; which these are is
found by looking, so that what is new and has none fails.
"""

import math
import re

import pytest
import torch
from torch import nn
from wrong import public, refuses

import diffstride as ds
from diffstride import functional as F
from diffstride._check import UserError

ROOMS = "diffstride", "diffstride.functional", "diffstride.nn"
NAN, INF = math.nan, math.inf
X = torch.randn(2, 3, 8, 8)


# What calls are made on; after each, it must be what it was.
LAYER = ds.DiffStride2d()
META = ds.DiffStride2d(device="meta")
LOST = ds.DiffStride2d((2.0, 3.0), window="inner")
with torch.no_grad():
    LOST.stride[1] = NAN
STRIDED = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
PLAIN = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
LEARNED = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), ds.DiffStride2d(window="inner"), nn.ReLU())
MODELS = {"a layer": LAYER, "a lost stride": LOST, "no layers": PLAIN, "strided": STRIDED, "learned": LEARNED}


def not_a_model(call, name="model", model="torch.nn.Module"):
    """Cases of a function of a model, for what is none."""
    return [
        (lambda: call(None), TypeError, rf"{name} must be a {model}, got None"),
        (lambda: call(nn.ReLU), TypeError, rf"{name} must be a {model}, got the class ReLU"),
        (lambda: call(LAYER.state_dict()), TypeError, rf"{name} must be a {model}, got OrderedDict"),
        (lambda: call([LAYER]), TypeError, rf"{name} must be a {model}, got \[DiffStride2d"),
        (lambda: call("resnet18"), TypeError, rf"{name} must be a {model}, got 'resnet18'"),
        (lambda: call(X), TypeError, rf"{name} must be a {model}, got a Tensor of shape \(2, 3, 8, 8\)"),
    ]


def of_inputs(layer, ndim):
    """Cases of a layer's forward and `output_size`."""
    x = torch.zeros(2, 3, *[8] * ndim)
    ranks = rf"input must have {ndim + 2} dimensions .* or {ndim + 1} .* for {ndim} spatial ax[ei]s, got shape"
    return [
        (lambda: layer(x[0, 0]), ValueError, ranks),
        (lambda: layer(x[None]), ValueError, ranks),
        (lambda: layer(x.int()), TypeError, r"input must be floating point .*, got torch\.int32"),
        (lambda: layer(x + 0j), TypeError, r"input must be floating point .*, got torch\.complex64"),
        (lambda: layer([[1.0]]), TypeError, r"input must be a torch\.Tensor, got list"),
        (lambda: layer(None), TypeError, r"input must be a torch\.Tensor, got NoneType"),
        (lambda: layer(x[..., :0]), ValueError, r"input's spatial sizes must be >= 1, got shape \(2, 3, .*0\)"),
        (lambda: layer.output_size(0), ValueError, r"size must be >= 1, got 0"),
        (lambda: layer.output_size(8.5), TypeError, r"size must be an int, got 8\.5"),
        (lambda: layer.output_size("8"), TypeError, r"size must be a number or a sequence of \d numbers, got '8'"),
        (lambda: layer.output_size([8] * (ndim + 1)), ValueError, rf"size must have {ndim} entries .*, got {ndim + 1}"),
    ]


def of_strides(make, ndim):
    """Cases of the arguments that all layers with a stride have."""
    numbers = rf"stride must be a number or a sequence of {ndim} numbers, got"
    return [
        (lambda: make(0.5), ValueError, r"stride must be >= 1, got 0\.5"),
        (lambda: make(-2), ValueError, r"stride must be >= 1, got -2"),
        (lambda: make(NAN), ValueError, r"stride must be finite, got nan"),
        (lambda: make(INF), ValueError, r"stride must be finite, got inf"),
        (lambda: make((2,) * (ndim + 1)), ValueError, rf"stride must have {ndim} entries \(one per axis\), got"),
        (lambda: make("2"), TypeError, rf"{numbers} '2'"),
        (lambda: make(None), TypeError, rf"{numbers} None"),
        (lambda: make(True), TypeError, rf"{numbers} True"),
        (lambda: make(torch.ones(3, 3)), TypeError, rf"{numbers} a Tensor of shape \(3, 3\)"),
        (lambda: make(2, basis="dst"), ValueError, r"basis must be one of 'dft', 'dct', got 'dst': did you mean dft\?"),
        (lambda: make(2, norm="max"), ValueError, r"norm must be one of 'forward', .*, got 'max'"),
        (lambda: make(2, norm=nn.Sequential(nn.ReLU())), ValueError, r"norm must be .*, got the module Sequential"),
        (lambda: make(2, backend="cuda"), ValueError, r"backend must be one of 'auto', .*, got 'cuda'"),
    ]


def of_learning(make):
    """Cases of the arguments that all layers with a learnable stride have."""
    return [
        (lambda: make(shared="no"), TypeError, r"shared must be True or False, got 'no'"),
        (lambda: make(smoothness=0), ValueError, r"smoothness must be > 0 .*use SpectralPool.*, got 0"),
        (lambda: make(smoothness=-1), ValueError, r"smoothness must be > 0 and finite, got -1"),
        (lambda: make(smoothness=NAN), ValueError, r"smoothness must be > 0 and finite, got nan"),
        (lambda: make(smoothness="4"), TypeError, r"smoothness must be a number, got '4'"),
        (lambda: make(bounds=(0.5, None)), ValueError, r"bounds must satisfy 1 <= lower <= upper, got"),
        (lambda: make(bounds=(3, 2)), ValueError, r"bounds must satisfy 1 <= lower <= upper, got \(3, 2\)"),
        (lambda: make(bounds=3), TypeError, r"bounds must be a pair \(lower, upper\), got 3"),
        (lambda: make(bounds=("1", None)), TypeError, r"bounds must be numbers .*, got \('1', None\)"),
        (lambda: make(5, bounds=(1, 4)), ValueError, r"stride must lie within bounds \(1\.0, 4\.0\), got"),
        (lambda: make(window="middle"), ValueError, r"window must be one of 'outer', 'inner', got 'middle'"),
        (lambda: make(window=None), ValueError, r"window must be one of 'outer', 'inner', got None"),
        (lambda: make(size_multiple=0), ValueError, r"size_multiple must be >= 1, got 0"),
        (lambda: make(size_multiple=2.5), TypeError, r"size_multiple must be an int, got 2\.5"),
        (lambda: make(dtype="float32"), TypeError, r"dtype must be a torch\.dtype or None, got 'float32'"),
        (lambda: make(dtype=torch.int32), ValueError, r"dtype must be floating point .*, got torch\.int32"),
        (lambda: make(device="gpu"), ValueError, r"device must be one that torch has here, got 'gpu'"),
    ]


def of_jitter(layer, entries):
    return [
        (lambda: layer.set_jitter(0), ValueError, r"factors must be > 0 and finite, got 0"),
        (lambda: layer.set_jitter(INF), ValueError, r"factors must be > 0 and finite, got inf"),
        (lambda: layer.set_jitter([1.0] * 4), ValueError, rf"factors must have {entries} entries .*, got 4"),
        (lambda: layer.set_jitter("1"), TypeError, r"factors must be a number or a sequence of .*, got '1'"),
    ]


def unequal(make, ndim):
    if ndim == 1:
        return []
    strides = tuple(range(2, 2 + ndim))
    return [
        (lambda: make(strides, shared=True), ValueError, r"stride must be one number when shared=True, got \(2\.0, ")
    ]


def of_convolution(kind, ndim):
    def make(*args, **options):
        arguments = dict(zip(("in_channels", "out_channels", "kernel_size", "stride", "padding"), args, strict=False))
        return kind(**({"in_channels": 3, "out_channels": 4, "kernel_size": 3} | arguments | options))

    x = torch.zeros(2, 4, *[8] * ndim)
    layer = [ds.DiffStride1d, ds.DiffStride2d, ds.DiffStride3d][ndim - 1]()
    other = [ds.DiffStride2d, ds.DiffStride3d, ds.DiffStride1d][ndim - 1]()
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][ndim - 1]
    mirrored = make(kernel_size=19, padding=9, padding_mode="reflect")
    return [
        (lambda: make(0), ValueError, r"in_channels must be >= 1, got 0"),
        (lambda: make(3.0), TypeError, r"in_channels must be an int, got 3\.0"),
        (lambda: make(3, "4"), TypeError, r"out_channels must be an int, got '4'"),
        (lambda: make(3, 4, 0), ValueError, r"kernel_size must be >= 1, got 0"),
        (lambda: make(3, 4, [3] * 4), ValueError, rf"kernel_size must have {ndim} entries .*, got 4"),
        (lambda: make(3, 4, None), TypeError, r"kernel_size must be a number or a sequence of .*, got None"),
        (lambda: make(padding=-1), ValueError, r"padding must be >= 0, got -1"),
        (lambda: make(padding=1.5), TypeError, r"padding must be an int, got 1\.5"),
        (lambda: make(padding="some"), ValueError, r"padding must be one of 'same', 'valid', got 'some'.* same\?"),
        (lambda: make(dilation=0), ValueError, r"dilation must be >= 1, got 0"),
        (lambda: make(groups=2), ValueError, r"in_channels must be divisible by groups=2, got 3"),
        (lambda: make(groups=0), ValueError, r"groups must be >= 1, got 0"),
        (lambda: make(bias=1), TypeError, r"bias must be True or False, got 1"),
        (
            lambda: make(padding_mode="zero"),
            ValueError,
            r"padding_mode must be one of 'zeros', .* did you mean zeros\?",
        ),
        (lambda: make()(x), ValueError, rf"input must have 3 channels, got shape \(2, 4, {'8, ' * (ndim - 1)}8\)"),
        (lambda: make(kernel_size=9)(x[:, :3]), ValueError, r"kernel_size must fit the padded input, got \(9,.*sizes"),
        (lambda: mirrored(x[:, :3]), ValueError, r"padding must be <= 7 for 8 samples with .*'reflect', got \(9, 9\)"),
        (lambda: kind.fuse(nn.ReLU(), layer), TypeError, r"conv and layer must be a plain nn\.Conv .*, got ReLU"),
        (lambda: kind.fuse(conv(3, 4, 3), None), TypeError, r"conv and layer must be .*, got Conv\dd, NoneType"),
        (lambda: kind.fuse(conv(3, 4, 3, 2), layer), ValueError, r"conv must have stride 1 and .*, got stride \(2,"),
        (lambda: kind.fuse(conv(3, 4, 3), other), ValueError, rf"conv must have stride 1 and {ndim} spatial axes"),
        *of_strides(lambda stride, **options: make(stride=stride, **options), ndim),
        *of_learning(lambda stride=2.0, **options: make(stride=stride, **options)),
        *unequal(lambda stride, **options: make(stride=stride, **options), ndim),
        *of_inputs(make(padding=1), ndim),
        *of_jitter(make(), ndim),
    ]


def of_layer(kind, ndim):
    return [
        *of_strides(kind, ndim), *of_learning(kind), *unequal(kind, ndim), *of_inputs(kind(), ndim),
        *of_jitter(kind(), ndim),
    ]  # fmt: skip


def of_pool(kind, ndim):
    x = torch.zeros(2, 3, *[8] * ndim)
    large = r"strides must be <= the input's sizes \(8,.*\), got \(9\.0,"
    return [*of_strides(kind, ndim), *of_inputs(kind(2), ndim), (lambda: kind(9)(x), ValueError, large)]


class Own(ds.Exploration):
    """Gives what it is told to."""

    def __init__(self, given):
        super().__init__()
        self.given = given

    def factors(self, turn):
        return self.given


def of_exploration(make):
    def step(*args, **options):
        return make().set_strides(*args, **options)

    return [
        (lambda: step(None, 0, 10), TypeError, r"model must be a torch\.nn\.Module, got None"),
        (lambda: step(LAYER, -1, 10), ValueError, r"step must be >= 0, got -1"),
        (lambda: step(LAYER, "1", 10), TypeError, r"step must be an int, got '1'"),
        (lambda: step(LAYER, NAN, 10), TypeError, r"step must be an int, got nan"),
        (lambda: step(LAYER, 0, 0), ValueError, r"steps must be >= 1, got 0"),
        (lambda: step(LAYER, 0, INF), TypeError, r"steps must be an int, got inf"),
        (lambda: step(LAYER, 0, 10, seed=None), TypeError, r"seed must be an int, got None"),
        (lambda: step(LOST, 0, 10), ValueError, r"stride must be finite, got 2, nan in DiffStride2d"),
        (lambda: make(until=0), ValueError, r"until must be > 0 and <= 1, got 0"),
        (lambda: make(until="half"), TypeError, r"until must be a number, got 'half'"),
    ]


CASES = {
    "convert": [
        (lambda: ds.convert(None, X), TypeError, r"model must be a torch\.nn\.Module, got None"),
        (lambda: ds.convert(STRIDED, X[:, :2]), ds.trace.TraceError, r"model must run on the example inputs, 0 \(Conv2d\)"),
        (lambda: ds.convert(nn.Sequential(nn.ReLU()), X), UserError, r"model must have a downsampling .*, got none"),
        (lambda: ds.convert(STRIDED, X, smoothness=-1), ValueError, r"smoothness must be > 0 and finite, got -1"),
        (lambda: ds.convert(STRIDED, X, window="middle"), ValueError, r"window must be one of 'outer', .*, got 'middle'"),
        (lambda: ds.convert(STRIDED, X, size_multiple=0), ValueError, r"size_multiple must be >= 1, got 0"),
    ],
    "plan": [
        (lambda: ds.plan(nn.Conv2d, X), TypeError, r"model must be a torch\.nn\.Module, got "),
        (lambda: ds.plan(STRIDED, X[:, :2]), ds.trace.TraceError, r"model must run on the example inputs, 0 \(Conv2d\)"),
        (lambda: ds.plan(STRIDED, ds.ExampleInputs(X, 2)), ds.trace.TraceError, r"raised TypeError: .* 3 were given"),
        (lambda: ds.plan(STRIDED, X, basis="dst"), ValueError, r"basis must be one of 'dft', 'dct', got 'dst'"),
        (lambda: ds.plan(STRIDED, X, backend="cuda"), ValueError, r"backend must be one of .*, got 'cuda'"),
    ],
    "Plan": [
        (lambda folder: ds.Plan.load(folder / "none"), UserError, r"path must be a plan .*none: .*No such file"),
        (lambda folder: ds.Plan.load(folder / "file"), UserError, r"path must be a plan that Plan\.save wrote, got .*file"),
        (lambda folder: ds.Plan.load(folder), UserError, r"path must be a plan .*directory"),
        (lambda folder: ds.plan(STRIDED, X).save(folder), UserError, r"path must be a file that can be written, got"),
        (lambda: ds.plan(STRIDED, X).apply(PLAIN), UserError, r"model must "),
    ],
    "freeze": [
        (lambda: ds.freeze(None, X), TypeError, r"model must be a torch\.nn\.Module, got None"),
        (lambda: ds.freeze(LEARNED, None), UserError, r"model must run on the example inputs, Sequential raised TypeErr"),
        (lambda: ds.freeze(LEARNED, X[:, :2]), UserError, r"example inputs, .* to have 3 channels, but got 2 channels"),
        (lambda: ds.freeze(LEARNED, ds.ExampleInputs()), UserError, r"missing 1 required positional argument"),
        (lambda: ds.freeze(LEARNED, X.double()), UserError, r"model must run on the example inputs, .*type"),
    ],
    "ExampleInputs": [
        (lambda: ds.plan(STRIDED, ds.ExampleInputs()), ds.trace.TraceError, r"missing 1 required positional argument"),
        (lambda: ds.plan(STRIDED, ds.ExampleInputs(X, X)), ds.trace.TraceError, r"2 positional arguments but 3 were given"),
        (lambda: ds.plan(STRIDED, ds.ExampleInputs(y=X)), ds.trace.TraceError, r"unexpected keyword argument 'y'"),
        (lambda: ds.CostModel(LEARNED, ds.ExampleInputs(X[0, 0])), ds.trace.TraceError, r"model must run on the example"),
        (lambda: ds.freeze(LEARNED, ds.ExampleInputs(X, a=1)), UserError, r"unexpected keyword argument 'a'"),
    ],
    "CostModel": [
        (lambda: ds.CostModel(None, X), TypeError, r"model must be a torch\.nn\.Module, got None"),
        (lambda: ds.CostModel(LEARNED, X[:, :2]), ds.trace.TraceError, r"model must run on the example inputs, 0 \(Conv2d\)"),
        (lambda: ds.CostModel(LEARNED, X, "flops"), ValueError, r"measure must be one of 'macs', 'memory', got 'flops'"),
        (lambda: ds.CostModel(LEARNED, X).budget(0), ValueError, r"amount must be > 0 and finite, got 0"),
        (lambda: ds.CostModel(LEARNED, X).budget("x"), TypeError, r"amount must be a number .*, got 'x'"),
        (lambda: ds.CostModel(LEARNED, X).budget(1e-9), UserError, r"amount must be between .*, got 1e-09"),
    ],
    "Budget": [
        (lambda: ds.Budget(None, 1.0), TypeError, r"cost must be a CostModel, got None"),
        (lambda: ds.Budget(ds.CostModel(LEARNED, X), -1), ValueError, r"target must be > 0 and finite, got -1"),
        (lambda: ds.Budget(ds.CostModel(LEARNED, X), "1"), TypeError, r"target must be a number, got '1'"),
        (lambda: ds.Budget(ds.CostModel(LEARNED, X), 1e4, rate=NAN), ValueError, r"rate must be > 0 and finite, got nan"),
        (lambda: ds.Budget(ds.CostModel(LEARNED, X), 1e4, near=-1), ValueError, r"near must be >= 0, got -1"),
    ],
    **{kind.__name__: of_layer(kind, kind.ndim) for kind in (ds.DiffStride1d, ds.DiffStride2d, ds.DiffStride3d)},
    **{
        kind.__name__: of_convolution(kind, kind.ndim)
        for kind in (ds.DiffStrideConv1d, ds.DiffStrideConv2d, ds.DiffStrideConv3d)
    },
    **{kind.__name__: of_pool(kind, kind.ndim) for kind in (ds.SpectralPool1d, ds.SpectralPool2d, ds.SpectralPool3d)},
    "functional.stride_mask": [
        (lambda: F.stride_mask(8, 0.5, 4), ValueError, r"stride must be >= 1, got 0\.5"),
        (lambda: F.stride_mask(8, torch.tensor(NAN), 4), ValueError, r"stride must be finite, got nan"),
        (lambda: F.stride_mask(8, "2", 4), TypeError, r"stride must be a number, got '2'"),
        (lambda: F.stride_mask(8, torch.ones(2), 4), ValueError, r"stride must be one number, got 2"),
        (lambda: F.stride_mask(8, torch.tensor(2), 4), TypeError, r"strides must be floating point .*, got torch\.int64"),
        (lambda: F.stride_mask(0, 2.0, 4), ValueError, r"size must be >= 1, got 0"),
        (lambda: F.stride_mask(8.0, 2.0, 4), TypeError, r"size must be an int, got 8\.0"),
        (lambda: F.stride_mask(8, 2.0, -1), ValueError, r"smoothness must be >= 0, got -1"),
        (lambda: F.stride_mask(8, 2.0, NAN), ValueError, r"smoothness must be finite, got nan"),
        (lambda: F.stride_mask(8, 2.0, None), TypeError, r"smoothness must be a number, got None"),
        (lambda: F.stride_mask(8, 2.0, 4, window="iner"), ValueError, r"window must be .*, got 'iner': .* inner\?"),
        (lambda: F.stride_mask(8, 2.0, 4, basis=2), ValueError, r"basis must be one of 'dft', 'dct', got 2"),
    ],
    "functional.diffstride": [
        (lambda: F.diffstride(X, torch.tensor([2, 2])), TypeError, r"strides must be floating point .*, got torch\.int64"),
        (lambda: F.diffstride(X, torch.tensor(2.0)), ValueError, r"strides must have shape \[d\], .*, got shape \(\)"),
        (lambda: F.diffstride(X, 2.0), TypeError, r"strides must be a sequence with one number per axis, got 2\.0"),
        (lambda: F.diffstride(X, "22"), TypeError, r"strides must be a sequence with one number per axis, got '22'"),
        (lambda: F.diffstride(X, (2.0, INF)), ValueError, r"stride must be finite, got 2, inf"),
        (lambda: F.diffstride(X, ()), ValueError, r"strides must have one entry per spatial axis, got none"),
        (lambda: F.diffstride(X, (2.0,)), ValueError, r"input must have 3 dimensions .*, got shape \(2, 3, 8, 8\)"),
        (lambda: F.diffstride(X, (2.0, 2.0), 0), ValueError, r"smoothness must be > 0 .*got 0"),
        (lambda: F.diffstride(X, (2.0, 2.0), output_size=(4, 0)), ValueError, r"output_size must be >= 1, got 0"),
        (lambda: F.diffstride(X, (2.0, 2.0), bounds=(0, 3)), ValueError, r"bounds must satisfy .*, got \(0, 3\)"),
        (lambda: F.diffstride(X, (2.0, 2.0), size_multiple=0), ValueError, r"size_multiple must be >= 1, got 0"),
        (lambda: F.diffstride(X, (2.0, 2.0), size_multiple=1.5), TypeError, r"size_multiple must be an int, got 1\.5"),
        (lambda: F.diffstride(X.int(), (2.0, 2.0)), TypeError, r"input must be floating point .*, got torch\.int32"),
        (lambda: F.diffstride(X, (2.0, 2.0), norm="mean"), ValueError, r"norm must be one of 'forward', .* got 'mean'"),
    ],
    "functional.spectral_pool": [
        (lambda: F.spectral_pool(X, (2.0, 0.1)), ValueError, r"strides must be >= 1, got 2, 0\.1"),
        (lambda: F.spectral_pool(X, (2.0, NAN)), ValueError, r"strides must be finite, got 2, nan"),
        (lambda: F.spectral_pool(X, 2.0), TypeError, r"strides must be a sequence with one number per axis, got 2\.0"),
        (lambda: F.spectral_pool(X, torch.tensor(2.0)), TypeError, r"strides must be a sequence .*, got tensor\(2\.\)"),
        (lambda: F.spectral_pool(X, torch.ones(2, 2)), TypeError, r"strides must be a number or a sequence of 2 numbers"),
        (lambda: F.spectral_pool(X[0], (2.0,) * 3), ValueError, r"input must have 5 dimensions .*, got shape \(3, 8, 8"),
        (lambda: F.spectral_pool(X, (9, 2)), ValueError, r"strides must be <= the input's sizes \(8, 8\), got \(9\.0, 2"),
        (lambda: F.spectral_pool(X.long(), (2, 2)), TypeError, r"input must be floating point .*, got torch\.int64"),
        (lambda: F.spectral_pool(X, (2, 2), backend="fftw"), ValueError, r"backend must .*, got 'fftw': .* fft\?"),
    ],
    "spectral_resize": [
        (lambda: ds.spectral_resize(X, 0), ValueError, r"size must be >= 1, got 0"),
        (lambda: ds.spectral_resize(X, True), TypeError, r"size must be a sequence with one number per axis, got True"),
        (lambda: ds.spectral_resize(X, 2.5), TypeError, r"size must be a sequence with one number per axis, got 2\.5"),
        (lambda: ds.spectral_resize(X, (4, 2.5)), TypeError, r"size must be an int, got 2\.5"),
        (lambda: ds.spectral_resize(X, (4, 4, 4, 4)), ValueError, r"input must have 6 dimensions"),
        (lambda: ds.spectral_resize(X, ()), ValueError, r"size must have one entry per spatial axis, got none"),
        (lambda: ds.spectral_resize(X, 4, basis="DFT"), ValueError, r"basis must be one of 'dft', 'dct', got 'DFT'"),
        (lambda: ds.spectral_resize([1.0, 2.0], 4), TypeError, r"input must be a torch\.Tensor, got list"),
        (lambda: ds.spectral_resize(X.bool(), 4), TypeError, r"input must be floating point .*, got torch\.bool"),
    ],
    "strides": [
        *not_a_model(ds.strides),
        (lambda: ds.strides(META), ValueError, r"stride must have values, got none on the meta device: use to_empty"),
    ],
    "clamp_strides_": not_a_model(ds.clamp_strides_),
    "refresh_sizes": not_a_model(ds.refresh_sizes),
    "nn.learnable_layers": not_a_model(lambda model: list(ds.nn.learnable_layers(model))),
    "param_groups": [
        *not_a_model(lambda model: ds.param_groups(model, 0.1)),
        (lambda: ds.param_groups(LAYER, -1), ValueError, r"lr must be >= 0, got -1"),
        (lambda: ds.param_groups(LAYER, None), TypeError, r"lr must be a number, got None"),
        (lambda: ds.param_groups(LAYER, "0.1"), TypeError, r"lr must be a number, got '0\.1'"),
        (lambda: ds.param_groups(LAYER, torch.ones(2)), TypeError, r"lr must be a number, got a Tensor of shape \(2,\)"),
        (lambda: ds.param_groups(LAYER, 0.1, stride_lr=NAN), ValueError, r"stride_lr must be finite, got nan"),
        (lambda: ds.param_groups(LAYER, 0.1, weight_decay=INF), ValueError, r"weight_decay must be finite, got inf"),
        (lambda: ds.param_groups(nn.ReLU(), 0.1), ValueError, r"model must have trainable parameters, got none in ReLU"),
    ],
    "replicate_strides": [
        *not_a_model(ds.replicate_strides),
        (lambda: ds.replicate_strides(LAYER, "world"), TypeError, r"group must be .*ProcessGroup or None, got 'world'"),
        (lambda: ds.replicate_strides(LAYER), ValueError, r"group must be initialized, got none: call .*init_process_"),
    ],
    "stride_cost": [
        *not_a_model(ds.stride_cost),
        (lambda: ds.stride_cost(PLAIN), ValueError, r"model must have learnable strides .*, got none in Sequential"),
    ],
    "cutoff_frequencies": [
        *not_a_model(lambda model: ds.cutoff_frequencies(model, 1.0)),
        (lambda: ds.cutoff_frequencies(LAYER, 0), ValueError, r"spacing must be > 0 and finite, got 0"),
        (lambda: ds.cutoff_frequencies(LAYER, (1, 1, 1)), ValueError, r"spacing must have 2 entries .*, got 3: \(1, 1"),
        (lambda: ds.cutoff_frequencies(LAYER, "10 ms"), TypeError, r"spacing must be a number or .*, got '10 ms'"),
        (lambda: ds.cutoff_frequencies(LAYER, 1, whole_bins=1), TypeError, r"whole_bins must be True or False, got 1"),
        (lambda: ds.cutoff_frequencies(LAYER, 1, None, True), ValueError, r"example_inputs must be given for whole_bin"),
        (lambda: ds.cutoff_frequencies(LEARNED, 1), ValueError, r"example_inputs must be given for 1: .*, got None"),
        (lambda: ds.cutoff_frequencies(LEARNED, 1, X[:, :2]), ValueError, r"model must run on the example inputs, 0 "),
    ],
    "Exploration": [
        *of_exploration(lambda until=0.5: ds.Jitter(until=until)),
        (lambda: Own([1.0] * 3).set_strides(LAYER, 0, 10), ValueError, r"factors must have 2 entries .*, got 3"),
        (lambda: Own([1.0, -1.0]).set_strides(LAYER, 0, 10), ValueError, r"factors must be > 0 and finite, got 1, -1"),
        (lambda: Own(["1", "1"]).set_strides(LAYER, 0, 10), TypeError, r"factors must be a number or .*, got \['1', "),
    ],
    "Jitter": [
        *of_exploration(ds.Jitter),
        (lambda: ds.Jitter(0), ValueError, r"sigma must be > 0 and <= 10, got 0"),
        (lambda: ds.Jitter(NAN), ValueError, r"sigma must be > 0 and <= 10, got nan"),
        (lambda: ds.Jitter("0.1"), TypeError, r"sigma must be a number, got '0\.1'"),
    ],
    "Sweep": [
        *of_exploration(ds.Sweep),
        (lambda: ds.Sweep(1.5), ValueError, r"depth must be > 0 and <= 1, got 1\.5"),
        (lambda: ds.Sweep(None), TypeError, r"depth must be a number, got None"),
        (lambda: ds.Sweep(True), TypeError, r"depth must be a number, got True"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), public(ROOMS).items(), ids=public(ROOMS))
def test_every_public_function_has_cases(name, value):
    cases = CASES.get(name, [])
    assert len({message for _, _, message in cases}) >= 5, f"{name} needs five kinds of wrong input in CASES"


def test_cases_are_of_public_functions():
    assert CASES.keys() <= public(ROOMS).keys()


ALL = [(name, *case) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("call", "error", "message"), [case[1:] for case in ALL], ids=[f"{c[0]}: {c[3]}" for c in ALL])
def test_one_line_that_names_the_cure(call, error, message, tmp_path):
    refuses(call, error, message, tmp_path, MODELS)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_stride_that_went_astray_names_its_layer(value):
    layer = ds.DiffStride2d((2.0, 3.0), window="inner")
    with torch.no_grad():
        layer.stride[1] = value
    with pytest.raises(ValueError, match=re.escape("in DiffStride2d(stride=(2, ")):
        layer(X)


@pytest.mark.parametrize("layer", [ds.DiffStride2d(2.0), ds.SpectralPool2d(2.0)])
@pytest.mark.parametrize("backend", ["fft", "matmul"])
def test_an_empty_batch_works(layer, backend):
    layer.backend = backend
    y = layer(torch.empty(0, 3, 16, 17, requires_grad=True))
    assert y.shape == (0, 3, *layer.output_size((16, 17)))
    y.sum().backward()
