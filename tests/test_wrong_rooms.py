"""Wrong input to the public functions around the core: networks, pictures, files, histories, costs.

What is asked of an answer is that of test_wrong_input.py; nor are random numbers drawn before it is given.
"""

import inspect
import math

import pytest
import torch
from torch import nn
from wrong import public, refuses

import test_wrong_input as core
from diffstride import export, models, plotting, tracking
from diffstride._check import UserError
from diffstride.cost import count_macs, evaluation
from diffstride.tracking import StrideRow
from test_wrong_input import LEARNED, not_a_model

ROOMS = "diffstride.models", "diffstride.plotting", "diffstride.export", "diffstride.tracking", "diffstride.cost"
NAN, INF = math.nan, math.inf
X = torch.randn(2, 3, 8, 8)
TINY = models.TinyCNN(in_channels=3)
MODELS = {"a network": TINY, "a model": LEARNED}
ROW = StrideRow(0, "down", "height", 2.0, 9)
CURVE, PICTURE = torch.linspace(0, 1, 4), torch.eye(4)
EXPLORED = plotting.Explored([([0], [2.0])], ([0], [2.0]))
POINT, SPREAD = plotting.Point("label", 1.0, 1.0, 1.0, 0.5, 0.0), plotting.Spread(0.5, 0.1)


def of_ends(make):
    """Cases of what every network has at its two ends."""
    return [
        (lambda: make(in_channels=0), ValueError, r"in_channels must be >= 1, got 0"),
        (lambda: make(in_channels="rgb"), TypeError, r"in_channels must be an int, got 'rgb'"),
        (lambda: make(num_classes=0), ValueError, r"num_classes must be >= 1, got 0"),
        (lambda: make(num_classes=10.0), TypeError, r"num_classes must be an int, got 10\.0"),
        (lambda: make(num_classes="10"), TypeError, r"num_classes must be an int, got '10'"),
        (lambda: make(num_classes=["cat", "dog"]), TypeError, r"num_classes must be an int, got \['cat', 'dog'\]"),
        (lambda: make(num_classes={"a": -2}), ValueError, r"num_classes of a must be >= 1, got -2"),
        (lambda: make(num_classes={"a": 2.5}), TypeError, r"num_classes of a must be an int, got 2\.5"),
        (lambda: make(num_classes={1: 2}), TypeError, r"num_classes must be a mapping from tasks .*, got \{1: 2\}"),
        (lambda: make(num_classes={}), ValueError, r"num_classes must have names .*, one at least.*, got \{\}"),
    ]


def of_batch(network, ndim):
    """Cases of a network's forward."""
    x = torch.zeros(2, network.in_channels, *[64] * ndim)
    rank = rf"input must have {ndim + 2} dimensions \[B, C, \*spatial\], got shape"
    return [
        (lambda: network(x[0]), ValueError, rf"{rank} \({network.in_channels}, 64"),
        (lambda: network(x[None]), ValueError, rf"{rank} \(1, 2, "),
        (lambda: network(x.flatten()), ValueError, rank),
        (lambda: network(x.byte()), TypeError, r"input must be floating point .*, got torch\.uint8"),
        (lambda: network(x.tolist()), TypeError, r"input must be a torch\.Tensor, got list"),
        (lambda: network(x.numpy()), TypeError, r"input must be a torch\.Tensor, got ndarray"),
        (
            lambda: network(x.repeat_interleave(2, 1)),
            ValueError,
            rf"input must have {network.in_channels} channels, got",
        ),
        (lambda: network(x[..., :0]), ValueError, r"input's spatial sizes must be >= 1, got shape \(2, .*0\)"),
    ]


def of_downsample(make, name="downsample_options"):
    """Cases of the way of downsampling and its options."""
    return [
        (
            lambda: make(downsample="bluur"),
            ValueError,
            r"downsample must be one of .*, got 'bluur': did you mean blur\?",
        ),
        (lambda: make(downsample=None), ValueError, r"downsample must be one of 'conv', .*, got None"),
        (
            lambda: make(downsample=nn.ReLU()),
            TypeError,
            r"downsample must be a method's name or .* got the module ReLU",
        ),
        (
            lambda: make(**{name: {"smothness": 1}}),
            TypeError,
            r"options must be among .*'smothness'.* mean smoothness\?",
        ),
        (lambda: make(**{name: ["smoothness"]}), TypeError, rf"{name} must be a mapping from .*, got \['smoothness'\]"),
        (lambda: make(**{name: {1: 2}}), TypeError, rf"{name} must be a mapping from .*, got \{{1: 2\}}"),
        (lambda: make(**{name: {"smoothness": -1}}), ValueError, r"smoothness must be > 0 and finite, got -1"),
        (lambda: make(**{name: {"window": "iner"}}), ValueError, r"window must be one of .*: did you mean inner\?"),
    ]


