"""Random calls of the layers and functions against the naive sums of reference.py: sizes, values, gradients, state.

Call `index` of a `seed` is always the same, so a disagreement is one line that anyone can run again:
python -m tools.fuzz --seed 7 --only 123
"""

import argparse
import copy
import json
import math
import random
import sys
import time
import warnings
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import diffstride as ds
from diffstride import functional
from tests.helpers import reference

LAYERS = ("DiffStride", "DiffStrideConv", "SpectralPool")
FUNCTIONS = ("diffstride", "spectral_pool", "spectral_resize")
LEARNABLE = ("DiffStride", "DiffStrideConv", "diffstride")
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "expanded")
MODES = ("train", "eval", "inference")
LARGEST = {1: 40, 2: 28, 3: 9}  # samples of an axis, by the number of axes

# Relative to the largest that an element could be, all terms taken positive. Narrow dtypes round the matrix and the
# result of each axis, and what a convolution takes and gives, by half an epsilon each at most. Matrices are built in
# float64, where a short ramp magnifies the last bit of a stride.
TOLERANCE = {"float64": 1e-11, "float32": 2e-6, "bfloat16": 2 * 2**-7, "float16": 2 * 2**-10}
NARROW = ("bfloat16", "float16")


class Call(NamedTuple):
    """One call; all but the numbers in its tensors, which come from `seed` and `index` too."""

    seed: int
    index: int
    kind: str
    shape: tuple[int, ...]
    """`[B, C, *spatial]` or `[C, *spatial]`"""
    strides: tuple[float, ...]
    """One per axis, not clamped; of `spectral_resize` the sizes."""
    options: dict
    """The keyword arguments of `kind`."""
    dtype: str
    parameters: str
    """dtype of the layer, or of the tensor of strides"""
    layout: str = "contiguous"
    upstream: str = "contiguous"
    """layout of the gradient that comes back"""
    weights: str = "contiguous"
    """layout of a convolution's weight"""
    mode: str = "train"
    autocast: str | None = None
    compiled: str | None = None
    """backend of torch.compile"""
    size_offset: tuple[int, ...] | None = None
    stride_scale: tuple[float, ...] | None = None
    amplitude: float = 1.0

    @property
    def ndim(self):
        return len(self.strides)

    @property
    def spatial(self):
        return self.shape[-self.ndim :]

    @property
    def sizes(self):
        """The sizes that the resampling sees."""
        return convolved_sizes(self.spatial, self.options) if self.kind == "DiffStrideConv" else self.spatial

    @property
    def name(self):
        return f"{self.kind}{self.ndim}d" if self.kind in LAYERS else self.kind

    @property
    def computed_in(self):
        """The dtype of the result."""
        casts = self.autocast and self.kind == "DiffStrideConv" and self.dtype != "float64"
        return self.autocast if casts else self.dtype

    @property
    def command(self):
        return f"python -m tools.fuzz --seed {self.seed} --only {self.index}"


