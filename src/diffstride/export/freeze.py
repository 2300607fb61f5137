"""Freeze learned strides: a new module of plain torch parts at one input size."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from diffstride import functional
from diffstride._text import one_line
from diffstride.backends import dense_matrix, headroom
from diffstride.errors import UsageError
from diffstride.export._outputs import Arguments, largest_error, run, tensors
from diffstride.export.long_axis import LONGEST, LongAxis
from diffstride.geometry import AXIS_NAMES, Axis
from diffstride.nn._fused import Schedule, make_schedule
from diffstride.nn.attach import CHILDREN, Placement, attached, is_attachment
from diffstride.nn.conv import DiffStrideConvNd
from diffstride.nn.diffstride import DiffStrideNd
from diffstride.nn.lengths import OutputLengths
from diffstride.nn.resize import ResizeTo
from diffstride.nn.spectral import SpectralPoolNd
from diffstride.tracing import ExampleInputs, on_examples

MAX_ENTRIES = 1 << 20
"""The largest number of entries of one matrix. Operators that would have more become products with small matrices."""

_IDENTITY_TO = 1e-6


def freeze(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Return a copy of the model with its strides fixed, in evaluation mode, made of plain torch parts.

    With a fixed stride, a layer is one constant matrix per axis: `y = P_h x P_w^T`. In the copy, every `DiffStride` and
    `SpectralPool` is a `torch.fx.GraphModule` of matrix products. Every `DiffStrideConv` is an `nn.Sequential` of an
    `nn.Conv` and such products before and after it, in the order of the layer. The matrices are buffers named `length`,
    `height`, `width`, `depth`. An axis whose matrix is the identity (to 1e-6) has none. Where a matrix would have more
    than a million entries, as on waveforms, small matrices take its place (`diffstride.export.long_axis`).

    The result takes inputs of the examples' spatial sizes and dtype, of any batch size. `torch.export`,
    `torch.compile(fullgraph=True)`, `torch.onnx.export` (see `to_onnx`) and quantization work with it. Shared modules
    and parameters stay shared, and hooks of the user stay.

    The model is not changed, nor is torch's random state. Its code runs twice without gradients: once to find the size
    and dtype at which each layer works, and once in the result, which must give the same output.

    Args:
        model: any module, also one without learned strides.
        example_inputs: a tensor, a tuple or list of positional arguments, a mapping of keyword arguments, or
            `diffstride.ExampleInputs(*args, **kwargs)` for both.

    Returns:
        A module with the model's structure. A layer that the examples do not reach raises when it is called.

    Raises:
        UsageError: an axis has more than 65,536 samples; a layer sees maps of several sizes or dtypes; or the model's
            code computes something else with plain modules.
    """
    given = ExampleInputs.of(example_inputs)
    arguments = (given.args, given.kwargs)
    with on_examples(model):
        uses, expected = _observe(copy_without_observers(model), arguments)
    frozen = copy_without_observers(model, attached_only=True)
    longest = max((n for tensor in tensors(arguments) for n in tensor.shape), default=1)
    for module in frozen.modules():
        for value in vars(module).values():
            if isinstance(value, OutputLengths):
                value.freeze(longest)  # which asks the layers
    layers = _layers(frozen)
    behind = {id(layer): attached(layer) for _, layer in layers}  # such as a resizing to a constant size
    fixed = {id(layer): _fixed(name, layer, uses[name]) for name, layer in layers}
    for layer, child in behind.items():
        if child is not None:
            fixed[layer] = nn.Sequential(fixed[layer], fixed[id(child)]).eval()
    for module in frozen.modules():
        for name, child in module._modules.items():
            module._modules[name] = fixed.get(id(child), child)
    frozen = fixed.get(id(frozen), frozen)
    for module in frozen.modules():
        _call_attached_plainly(module)
    _check_same(frozen, arguments, expected)
    return frozen


class _Use(NamedTuple):
    """The sizes, dtype and device of a layer's maps."""

    spatial: tuple[int, ...]
    new_sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def copy_without_observers(model: nn.Module, attached_only: bool = False) -> nn.Module:
    """Copy a model in evaluation mode without the library's hooks that only observe.

    Hooks of `diffstride.nn` are part of the forward pass and stay; with `attached_only`, only those of attached layers.
    """
    with _DetachingCopies():
        copied = copy.deepcopy(getattr(model, "_orig_mod", model)).eval()  # which torch.compile wraps
    for module in copied.modules():
        for hooks, *options in _hooks(module):
            for key, hook in list(hooks.items()):
                ours = _is_of(hook, "diffstride") and (attached_only or not _is_of(hook, "diffstride.nn"))
                if ours and not is_attachment(hook):
                    for registry in (hooks, *options):
                        registry.pop(key, None)
    return copied