def of_strides(make, entries):
    """Cases of the strides of networks whose downsamplings have this number; make takes them."""
    return [
        (lambda: make(2.0), TypeError, r"strides must be a sequence, got 2\.0"),
        (lambda: make("2"), TypeError, r"strides must be a sequence, got '2'"),
        (lambda: make([2] * (entries + 2)), ValueError, r"strides must have .* entr.*, got \d: \[2, 2"),
        (lambda: make([]), ValueError, r"strides must have .* entr.*, got 0: \[\]"),
        (lambda: make([2] * (entries - 1) + [0]), ValueError, r"stride must be >= 1, got 0"),
        (lambda: make([2] * (entries - 1) + [NAN]), ValueError, r"stride must be finite, got nan"),
        (lambda: make([2] * (entries - 1) + ["2"]), TypeError, r"stride must be a number or a sequence .*, got '2'"),
        (
            lambda: make([2] * (entries - 1) + [(2, 2, 2)]),
            ValueError,
            r"stride must have \d entries \(one per axis\), got 3",
        ),
    ]


def of_network(kind, entries, ndim=2, **small):
    def make(**options):
        return kind(**{"downsample": "diffstride", **small, **options})

    def fractional():
        return make(downsample="avg", strides=[2] * (entries - 1) + [2.5])

    return [
        *of_ends(make), *of_downsample(make), *of_batch(make(), ndim),
        *of_strides(lambda strides: make(strides=strides), entries),
        (fractional, ValueError, r"stride must be an integer for downsample='avg', got 2\.5; 'spectral' and 'diffstr"),
    ]  # fmt: skip


def of_width(make):
    return [
        (lambda: make(width=0), ValueError, r"width must be > 0 and finite, got 0"),
        (lambda: make(width=NAN), ValueError, r"width must be > 0 and finite, got nan"),
        (lambda: make(width=INF), ValueError, r"width must be > 0 and finite, got inf"),
        (lambda: make(width="wide"), TypeError, r"width must be a number, got 'wide'"),
    ]


def residual(*args, **options):
    given = dict(zip(("in_channels", "channels", "kernels"), args, strict=False))
    return models.ResidualBlock(
        **{"in_channels": 4, "channels": (4, 4), "kernels": (3, 3), "downsample": "diffstride", "stride": 2}
        | given
        | options
    )


def spectrogram(*args, **options):
    given = dict(zip(("in_channels", "channels", "stride"), args, strict=False))
    return models.SpectrogramBlock(**{"in_channels": 4, "channels": 4, "stride": 2} | given | options)


def rows_of(model, step, input_sizes, axes=()):
    return list(tracking.stride_rows(model, step, input_sizes, axes))


def entered(context):
    with context:
        pass


def not_rows(call):
    """Cases of a function that writes a history."""
    return [
        (lambda folder: call(None, folder / "it"), TypeError, r"rows must be a sequence of StrideRow, got None"),
        (
            lambda folder: call("strides.csv", folder / "it"),
            TypeError,
            r"rows must be a sequence of StrideRow, got 'strides\.csv'",
        ),
        (
            lambda folder: call(ROW, folder / "it"),
            TypeError,
            r"rows must be a sequence of StrideRow, got StrideRow\(",
        ),
        (
            lambda folder: call([ROW._asdict()], folder / "it"),
            TypeError,
            r"rows must be a sequence of StrideRow, got \{'step': 0.* in it",
        ),
        (
            lambda folder: call([tuple(ROW)], folder / "it"),
            TypeError,
            r"rows must be a sequence of StrideRow, got \(0, 'down', .* in it",
        ),
        (
            lambda folder: call([ROW, ROW._replace(stride="2")], folder / "it"),
            TypeError,
            r"stride in rows must be a number, got '2'",
        ),
        (
            lambda folder: call([ROW, ROW._replace(step=None)], folder / "it"),
            TypeError,
            r"step in rows must be an int, got None",
        ),
    ]


def not_a_path(call):
    """Cases of a function that writes a file, or two of this name."""
    return [
        (lambda: call(None), TypeError, r"path must be a path, got None"),
        (lambda: call(3), TypeError, r"path must be a path, got 3"),
        (lambda: call(""), ValueError, r"path must be the name of a file, got ''"),
        (
            lambda folder: call(folder / "none" / "it"),
            UserError,
            r"there is no folder .*none: make it, or give another",
        ),
        (
            lambda folder: call(folder / "file" / "it"),
            UserError,
            r"there is no folder .*file: make it, or give another",
        ),
    ]