def draw(seed, index):
    r = random.Random(f"{seed} {index}")
    kind = r.choices(LAYERS + FUNCTIONS, (4, 4, 2, 2, 1, 2))[0]
    ndim = r.choices((1, 2, 3), (3, 4, 2))[0]
    spatial = [draw_size(r, ndim) for _ in range(ndim)]
    batch = [] if r.random() < 0.2 else [r.choices((0, 1, 2, 3), (1, 9, 9, 9))[0]]
    autocast = r.choice(NARROW) if r.random() < 0.2 else None
    dtype = r.choices(tuple(TOLERANCE), (4, 3, 2, 2))[0]
    channels = r.randint(1, 4)
    options = {"basis": r.choice(("dft", "dct")), "norm": r.choice(("forward", "ortho", "backward"))}
    options["backend"] = r.choice(("fft", "matmul", "auto"))
    if kind == "DiffStrideConv":
        options |= draw_convolution(r, spatial)
        channels *= options["groups"]
    parameters = dtype
    if autocast and kind == "DiffStrideConv" and dtype != "float64":
        parameters = "float32"
    elif kind in ("DiffStride", "diffstride"):
        parameters = r.choice((dtype, "float32", "float64"))
    call = Call(
        seed, index, kind, (*batch, channels, *spatial), (1.0,) * ndim, options, dtype, parameters,
        layout=r.choices(LAYOUTS, (4, 4, 1, 1, 1))[0],
        upstream=r.choices(LAYOUTS, (4, 2, 1, 1, 2))[0],
        weights=r.choice(LAYOUTS[:2]),
        mode=r.choices(MODES, (6, 1, 1))[0],
        autocast=autocast,
        compiled=r.choice(("eager", "aot_eager")) if kind != "diffstride" and r.random() < 0.015 else None,
        amplitude=r.choices((1.0, 1e-2, 30.0), (4, 1, 1))[0],
    )  # fmt: skip
    if kind == "spectral_resize":
        strides = [draw_size(r, ndim) if r.random() < 0.8 else n for n in spatial]
    elif kind in LEARNABLE:
        call = draw_window(r, call)
        strides = [draw_stride(r, n) for n in call.sizes]
    else:  # fixed strides are never clamped
        strides = [min(max(draw_stride(r, n), 1.0), float(n)) for n in call.sizes]
    if options.get("shared"):
        strides = strides[:1] * ndim
    return call._replace(strides=tuple(strides))


def draw_size(r, ndim):
    if ndim == 1 and r.random() < 0.03:
        return r.randint(250, 270)  # both sides of where "auto" takes FFTs
    return r.randint(1, 4) if r.random() < 0.25 else r.randint(5, LARGEST[ndim])


def draw_stride(r, size):
    ends = (1.0, 1.1, 1.6, 2.0, 2.6, 4.0, size / 4, size / 3, size / 2, float(size))
    beyond = (0.3, -2.0, size / 2 + 1e-3, size + 3.7, 1e4)
    where = r.random()
    if where < 0.3:
        return r.choice(ends)
    return r.choice(beyond) if where < 0.4 else r.uniform(1, max(1.0, size / 2))


def draw_window(r, call):
    """Draw the options of a learnable stride, in place, and what is set on the layer after its construction."""
    ndim = call.ndim
    longest = max(call.spatial)
    narrow = {call.dtype, call.autocast} & set(NARROW)  # whose range ends where a ramp is a step
    call.options.update(
        smoothness=r.choice((0.25, 0.5, 1.0, 1.3, 4.0, 7.3, longest, 2.5 * longest, 3e3, 0.25 if narrow else 1e-3)),
        window=r.choice(("outer", "inner", "hard")),
        bounds=r.choices(((1.0, None), (1.5, 3.0), (1.0, 2.0), (2.0, 2.0)), (6, 1, 1, 1))[0],
        size_multiple=r.choices((1, 2, 3, 8), (6, 1, 1, 1))[0],
    )
    if call.kind == "diffstride":
        if r.random() < 0.2:
            call.options["output_size"] = [r.randint(1, n + 2) for n in call.spatial]
        return call
    call.options["shared"] = r.random() < 0.2
    size_offset = tuple(r.randint(0, 2) for _ in range(ndim)) if r.random() < 0.15 else None
    # A graph multiplies in the stride's own precision.
    stride_scale = tuple(r.uniform(0.8, 1.25) for _ in range(ndim)) if not call.compiled and r.random() < 0.15 else None
    if stride_scale and call.options["shared"]:
        stride_scale = stride_scale[:1]
    return call._replace(size_offset=size_offset, stride_scale=stride_scale)


def draw_convolution(r, spatial):
    """Arguments of a convolution that fits."""
    while True:
        kernel = [r.randint(1, 4) for _ in spatial]
        dilation = [r.choices((1, 2, 3), (6, 2, 1))[0] for _ in spatial]
        mode = r.choices(("zeros", "reflect", "replicate", "circular"), (6, 1, 1, 1))[0]
        most = {"reflect": lambda n: n - 1, "circular": lambda n: n}.get(mode, lambda n: 4)
        padding = [r.randint(0, min(3, most(n))) for n in spatial]
        if mode == "zeros" and r.random() < 0.2:
            padding = r.choice(("same", "valid"))
        groups = r.choices((1, 2, 3), (4, 1, 1))[0]
        arguments = {
            "out_channels": groups * r.randint(1, 3), "kernel_size": kernel, "padding": padding, "dilation": dilation,
            "groups": groups, "bias": r.random() < 0.7, "padding_mode": mode,
        }  # fmt: skip
        if min(convolved_sizes(spatial, arguments)) >= 1:
            return arguments