class _DetachingCopies(TorchFunctionMode):
    """A mode in which `copy.deepcopy` detaches tensors that autograd has made, which torch refuses to copy.

    Modules have such tensors as plain attributes, such as the weight of an old `weight_norm` or of a pruned layer.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call: Callable[..., Any] = func
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return call(*args, **(kwargs or {}))
        detached, memo = args[0].detach(), args[1]
        copied = call(detached, memo)
        del memo[id(detached)]  # another tensor may get this address
        return copied


def _hooks(module: nn.Module) -> Iterator[tuple[dict[Any, Any], ...]]:
    """Yield the module's forward hooks, then its pre-hooks, each with the registries of their options."""
    yield module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called
    yield module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs


def _is_of(hook: Any, package: str) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{getattr(hook, '__module__', None)}.".startswith(f"{package}.")


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers that become plain, each once."""
    named: Iterator[tuple[str, nn.Module]] = model.named_modules()
    return [(name, module) for name, module in named if isinstance(module, tuple(_HANDLERS))]


def _observe(model: nn.Module, arguments: Arguments) -> tuple[dict[str, set[_Use]], Any]:
    """Return how each layer is used and the model's output. Hooks remain in the model."""
    uses: dict[str, set[_Use]] = {}

    def note(name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        (x,) = (*args, *kwargs.values())
        spatial, new_sizes = (tuple(t.shape[-layer.ndim :]) for t in (x, output))
        uses[name].add(_Use(spatial, new_sizes, output.dtype, output.device))

    for name, layer in _layers(model):
        uses[name] = set()
        layer.register_forward_hook(functools.partial(note, name), prepend=True, with_kwargs=True)
    return uses, run(model, arguments)


def _fixed(name: str, layer: nn.Module, uses: set[_Use]) -> nn.Module:
    """Return the module that replaces the layer, with the layer's hooks."""
    name = name or type(layer).__name__
    if len(uses) > 1:
        sizes = " and ".join(sorted(f"{use.spatial} of {use.dtype}" for use in uses))
        raise UsageError(
            f"{name} must see maps of one size and dtype to be frozen, got {sizes}: use one layer for each "
            "(they may share the stride: b.stride = a.stride)"
        )
    if not uses:
        return _out_of_reach(name)
    _compute_weights(layer)
    handler = next(handler for kind, handler in _HANDLERS.items() if isinstance(layer, kind))
    fixed = handler(name, layer, *uses)
    for hooks, *_ in _hooks(layer):
        for key in [key for key, hook in hooks.items() if is_attachment(hook)]:
            del hooks[key]
    if any(hooks for hooks, *_ in _hooks(layer)):
        if isinstance(fixed, fx.GraphModule):
            fixed = nn.Sequential(fixed)  # a graph forgets its hooks when it is copied
        for target, source in zip(_hooks(fixed), _hooks(layer), strict=True):
            for to, of in zip(target, source, strict=True):
                to.update(of)
    return fixed.eval()


def _compute_weights(layer: nn.Module) -> None:
    """Compute the weights of old reparametrizations and pruning once, and remove their hooks.

    The hooks need parameters of the layer, which the plain parts do not have.
    """
    from torch.nn.utils.prune import BasePruningMethod
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    for key, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod | SpectralNorm | WeightNorm):
            hook(layer, ())
            del layer._forward_pre_hooks[key]


def _out_of_reach(name: str) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch._assert, (False, f"{name} was frozen with example inputs that do not reach it"))
    graph.output(x)
    return fx.GraphModule(nn.Module(), graph, "OutOfReach")


def _downsampling(name: str, layer: DiffStrideNd, use: _Use) -> nn.Module:
    axes = layer.schedule(use.spatial, use.new_sizes).after
    return _products(name, use, use.spatial, axes, layer.raw_strides) or _copying()


def _resizing(name: str, layer: SpectralPoolNd | ResizeTo, use: _Use) -> nn.Module:
    axes = functional.resize_axes(use.spatial, use.new_sizes, layer.basis, layer.norm)
    return _products(name, use, use.spatial, axes) or _copying()