def of_file(write):
    """Cases of a function that writes a model to a file."""
    return [
        *not_a_model(lambda model: write(model, "it")),
        *not_a_path(lambda path: write(LEARNED, path)),
        (lambda folder: write(LEARNED, folder / "full"), UserError, r"cannot write .*full"),
        (lambda folder: write(LEARNED, folder / "it", "text"), TypeError, r"metadata must be a mapping .*, got 'text'"),
        (
            lambda folder: write(LEARNED, folder / "it", {1: "a"}),
            TypeError,
            r"metadata must be a mapping .*, got \{1: 'a'",
        ),
        (lambda folder: write(LEARNED, folder / "it", {"a": 1}), TypeError, r"metadata must have texts, got 1 for a"),
    ]


def of_picture(draw, given, *misfits):
    """Cases of a function that draws: of its path, and of each thing that is given in place of what belongs there.

    Misfits are the function's own: by the argument, what is given and what is said.
    """

    def instead(name, wrong):
        return lambda: draw(**given | {name: wrong}, path="it")

    def kinds(name, right):
        yield instead(name, None), TypeError, rf"{name} must be .*, got None"
        yield instead(name, object), TypeError, rf"{name} must be .*, got the class object"
        if isinstance(right, (str, float)):
            yield instead(name, [right]), TypeError, rf"{name} must be .*, got \["
        else:
            yield instead(name, "it"), TypeError, rf"{name} must be .*, got 'it'"
        if isinstance(right, (dict, list)):
            yield instead(name, type(right)()), ValueError, rf"{name} must have an entry, got "
        if isinstance(right, torch.Tensor):
            yield instead(name, right.tolist()), TypeError, rf"{name} must be a torch\.Tensor, got \["
            yield instead(name, right[:0]), ValueError, rf"{name} must have an entry, got shape \(0, "

    return [
        *not_a_path(lambda path: draw(path=path, **given)),
        *(case for name, right in given.items() for case in kinds(name, right)),
        *((instead(name, wrong), ValueError, message) for name, wrong, message in misfits),
    ]


class Own(models.Network):
    """A network of a user's own without a forward."""