def convolved_sizes(spatial, options):
    padded = [n + left + right for n, (left, right) in zip(spatial, sides(options), strict=True)]
    return tuple(n - d * (k - 1) for n, d, k in zip(padded, options["dilation"], options["kernel_size"], strict=True))


def sides(options):
    """Return the samples of padding before and after each axis."""
    taken = [d * (k - 1) for d, k in zip(options["dilation"], options["kernel_size"], strict=True)]
    if options["padding"] == "same":
        return [(t // 2, t - t // 2) for t in taken]
    return [(0, 0)] * len(taken) if options["padding"] == "valid" else [(p, p) for p in options["padding"]]


class Expected:
    """The expected result of a call at these strides: the naive matrix of each axis, and its slope."""

    def __init__(self, call, strides):
        self.strides = strides
        self.used, self.new_sizes, self.matrices, self.slopes, self.ranges = [], [], [], [], []
        for axis in range(call.ndim):
            self._add(call, axis)
        if call.kind == "DiffStrideConv":
            self.convolution = {key: call.options[key] for key in ("dilation", "groups", "padding_mode")}
            self.convolution["padding"] = sides(call.options)

    def _add(self, call, axis):
        options, size, stride = call.options, call.sizes[axis], self.strides[axis]
        basis, norm = options["basis"], options["norm"]
        if call.kind == "spectral_resize":
            new, weights = stride, [1.0] * size
        elif call.kind in LEARNABLE:
            lower, upper = options["bounds"]
            window = (options["smoothness"], options["window"])
            bounds = (basis, (lower, math.inf if upper is None else upper))
            larger = size + (call.size_offset[axis] if call.size_offset else 0)
            new = reference.output_size(
                larger, reference.clamped(larger, stride, *window, *bounds), *window, options["size_multiple"]
            )
            if "output_size" in options:
                new = options["output_size"][axis]
            used = reference.clamped(size, stride, *window, *bounds)
            weights = reference.mask(size, used, *window, basis)
            slopes = reference.mask_slope(size, used, *window, basis)
            self.used.append(used)
            self.slopes.append(reference.matrix(size, new, slopes, basis, norm))
            self.ranges.append(reference.stride_range(size, *window, *bounds))
        else:
            new, weights = reference.output_size(size, stride, 0), reference.mask(size, stride, 0, basis=basis)
        self.new_sizes.append(new)
        self.matrices.append(reference.matrix(size, new, weights, basis, norm))

    def values(self, x, weight=None, bias=None):
        return reference.along_axes(self.matrices, self._sampled(x, weight, bias))

    def gradients(self, upstream, x, weight=None, bias=None):
        """Return the gradients of the input, of the strides (one per axis), and of a convolution's weight and bias."""
        sampled = self._sampled(x, weight, bias)
        found = {"input": reference.along_axes([m.T for m in self.matrices], upstream)}
        if self.slopes:
            found["stride"] = np.array([self._of_stride(axis, upstream, sampled) for axis in range(len(self.slopes))])
        if weight is not None:
            found["input"], found["weight"], found["bias"] = reference.convolve_adjoint(
                x, weight, found["input"], **self.convolution
            )
        return found

    def _sampled(self, x, weight, bias):
        return x if weight is None else reference.convolve(x, weight, bias, **self.convolution)

    def _of_stride(self, axis, upstream, sampled):
        moved = [*self.matrices[:axis], self.slopes[axis], *self.matrices[axis + 1 :]]
        slope = np.sum(upstream * reference.along_axes(moved, sampled))
        return reference.inwards(slope, self.strides[axis], *self.ranges[axis])

    def magnitudes(self):
        """Return a copy with all terms positive. Its elements are the largest possible, by which errors are divided."""
        other = copy.copy(self)
        other.matrices, other.slopes = [list(map(np.abs, matrices)) for matrices in (self.matrices, self.slopes)]
        other.ranges = [(-math.inf, math.inf)] * len(self.ranges)
        return other


def check(call, device="cpu"):
    """Make the call; the worst errors of its values and gradients. Raises AssertionError where something is wrong."""
    # Strings seed alike in every process and version.
    generator = torch.Generator().manual_seed(random.Random(f"{call.seed} {call.index} numbers").getrandbits(63))
    x = lay_out(draw_tensor(call.shape, call.dtype, generator, device, call.amplitude), call.layout, call.ndim)
    function, learned = make(call, generator, device)
    learned = {"input": x} | learned
    before = {name: (t.detach().clone(), t._version) for name, t in learned.items()}
    numbers = {name: t.detach().double().cpu().numpy() for name, t in learned.items()}
    if x.ndim == call.ndim + 1:
        numbers["input"] = numbers["input"][None]
    raw = np.broadcast_to(numbers.pop("stride", call.strides), call.ndim)
    stride_scale = np.array(call.stride_scale if call.stride_scale and call.mode == "train" else 1.0)
    expected = Expected(call, (raw * stride_scale).tolist() if call.kind in LEARNABLE else call.strides)

    y = run(call, function, x)
    shape = (*call.shape[: -call.ndim], *expected.new_sizes)
    if call.kind == "DiffStrideConv":
        shape = (*shape[: -call.ndim - 1], call.options["out_channels"], *expected.new_sizes)
    assert tuple(y.shape) == shape, f"the shape is {tuple(y.shape)}, not {shape}"
    assert y.dtype == getattr(torch, call.computed_in), f"the dtype is {y.dtype}, not {call.computed_in}"
    assert y.device == x.device, f"the result is on {y.device}"
    memory_format = promised_format(call, x)
    assert memory_format is None or y.is_contiguous(memory_format=memory_format), f"the result is not {memory_format}"
    if call.kind in LAYERS and not call.stride_scale:
        assert function.output_size(call.spatial) == tuple(expected.new_sizes), "output_size"

    largest = expected.magnitudes()
    positive = {name: np.abs(values) for name, values in numbers.items()}
    arguments, positive_arguments = ([d.get(k) for k in ("input", "weight", "bias")] for d in (numbers, positive))
    error = compare("value", y, expected.values(*arguments), largest.values(*positive_arguments), call.computed_in)
    errors = {(call.computed_in, "values"): error}
    if call.mode == "train":
        upstream = lay_out(draw_tensor(shape, call.computed_in, generator, device), call.upstream, call.ndim)
        gradients = dict(zip(learned, torch.autograd.grad(y, list(learned.values()), upstream), strict=True))
        g = upstream.double().cpu().numpy().reshape(-1, *shape[-call.ndim - 1 :])
        wanted, scales = expected.gradients(g, *arguments), largest.gradients(np.abs(g), *positive_arguments)
        if call.compiled and on_a_kink(call, expected):  # a graph may take the other side
            del gradients["stride"]
        elif "stride" in gradients:
            for of in (wanted, scales):
                of["stride"] = of["stride"] * stride_scale
                if call.options.get("shared"):
                    of["stride"] = of["stride"].sum(keepdims=True)
        narrowest = max(call.computed_in, call.dtype, call.parameters, key=TOLERANCE.get)
        errors[narrowest, "gradients"] = max(
            compare(f"gradient of {name}", found, wanted[name], scales[name], narrowest)
            for name, found in gradients.items()
        )
    for name, (values, version) in before.items():
        assert learned[name]._version == version, f"{name} was written to"
        assert torch.equal(learned[name], values), f"{name} was changed"
    return errors


def draw_tensor(shape, dtype, generator, device, amplitude=1.0):
    return (amplitude * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, getattr(torch, dtype))


def lay_out(x, layout, ndim):
    """Return the values in other strides of memory; `expanded` repeats one of them."""
    if layout == "channels_last" and x.ndim == ndim + 2 and ndim > 1:
        return x.contiguous(memory_format=CHANNELS_LAST[ndim])
    if layout == "strided":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "expanded":
        return x[..., :1].expand(x.shape)
    return x.mT.contiguous().mT if layout == "transposed" else x


def make(call, generator, device):
    """Return the function to call, and the parameters to differentiate by."""
    parameters = getattr(torch, call.parameters)
    if call.kind in FUNCTIONS:
        function = getattr(ds if call.kind == "spectral_resize" else functional, call.kind)
        learned = {}
        if call.kind == "diffstride":
            learned["stride"] = torch.tensor(
                call.strides, dtype=parameters, device=device, requires_grad=call.mode == "train"
            )
        strides = learned.get("stride", call.strides)
        return (lambda x: function(x, strides, **call.options)), learned
    arguments = dict(call.options)
    if call.kind == "DiffStrideConv":
        arguments["in_channels"] = call.shape[-call.ndim - 1]
    if call.kind in LEARNABLE:
        arguments["stride"] = call.options["bounds"][0]
    else:
        arguments["stride"] = call.strides
    layer = getattr(ds, call.name)(**arguments).to(device, parameters).train(call.mode == "train")
    learned = dict(layer.named_parameters())
    with torch.no_grad():
        for name, parameter in learned.items():
            if name == "stride":
                parameter.copy_(torch.tensor(call.strides[: len(parameter)]))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if call.weights == "channels_last" and call.ndim > 1:
        layer.to(memory_format=CHANNELS_LAST[call.ndim])
    if call.size_offset:
        layer.size_offset = call.size_offset
    if call.stride_scale:
        layer.set_stride_scale(call.stride_scale)
    return layer, learned


CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def run(call, function, x):
    with ExitStack() as stack:
        if call.mode == "train":
            x.requires_grad_()
        elif call.mode == "inference":
            stack.enter_context(torch.inference_mode())
        if call.autocast:
            stack.enter_context(torch.autocast(x.device.type, dtype=getattr(torch, call.autocast)))
        if call.compiled:
            stack.enter_context(warnings.catch_warnings())  # torch's own, while it compiles
            warnings.simplefilter("ignore")
            torch._dynamo.reset()
            function = torch.compile(function, backend=call.compiled, fullgraph=True)
        return function(x)


def promised_format(call, x):
    """Return the memory format of the result; None where that of a convolution's weights decides."""
    if call.ndim > 1 and x.ndim == call.ndim + 2 and not x.is_contiguous():
        last = CHANNELS_LAST[call.ndim]
        if x.is_contiguous(memory_format=last):
            return last
    asked = call.kind == "DiffStrideConv" and call.ndim > 1 and call.weights == "channels_last"
    return None if asked else torch.contiguous_format


def on_a_kink(call, expected):
    """Return whether rounding decides on which side of the end of a ramp a frequency lies."""
    if not expected.slopes:
        return False
    smoothness, window = call.options["smoothness"], call.options["window"]
    used = zip(call.sizes, expected.used, strict=True)
    ends = [
        2 * end
        for size, stride in used
        for end in (*reference.ramp(size, stride, smoothness, window), size / (2 * stride))
        if math.isfinite(end)
    ]
    return any(0 < abs(end - round(end)) < 1e-9 for end in ends)


class Convolutions(TorchDispatchMode):
    """Keeps inputs and results of PyTorch's convolutions: some are wrong, see docs/results/versions.md."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **kwargs or {})
        if "conv" in str(func):
            self.done.append((func, *tree_map_only(torch.Tensor, torch.clone, (args, kwargs or {}, results))))
        return results

    def wrong(self):
        """Yield the operations whose results differ from those in float64."""
        for func, args, kwargs, results in self.done:
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.double, (args, kwargs))
            pairs = zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True)
            for found, right in ((a, b) for a, b in pairs if isinstance(b, torch.Tensor) and b.numel()):
                error = (found.double() - right).abs().max() / (right.abs().max() or 1.0)
                if not error <= 4 * TOLERANCE[str(found.dtype).removeprefix("torch.")]:
                    yield f"{func} is off by {error:.2g}"


def faults_of_torch(call, device):
    """Return the errors of PyTorch's own convolutions in a call that has disagreed."""
    with Convolutions() as convolutions, suppress(Exception):
        check(call, device)
    return list(convolutions.wrong())


def compare(what, found, expected, largest, dtype):
    """Return the largest difference, relative to the largest that an element might be."""
    found = found.detach().double().cpu().numpy().reshape(np.shape(expected))
    assert np.isfinite(found).all(), f"{what} is not finite"
    difference, scale = np.abs(found - expected).max(initial=0), np.max(largest, initial=0)
    # Where waves are 0 at every sample, all that the naive sums have is their own rounding.
    error = float(difference / scale) if scale > 1e-15 else float(difference)
    limit = TOLERANCE[dtype] * (8 if what == "gradient of bias" else 1)  # PyTorch adds all its terms in a row
    assert error <= limit, f"{what} is off by {error:.2g} of the largest possible, more than {limit:.2g} of {dtype}"
    return error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000, help="how many (default: 20,000)")
    parser.add_argument("--seed", type=int, help="of all calls (default: a new one, printed)")
    parser.add_argument("--first", type=int, default=0, help="index of the first call (default: 0)")
    parser.add_argument("--only", type=int, metavar="INDEX", help="this call alone, with its traceback")
    parser.add_argument("--device", default="cpu", help="where the calls run (default: cpu)")
    parser.add_argument("--out", type=Path, help="JSON file for the counts and the worst errors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if options.only is not None:
        call = draw(options.seed or 0, options.only)
        print(call)
        print(check(call, options.device))
        return 0
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"{options.calls} calls from seed {seed}", flush=True)
    report = fuzz(seed, range(options.first, options.first + options.calls), options.device)
    if options.out:
        from diffstride.experiments.provenance import provenance

        device = torch.device(options.device)
        options.out.write_text(json.dumps(provenance(device) | {"device": device.type} | report, indent=1) + "\n")
    print(f"{len(report['disagreements'])} disagreements in {report['seconds']} s; worst errors {report['worst']}")
    print(f"{len(report['faults_of_torch'])} more where PyTorch's own convolution is wrong")
    return 1 if report["disagreements"] else 0


def fuzz(seed, indices, device="cpu"):
    """All calls of these indices: how many of what kind, the worst error of each dtype, and what disagreed."""
    start = time.monotonic()
    counts = {key: Counter() for key in COUNTED}
    worst, disagreements, of_torch = {dtype: {} for dtype in TOLERANCE}, [], []
    for done, index in enumerate(indices, 1):
        call = draw(seed, index)
        for key, count in counts.items():
            count[str(getattr(call, key))] += 1
        try:
            errors = check(call, device)
        except Exception as error:  # a crash is a disagreement too
            line = f"{call.command}  # {type(error).__name__}: {error}".splitlines()[0]
            faults = faults_of_torch(call, device)
            (of_torch if faults else disagreements).append(": ".join([line, *faults[:1]]))
            print(f"{line}\n  {call}", *faults, sep="\n  PyTorch's ", flush=True)
            continue
        for (dtype, what), error in errors.items():
            worst[dtype][what] = max(worst[dtype].get(what, 0.0), error)
        if done % 500 == 0:
            print(f"{done} calls, {time.monotonic() - start:.0f} s", flush=True)
    return {
        "seed": seed,
        "first": indices.start,
        "calls": len(indices),
        "seconds": round(time.monotonic() - start),
        "tolerance": TOLERANCE,
        "worst": worst,
        "counts": {key: dict(sorted(count.items())) for key, count in counts.items()},
        "disagreements": disagreements,
        "faults_of_torch": of_torch,
    }


COUNTED = ("name", "dtype", "layout", "mode", "autocast", "compiled")


if __name__ == "__main__":
    sys.exit(main())