def _convolving(name: str, layer: DiffStrideConvNd, use: _Use) -> nn.Module:
    """Return the products and the convolution of the layer's schedule."""
    schedule, strides = layer.schedule(use.spatial, use.new_sizes), layer.raw_strides
    if any(axis is not None and _is_long(axis) for axis in schedule.before):  # taps are for dense operators
        schedule = make_schedule(layer.convolution, layer.options, use.spatial, use.new_sizes, fused_axes=0)
    before = _products(name, use, use.spatial, schedule.before, strides, scaled=True)
    halved = 0 if before is None or use.dtype != torch.float16 else len(before._buffers)
    convolve, pad = _convolution(layer, schedule, 2.0**halved)
    between = schedule.convolved_sizes(use.spatial, use.new_sizes)
    parts = {
        "before": before,
        "pad": pad,
        "convolution": convolve,
        "after": _products(name, use, between, schedule.after, strides),
    }
    fixed = nn.Sequential(OrderedDict((part, module) for part, module in parts.items() if module is not None))
    # The attributes that code around a convolution may read; not registered a second time.
    fixed.__dict__ |= {"weight": convolve.weight, "bias": convolve.bias, "stride": (1,) * layer.ndim}
    for attribute in ("in_channels", "out_channels", "kernel_size", "padding", "dilation", "groups", "padding_mode"):
        fixed.__dict__[attribute] = getattr(layer, attribute)
    return fixed


def _convolution(layer: DiffStrideConvNd, schedule: Schedule, scale: float) -> tuple[Any, nn.Module | None]:
    """Return the convolution as it runs, its weight times `scale`, and its padding, if that is a module of its own."""
    convolution = schedule.convolution
    assert convolution is not None
    sides, padding, pad = convolution.padding, layer.padding, None
    if convolution.padding_mode == "zeros":  # with the others the convolution comes first, as it is
        padding = tuple(left for left, _ in sides)
        if any(left != right for left, right in sides):  # which a convolution alone cannot do
            padding = 0  # type: ignore[assignment]
            pads: Any = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
            pad = pads[layer.ndim - 1](tuple(side for pair in reversed(sides) for side in pair), 0.0)
    kinds: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    module = kinds[layer.ndim - 1](
        layer.in_channels,
        layer.out_channels,
        convolution.kernel,
        stride=convolution.stride,
        padding=padding,
        dilation=convolution.dilation,
        groups=convolution.groups,
        bias=layer.bias is not None,
        padding_mode=convolution.padding_mode,
        device="meta",
    )
    module.weight = _parameter(layer.weight if scale == 1 else layer.weight * scale)
    if layer.bias is not None:
        gain = schedule.bias_gain
        module.bias = _parameter(layer.bias if gain == 1 else layer.bias * gain)
    return module, pad


def _parameter(value: Tensor) -> nn.Parameter:
    """Return `value` as a parameter; one that is a parameter already stays shared."""
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())


def _products(
    name: str,
    use: _Use,
    sizes: Sequence[int],
    axes: Sequence[Axis | None],
    strides: Sequence[float] | None = None,
    scaled: bool = False,
) -> fx.GraphModule | None:
    """Return the products with the constant matrices of the axes; None where all of these are identities.

    Args:
        name: the layer's name, for errors.
        use: the dtype and device of the matrices.
        sizes: the sizes before the products.
        axes: the operators of the axes; None leaves an axis as it is.
        strides: the raw strides of the axes; None where they are fixed.
        scaled: leave a float16 result scaled, see `diffstride.backends.headroom`.
    """
    labels, raw = AXIS_NAMES[len(axes)], [None] * len(axes) if strides is None else strides
    found = {
        label: made
        for label, axis, stride in zip(labels, axes, raw, strict=True)
        if axis is not None and (made := _operator(f"{name}'s {label}", axis, stride)) is not None
    }
    if not found:
        return None
    products = FixedStrides(sizes)
    factors = headroom(len(found), scaled) if use.dtype == torch.float16 else [1.0] * len(found)
    for (label, made), factor in zip(found.items(), factors, strict=True):
        if isinstance(made, LongAxis):
            products.add_module(label, made.scaled(factor).to(use.device, use.dtype))
        else:
            matrix = (made * factor).to(use.dtype).to(use.device)
            products.register_buffer(label, matrix.mT.contiguous() if label == labels[-1] else matrix)
    graph = fx.Tracer().trace(products)
    for node in graph.nodes:
        node.type = None  # as text, like all annotations here, it could not be pickled
    return fx.GraphModule(products, graph, "FixedStrides")