CASES = {
    "models.TinyCNN": [
        *of_network(models.TinyCNN, 1),
        (lambda: models.TinyCNN(width=0), ValueError, r"width must be >= 1, got 0"),
        (lambda: models.TinyCNN(width=2.5), TypeError, r"width must be an int, got 2\.5"),
        (lambda: models.TinyCNN(width="16"), TypeError, r"width must be an int, got '16'"),
    ],
    "models.ResNet": [
        *of_network(models.ResNet, 4, width=0.05),
        *of_width(models.ResNet),
        (lambda: models.ResNet(depth=34), ValueError, r"depth must be one of 18, 50, 56, got 34"),
        (lambda: models.ResNet(depth="18"), TypeError, r"depth must be an int, got '18'"),
        (lambda: models.ResNet(depth=18.0), TypeError, r"depth must be an int, got 18\.0"),
        (lambda: models.ResNet(depth=[18]), TypeError, r"depth must be an int, got \[18\]"),
        (lambda: models.ResNet(stem="cifar10"), ValueError, r"stem must be .*, got 'cifar10': did you mean cifar\?"),
        (lambda: models.ResNet(stem=None), ValueError, r"stem must be cifar or imagenet, got None"),
        (lambda: models.ResNet(preactivation="no"), TypeError, r"preactivation must be True or False, got 'no'"),
    ],
    "models.DenseNet": [
        *of_network(models.DenseNet, 2, depth=10, growth=2),
        (lambda: models.DenseNet(depth=41), ValueError, r"depth must be 6 n \+ 4 .*, got 41"),
        (lambda: models.DenseNet(depth="40"), TypeError, r"depth must be an int, got '40'"),
        (lambda: models.DenseNet(growth=0), ValueError, r"growth must be >= 1, got 0"),
        (lambda: models.DenseNet(growth=1.5), TypeError, r"growth must be an int, got 1\.5"),
        (lambda: models.DenseNet(compression=0), ValueError, r"compression must be above 0 and at most 1, got 0"),
        (lambda: models.DenseNet(compression=NAN), ValueError, r"compression must be above 0 and at most 1, got nan"),
        (lambda: models.DenseNet(compression="half"), TypeError, r"compression must be a number, got 'half'"),
    ],
    "models.AudioCNN": [*of_network(models.AudioCNN, 6, width=0.02), *of_width(models.AudioCNN)],
    "models.WaveformCNN": [
        *of_network(models.WaveformCNN, 4, 1, width=0.02, length=64),
        *of_width(models.WaveformCNN),
        (lambda: models.WaveformCNN(ramp=0), ValueError, r"ramp must be > 0 and finite, got 0"),
        (lambda: models.WaveformCNN(ramp=INF, downsample="avg"), ValueError, r"ramp must be > 0 and finite, got inf"),
        (lambda: models.WaveformCNN(ramp="1/64"), TypeError, r"ramp must be a number, got '1/64'"),
        (lambda: models.WaveformCNN(length=0), ValueError, r"length must be >= 1, got 0"),
        (lambda: models.WaveformCNN(length=1.5), TypeError, r"length must be an int, got 1\.5"),
        (lambda: models.WaveformCNN(length="1 s"), TypeError, r"length must be an int, got '1 s'"),
        (lambda: models.WaveformCNN(downsample="blur"), ValueError, r"downsample must be another method than 'blur' for"),
    ],
    "models.Network": [
        *of_batch(TINY, 2),
        (lambda: Own()(X), NotImplementedError, r"Own must have a forward, from inputs to logits, got none: define it"),
    ],
    "models.ResidualBlock": [
        *of_downsample(residual, "options"),
        (lambda: residual(0), ValueError, r"in_channels must be >= 1, got 0"),
        (lambda: residual(4, 4), TypeError, r"channels must be a sequence of ints, got 4"),
        (lambda: residual(4, (4, 0)), ValueError, r"channels must be >= 1, got 0"),
        (lambda: residual(4, (4, 4.0)), TypeError, r"channels must be an int, got 4\.0"),
        (lambda: residual(4, (4,)), ValueError, r"kernels must have an entry for each of channels, 1, got 2"),
        (lambda: residual(4, (4, 4), 3), TypeError, r"kernels must be a sequence of ints, got 3"),
        (lambda: residual(4, (4, 4), "33"), TypeError, r"kernels must be a sequence of ints, got '33'"),
        (lambda: residual(4, (4, 4), (1, 1)), ValueError, r"kernels must be odd, with a 3 that .*, got \(1, 1\)"),
        (lambda: residual(4, (4, 4), (3, 2)), ValueError, r"kernels must be odd, with a 3 that .*, got \(3, 2\)"),
        (lambda: residual(preactivation=1), TypeError, r"preactivation must be True or False, got 1"),
        (lambda: residual(stride=0.5), ValueError, r"stride must be >= 1, got 0\.5"),
        (lambda: residual(stride=None, downsample="pool"), ValueError, r"downsample must be one of .*, got 'pool'"),
    ],
    "models.SpectrogramBlock": [
        *of_downsample(spectrogram),
        (lambda: spectrogram(0), ValueError, r"in_channels must be >= 1, got 0"),
        (lambda: spectrogram(4, "4"), TypeError, r"channels must be an int, got '4'"),
        (lambda: spectrogram(4, 4, 0), ValueError, r"stride must be >= 1, got 0"),
        (lambda: spectrogram(4, 4, (2, 2, 2)), ValueError, r"stride must have 2 entries .*, got 3: \(2, 2, 2\)"),
        (lambda: spectrogram(4, 4, None), TypeError, r"stride must be a number or a sequence of 2 numbers, got None"),
    ],
    "models.DenseLayer": [
        (lambda: models.DenseLayer(0, 12), ValueError, r"in_channels must be >= 1, got 0"),
        (lambda: models.DenseLayer("24", 12), TypeError, r"in_channels must be an int, got '24'"),
        (lambda: models.DenseLayer(24, -1), ValueError, r"growth must be >= 1, got -1"),
        (lambda: models.DenseLayer(24, 1.5), TypeError, r"growth must be an int, got 1\.5"),
        (lambda: models.DenseLayer(24, NAN), TypeError, r"growth must be an int, got nan"),
    ],
    "models.Heads": [
        (lambda: models.Heads(0, {"a": 2}), ValueError, r"in_features must be >= 1, got 0"),
        (lambda: models.Heads("4", {"a": 2}), TypeError, r"in_features must be an int, got '4'"),
        (lambda: models.Heads(4, 2), TypeError, r"num_classes must be a mapping from tasks to numbers of .*, got 2"),
        (lambda: models.Heads(4, ["a"]), TypeError, r"num_classes must be a mapping from tasks .*, got \['a'\]"),
        (lambda: models.Heads(4, {}), ValueError, r"num_classes must have names without dots, one at least, .*\{\}"),
        (lambda: models.Heads(4, {"a.b": 2}), ValueError, r"num_classes must have names without dots, .*'a\.b'"),
        (lambda: models.Heads(4, {"keys": 2}), ValueError, r"num_classes must have names .*none of nn\.ModuleDict's"),
        (lambda: models.Heads(4, {"a": 0}), ValueError, r"num_classes of a must be >= 1, got 0"),
    ],
    "models.make_downsample": [
        *of_downsample(lambda downsample="diffstride", options=None: models.make_downsample(downsample, 2, **options or {}), "options")[:4],
        (lambda: models.make_downsample("conv", 0), ValueError, r"stride must be >= 1, got 0"),
        (lambda: models.make_downsample("conv", "2"), TypeError, r"stride must be a number or .*, got '2'"),
        (lambda: models.make_downsample("conv", (2, 2, 2)), ValueError, r"stride must have 2 entries .*, got 3"),
        (lambda: models.make_downsample("max", 2.5), ValueError, r"stride must be an integer .*'max', got 2\.5"),
        (lambda: models.make_downsample(2, "conv"), TypeError, r"stride must be a number or .*, got 'conv'"),
        (lambda: models.make_downsample("conv", 2, 3), ValueError, r"ndim must be 1 or 2, got 3"),
        (lambda: models.make_downsample("conv", 2, "2"), TypeError, r"ndim must be an int, got '2'"),
        (lambda: models.make_downsample("blur", 2, 1), ValueError, r"downsample must be another method than 'blur'"),
        (lambda: models.make_downsample(lambda stride: None, 2), TypeError, r"downsample\(2\) must be a torch.* got None"),
    ],
    "plotting.stride_trajectories": [
        *of_picture(plotting.stride_trajectories, {"rows": [ROW], "title": "T"}),
        (lambda: plotting.stride_trajectories([ROW._asdict()], "it"), TypeError, r"rows\[0\] must be a StrideRow, got \{"),
        (lambda: plotting.stride_trajectories([ROW._replace(step=None)], "it"), TypeError, r"rows\[0\]\.step must be an int"),
    ],
    "plotting.trajectories_to_bands": of_picture(
        plotting.trajectories_to_bands,
        {"runs": {"a": [ROW]}, "limits": {"height": (2.0, INF)}},
        ("limits", {"width": (2.0, 4.0)}, r"down in runs\['a'\] must have 'width', got 'height'"),
        ("limits", {"height": (2.0,)}, r"limits\['height'\] must have 2 entries, got 1: \(2\.0,\)"),
        ("runs", {"a": []}, r"runs\['a'\] must have an entry, got \[\]"),
    ),
    "plotting.explored_strides": of_picture(
        plotting.explored_strides,
        {"panels": {"a": EXPLORED}, "seen": 2.5, "axis": "width"},
        ("panels", {"a": EXPLORED._replace(used=([0, 1], [2.0]))}, r"steps and strides must be equally many, got 2, 1"),
        ("panels", {"a": EXPLORED._replace(used=([], []))}, r"strides must have an entry, got \[\]"),
    ),
    "plotting.windows_over_spectrum": of_picture(
        plotting.windows_over_spectrum,
        {"spectra": {"width": CURVE}, "windows": {"width": {"a": CURVE}}, "bands": {"width": 1}},
        ("windows", {"height": {"a": CURVE}}, r"windows must have 'width', got 'height'"),
        ("bands", {"height": 1}, r"bands must have 'width', got 'height'"),
        ("spectra", {"width": PICTURE}, r"spectra along the width must have the shape \[N\], got \(4, 4\)"),
        ("windows", {"width": {"a": CURVE[1:]}}, r"frequencies of spectra and of a along the width .*many, got 4, 3"),
        ("windows", {"width": {"a": PICTURE}}, r"a along the width must have the shape \[N\], got \(4, 4\)"),
    ),
    "plotting.before_and_after": of_picture(
        plotting.before_and_after,
        {"pictures": {"in": PICTURE}},
        ("pictures", {"in": PICTURE[None]}, r"in must have the shape \[H, W\], got \(1, 4, 4\)"),
    ),
    "plotting.layer_steps": of_picture(
        plotting.layer_steps,
        {**dict.fromkeys(("image", "spectrum", "window", "kept", "output"), PICTURE), "title": "T"},
        ("image", CURVE, r"image must have the shape \[H, W\], got \(4,\)"),
        ("output", PICTURE[None, None], r"output must have the shape \[H, W\], got \(1, 1, 4, 4\)"),
        ("image", PICTURE.expand(2, 4, 4), r"image must have the shape \[3, H, W\], got \(2, 4, 4\)"),
        ("spectrum", 0 * PICTURE, r"spectrum must have amplitudes above 0, all finite, got a largest one of 0"),
        ("kept", CURVE, r"kept must have the shape \[H, W\], got \(4,\)"),
        ("window", PICTURE[:2], r"window must have the shape \(4, 4\) of spectrum, got \(2, 4\)"),
    ),
    "plotting.layer_windows": of_picture(
        plotting.layer_windows,
        {"windows": [("a", "width", [1.0], [1.0], [1.0])], "title": "T"},
        ("windows", [("a", "width", [1.0], [1.0], [1.0, 0])], r"windows of a along width must be equally many, got 1, 1"),
        ("windows", [("a", "width", [1.0], [1.0])], r"windows\[0\] must have 5 entries, got 4"),
        ("windows", [("a", "width", [], [], [])], r"spectrum of a along width must have an entry, got \[\]"),
    ),
    "plotting.resolution_staircases": of_picture(
        plotting.resolution_staircases,
        {"runs": {"a": [("in", [8], [8])]}, "axes_names": ["time"], "title": "T"},
        ("runs", {"a": []}, r"runs\['a'\] must have an entry, got \[\]"),
        ("runs", {"a": [("in", [8], [8, 8])]}, r"axes_names and sizes of in in runs\['a'\] must be equally many, got 1, 1, 2"),
        ("axes_names", ["height", "width"], r"axes_names and sizes of in in runs\['a'\] must be equally many, got 2, 1, 1"),
    ),
    "plotting.trajectories_of_runs": of_picture(
        plotting.trajectories_of_runs,
        {"runs": {"a": [[ROW]]}, "title": "T", "legend": "L"},
        ("runs", {"a": [[]]}, r"rows of runs must have an entry, got \[\]"),
    ),
    "plotting.learned_strides": of_picture(
        plotting.learned_strides,
        {"strides": {"a": [({"down": [2.0]}, {"down": [3.0]})]}, "axes_names": ["time"], "title": "T", "legend": "L"},
        ("strides", {"a": [({}, {"down": [3.0]})]}, r"initial strides in strides\['a'\] must have 'down', got none"),
        ("strides", {"a": [({}, {})]}, r"layers of strides must have an entry, got \[\]"),
        ("axes_names", ["height", "width"], r"axes_names and strides of down .* must be equally many, got 2, 1, 1"),
    ),
    "plotting.striding_factors": of_picture(
        plotting.striding_factors,
        {"factors": {"a": (8.0, [4.0])}, "title": "T", "legend": "L"},
        ("factors", {"a": (8.0, [])}, r"learned in factors\['a'\] must have an entry, got \[\]"),
        ("factors", {"a": (8.0, [0.0])}, r"factors\['a'\] must be > 0 and finite, got 8, 0"),
        ("factors", {"a": (NAN, [1.0])}, r"factors\['a'\] must be > 0 and finite, got nan, 1"),
    ),
    "plotting.pareto": of_picture(
        plotting.pareto,
        {"panels": {"MACs": {"a": [POINT]}}, "title": "T"},
        ("panels", {"MACs": {}}, r"panels\['MACs'\] must have an entry, got \{\}"),
        ("panels", {"MACs": {"a": []}}, r"panels\['MACs'\]\['a'\] must have an entry, got \[\]"),
        ("panels", {"MACs": {"a": [POINT._replace(low=2.0)]}}, r"points must have 0 < low <= cost <= high .* Point\("),
        ("panels", {"MACs": {"a": [POINT._replace(deviation=NAN)]}}, r"points must .* a deviation >= 0, got Point\("),
    ),
    "plotting.frontier": [
        (lambda: plotting.frontier(None), TypeError, r"points must be a sequence, got None"),
        (lambda: plotting.frontier("points"), TypeError, r"points must be a sequence, got 'points'"),
        (lambda: plotting.frontier([]), ValueError, r"points must have an entry, got \[\]"),
        (lambda: plotting.frontier([tuple(POINT)]), TypeError, r"points\[0\] must be a Point, got \('label', "),
        (lambda: plotting.frontier([POINT._replace(cost="1")]), TypeError, r"points\[0\]\.cost must be a number, got '1'"),
    ],
    "plotting.accuracy_bars": of_picture(
        plotting.accuracy_bars,
        {"panels": {"multi": {"conv": {"digit": SPREAD}}}, "title": "T"},
        ("panels", {"multi": {}}, r"panels\['multi'\] must have an entry, got \{\}"),
        ("panels", {"multi": {"conv": {}}}, r"panels\['multi'\]\['conv'\] must have an entry, got \{\}"),
    ),
    "plotting.cutoff_points": of_picture(
        plotting.cutoff_points,
        {"panels": {"Hz": {"exact": {"digit": SPREAD}}}, "title": "T"},
        ("panels", {"Hz": {}}, r"panels\['Hz'\] must have an entry, got \{\}"),
        ("panels", {"Hz": {"exact": {}}}, r"panels\['Hz'\]\['exact'\] must have an entry, got \{\}"),
    ),
    "plotting.spectrograms": of_picture(
        plotting.spectrograms,
        {"pictures": {"before": PICTURE, "after": PICTURE}, "extent": (1.0, 64.0), "title": "T"},
        ("pictures", {"before": PICTURE}, r"pictures must be pairs of before and after, got 1"),
        ("pictures", {"before": PICTURE, "after": CURVE}, r"after must have the shape \[T, F\], got \(4,\)"),
        ("extent", (1.0, 2.0, 3.0), r"extent must have 2 entries, got 3: \(1\.0, 2\.0, 3\.0\)"),
    ),
    "export.to_onnx": [
        *of_file(lambda model, path, metadata=None: export.to_onnx(model, X, path, metadata)),
        (lambda folder: export.to_onnx(LEARNED, None, folder / "it"), UserError, r"example_inputs must have a floating-"),
        (lambda folder: export.to_onnx(LEARNED, X[:, :2], folder / "it"), UserError, r"model must run on the example inp"),
        (lambda folder: export.to_onnx(LEARNED, X.double(), folder / "it"), UserError, r"example_inputs must be float32"),
        (lambda folder: export.to_onnx(LEARNED, X.int(), folder / "it"), UserError, r"must have a floating-point tensor"),
    ],
    "export.to_safetensors": of_file(export.to_safetensors),
    "export.onnx_session": [
        (lambda: export.onnx_session(None), TypeError, r"path must be a path, got None"),
        (lambda: export.onnx_session(LEARNED), TypeError, r"path must be a path, got the module Sequential"),
        (lambda: export.onnx_session(""), ValueError, r"path must be the name of a file, got ''"),
        (lambda folder: export.onnx_session(folder / "none"), UserError, r"path must be an ONNX file, got .*none: there is no such file"),
        (lambda folder: export.onnx_session(folder / "file"), UserError, r"path must be an ONNX file, got .*file: "),
        (lambda folder: export.onnx_session(folder), UserError, r"path must be an ONNX file, got .*folder: there is no such file"),
    ],
    "tracking.axis_names": [
        (lambda: tracking.axis_names(4), ValueError, r"ndim must be 1, 2 or 3, got 4"),
        (lambda: tracking.axis_names(0), ValueError, r"ndim must be 1, 2 or 3, got 0"),
        (lambda: tracking.axis_names(2.0), TypeError, r"ndim must be an int, got 2\.0"),
        (lambda: tracking.axis_names((8, 8)), TypeError, r"ndim must be an int, got \(8, 8\)"),
        (lambda: tracking.axis_names(2, "xy"), TypeError, r"names of axes must be a sequence of texts, got 'xy'"),
        (lambda: tracking.axis_names(2, (0, 1)), TypeError, r"names of axes must be a sequence of texts, got \(0, 1\)"),
        (lambda: tracking.axis_names(2, None), TypeError, r"names of axes must be a sequence of texts, got None"),
    ],
    "tracking.InputSizes": not_a_model(tracking.InputSizes),
    "tracking.stride_rows": [
        *not_a_model(lambda model: rows_of(model, 0, {})),
        (lambda: rows_of(LEARNED, -1, {}), ValueError, r"step must be >= 0, got -1"),
        (lambda: rows_of(LEARNED, "1", {}), TypeError, r"step must be an int, got '1'"),
        (lambda: rows_of(LEARNED, 0, (8, 8)), TypeError, r"input_sizes must be a mapping from layers .*, got \(8, 8\)"),
        (lambda: rows_of(LEARNED, 0, None), TypeError, r"input_sizes must be .*, as InputSizes\.sizes is, got None"),
        (lambda: rows_of(LEARNED, 0, {"1": (8, 0)}), ValueError, r"size must be >= 1, got 0"),
        (lambda: rows_of(LEARNED, 0, {"1": (8, 8, 8)}), ValueError, r"size must have 2 entries .*, got 3: \(8, 8, 8\)"),
        (lambda: rows_of(LEARNED, 0, {"1": (8, 8)}, "hw"), TypeError, r"names of axes must be a sequence .*, got 'hw'"),
    ],
    "tracking.append_rows": [
        *not_a_path(lambda path: tracking.append_rows(path, [ROW])),
        (lambda folder: tracking.append_rows(folder / "full", [ROW]), UserError, r"cannot open .*full \(Is a directory\)"),
        *not_rows(lambda rows, path: tracking.append_rows(path, rows)),
    ],
    "tracking.read_rows": [
        (lambda: tracking.read_rows(None), TypeError, r"path must be a path, got None"),
        (lambda: tracking.read_rows([ROW]), TypeError, r"path must be a path, got \[StrideRow\("),
        (lambda: tracking.read_rows(""), ValueError, r"path must be the name of a file, got ''"),
        (lambda folder: tracking.read_rows(folder), UserError, r"cannot open .*folder \(Is a directory\): check the path"),
        (lambda: tracking.read_rows(__file__), UserError, r"py is damaged, it has rows that are no strides: remove it"),
        (lambda: tracking.read_rows(torch._C.__file__), UserError, r" is damaged, no table can be read from it: remove"),
    ],
    "tracking.read_history": [
        (lambda: tracking.read_history(None), TypeError, r"path must be a path, got None"),
        (lambda: tracking.read_history([ROW]), TypeError, r"path must be a path, got \[StrideRow\("),
        (lambda: tracking.read_history(""), ValueError, r"path must be the name of a file, got ''"),
        (lambda folder: tracking.read_history(folder), UserError, r"cannot open .*folder \(Is a directory\): check the"),
        (lambda: tracking.read_history(torch._C.__file__), UserError, r" is damaged, no table can be read from it: "),
    ],
    "tracking.whole_number": [
        (lambda: tracking.whole_number(""), ValueError, r"a whole number must have 1 to 18 digits, got ''"),
        (lambda: tracking.whole_number("²"), ValueError, r"a whole number must have 1 to 18 digits, got '²'"),
        (lambda: tracking.whole_number("-1"), ValueError, r"a whole number must have 1 to 18 digits, got '-1'"),
        (lambda: tracking.whole_number("1_0"), ValueError, r"a whole number must have 1 to 18 digits, got '1_0'"),
        (lambda: tracking.whole_number("9" * 19), ValueError, r"a whole number must have 1 to 18 digits, got '9{19}'"),
        (lambda: tracking.whole_number(None), ValueError, r"a whole number must have 1 to 18 digits, got None"),
    ],
    "tracking.read_dicts": [
        (lambda: tracking.read_dicts(None), TypeError, r"path must be a path, got None"),
        (lambda: tracking.read_dicts([ROW]), TypeError, r"path must be a path, got \[StrideRow\("),
        (lambda: tracking.read_dicts(""), ValueError, r"path must be the name of a file, got ''"),
        (lambda folder: tracking.read_dicts(folder / "full"), UserError, r"cannot open .*full \(Is a directory\): check"),
        (lambda: tracking.read_dicts(torch._C.__file__), UserError, r" is damaged, no table can be read from it: remove"),
    ],
    "tracking.drop_rows_from": [
        (lambda: tracking.drop_rows_from(None, 0), TypeError, r"path must be a path, got None"),
        (lambda folder: tracking.drop_rows_from(folder, 0), UserError, r"cannot open .*folder \(Is a directory\): check"),
        (lambda: tracking.drop_rows_from(__file__, 0), UserError, r"py is damaged, its rows have no step: remove it"),
        (lambda: tracking.drop_rows_from("it", -1), ValueError, r"step must be >= 0, got -1"),
        (lambda: tracking.drop_rows_from("it", "3"), TypeError, r"step must be an int, got '3'"),
        (lambda: tracking.drop_rows_from(3, "it"), TypeError, r"step must be an int, got 'it'"),
    ],
    "cost.evaluation": not_a_model(lambda model: entered(evaluation(model))),
    "cost.count_macs": [
        *not_a_model(lambda model: count_macs(model, X)),
        (lambda: count_macs(LEARNED), UserError, r"model must run on the example inputs, Sequential raised TypeError: "),
        (lambda: count_macs(LEARNED, (2, 3, 8, 8)), UserError, r"model must run on the example inputs, .* TypeError: "),
        (lambda: count_macs(LEARNED, X[:, :2]), UserError, r"model must run .*to have 3 channels, but got 2 channels"),
        (lambda: count_macs(LEARNED, X, X), UserError, r"model must run on the example inputs, .* but 3 were given"),
        (lambda: count_macs(TINY, X[:, :2]), UserError, r"model must run on .*: input must have 3 channels, got shape"),
    ],
}  # fmt: skip


def offered():
    """What the rooms offer and test_wrong_input.py has not; where nothing is taken, nothing can be wrong."""
    found = public((*core.ROOMS, *ROOMS))
    return {name: value for name, value in found.items() if name not in core.CASES and takes_something(value)}


def takes_something(value):
    return bool(inspect.signature(value).parameters)


@pytest.mark.parametrize("name", offered())
def test_every_public_function_has_cases(name):
    assert len({message for _, _, message in CASES.get(name, [])}) >= 5, (
        f"{name} needs five kinds of wrong input in CASES"
    )


def test_cases_are_of_public_functions():
    assert CASES.keys() <= offered().keys()


ALL = [(name, *case) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("call", "error", "message"), [case[1:] for case in ALL], ids=[f"{c[0]}: {c[3]}" for c in ALL])
def test_one_line_that_names_the_cure_before_random_numbers_are_drawn(call, error, message, tmp_path):
    before = torch.get_rng_state()
    refuses(call, error, message, tmp_path, MODELS)
    assert torch.equal(torch.get_rng_state(), before)