class FixedStrides(nn.Module):
    """Products with the constant matrices of axes, which are buffers by the axes' names."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the matrices."""
        ndim = len(self.sizes)
        for i, label in enumerate(AXIS_NAMES[ndim]):
            matrix = getattr(self, label, None)
            if isinstance(matrix, LongAxis):
                x = matrix(x) if i == ndim - 1 else matrix(x.transpose(i - ndim, -1)).transpose(i - ndim, -1)
            elif matrix is not None and i == ndim - 1:
                x = torch.matmul(x, matrix)
            elif matrix is not None and i == ndim - 2:
                x = torch.matmul(matrix, x)
            elif matrix is not None:
                x = torch.unflatten(torch.matmul(matrix, x.flatten(i - ndim + 1)), -1, self.sizes[i + 1 :])
        return x


def _operator(name: str, axis: Axis, stride: float | None) -> Tensor | LongAxis | None:
    """Return the matrix of an axis in float64, or the small ones of a long axis; None where it is the identity."""
    like = torch.empty((), dtype=torch.float64, device="cpu")
    weights = axis.weights(None if stride is None else axis.clamp(stride), like)
    if axis.taps is None and axis.n == axis.size and (weights - 1).abs().max() <= _IDENTITY_TO:
        return None
    if not _is_long(axis):
        matrix = dense_matrix(axis, weights)
        rows, columns = matrix.shape
        identity = rows == columns and (matrix - torch.eye(rows).to(matrix)).abs().max() <= _IDENTITY_TO
        return None if identity else matrix
    if (longest := max(axis.n, axis.size)) > LONGEST:
        raise UsageError(f"{name} must have at most {LONGEST} samples to be frozen, got {longest}")
    return LongAxis(axis, weights)


def _is_long(axis: Axis) -> bool:
    return axis.rows * axis.columns > MAX_ENTRIES


def _copying() -> fx.GraphModule:
    """Return the identity as a copy, since the next module may work in place."""
    graph = fx.Graph()
    graph.output(graph.call_method("clone", (graph.placeholder("x"),)))
    return fx.GraphModule(nn.Module(), graph, "FixedStrides")


# By type of layer, the function that makes its replacement from its name, the layer, and its use.
_HANDLERS: dict[type[nn.Module], Callable[[str, Any, _Use], nn.Module]] = {
    DiffStrideNd: _downsampling,
    DiffStrideConvNd: _convolving,
    SpectralPoolNd: _resizing,
    ResizeTo: _resizing,
}


def _call_attached_plainly(module: nn.Module) -> None:
    """Replace hooks that call attached layers by graphs of `torch.fx`, which need no code of this library."""
    registries: dict[Placement, dict[Any, Any]]
    registries = {"before": module._forward_pre_hooks, "after": module._forward_hooks}
    for placement, hooks in registries.items():
        child = CHILDREN[placement]
        if not any(map(is_attachment, hooks.values())):
            continue
        graph = fx.Graph()
        if placement == "before":
            _, args = (graph.placeholder(name) for name in ("module", "args"))
            x = graph.call_function(operator.getitem, (args, 0))
        else:
            *_, x = (graph.placeholder(name) for name in ("module", "args", "output"))
        graph.output(graph.call_module(child, (x,)))
        plain = fx.GraphModule({child: module._modules[child]}, graph, "Attached")
        # A key made by torch is a number, which another process might use again.
        renamed = [(child, plain) if is_attachment(hook) else (key, hook) for key, hook in hooks.items()]
        hooks.clear()
        hooks.update(renamed)


def _check_same(frozen: nn.Module, arguments: Arguments, expected: Any) -> None:
    """Check that the model's own code computes the same with the plain parts as with our layers."""
    cause = "with fixed strides (its code may ask for a layer's class, or call a layer's forward itself)"
    try:
        found = tensors(run(copy.deepcopy(frozen), arguments))
    except Exception as error:  # whatever the model's code raises
        raise UsageError(f"the model cannot run {cause}: {type(error).__name__}: {one_line(error)}") from error
    difference = largest_error(found, tensors(expected))
    if difference is None:
        raise UsageError(f"the model gives outputs of other shapes {cause}")
    epsilon = max((torch.finfo(t.dtype).eps for t in found if t.is_floating_point()), default=0.0)
    if not difference <= math.sqrt(epsilon):
        raise UsageError(f"the model's outputs differ by {difference:.1e}, relative, {cause}")
