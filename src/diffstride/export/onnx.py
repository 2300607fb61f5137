"""Write a frozen model as an ONNX file."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from diffstride._files import atomic_path, check_output_path, describe_os_error
from diffstride._logging import log_level
from diffstride._text import one_line
from diffstride.errors import RunError, UsageError
from diffstride.export._outputs import Arguments, largest_error, require, run, tensors
from diffstride.export.freeze import copy_without_observers, freeze
from diffstride.tracing import ExampleInputs

if TYPE_CHECKING:
    import onnx
    import onnxruntime  # type: ignore[import-untyped]

_TOLERANCE = 1e-4


class OnnxFile(NamedTuple):
    """The file that `to_onnx` has written."""

    path: Path
    bytes: int
    error: float
    """The largest difference from the eager model on random inputs, over the largest output."""


def to_onnx(
    model: nn.Module, example_inputs: Any, path: str | Path, metadata: Mapping[str, str] | None = None
) -> OnnxFile:
    """Freeze the model and write it as one checked ONNX file with a dynamic batch axis.

    The batch is the first axis of every tensor that is as long as that of the first floating-point one. onnxruntime
    runs the file on random inputs of one sample and of another number, and the outputs are compared with the model's.

    Args:
        model: any module; it is frozen first, see `freeze`.
        example_inputs: as in `freeze`, batched.
        path: the file. An existing one is replaced if all succeeds, and else not changed.
        metadata: texts by name to put into the file; onnxruntime has them in
            `session.get_modelmeta().custom_metadata_map`.

    Raises:
        UsageError: a package is missing, the file cannot be written, inputs have no batch axis, or `freeze` raises.
        RunError: PyTorch cannot export the model, or outputs of the file differ from the model's by 1e-4.
    """
    require("ONNX", "onnx", "onnxscript", "onnxruntime")
    import onnx

    path = check_output_path(path)
    given = ExampleInputs.of(example_inputs)
    arguments = (given.args, given.kwargs)
    batch = _batch(arguments)
    if dtypes := {str(t.dtype) for t in tensors(arguments) if t.is_floating_point()} - {"torch.float32"}:
        raise UsageError(f"example_inputs must be float32 for ONNX, got {', '.join(dtypes)}: use model.float()")
    several = max(2, batch)  # torch.export takes a batch of one sample for a constant
    frozen, eager = freeze(model, example_inputs), copy_without_observers(model)
    program = _program(frozen, arguments, batch, several)
    onnx.helper.set_model_props(program, dict(metadata or {}))
    try:
        with atomic_path(path) as unfinished:
            onnx.save(program, unfinished)
            onnx.checker.check_model(unfinished, full_check=True)
            drawn = [_random(_repeated(arguments, batch, n)) for n in (1, several + 1)]
            error = max(_error(unfinished, eager, each) for each in drawn)
            if not error <= _TOLERANCE:
                raise RunError(
                    f"{path} was not written: onnxruntime's outputs differ from the model's by {error:.1e}, "
                    f"relative, where {_TOLERANCE:.0e} are allowed"
                )
    except OSError as cause:
        raise UsageError(describe_os_error(cause)) from cause
    return OnnxFile(path, path.stat().st_size, error)


def onnx_session(path: str | Path) -> onnxruntime.InferenceSession:
    """Open a file for the CPU, with as many threads as torch has.

    Raises:
        UsageError: a package is missing, or the path is not an ONNX file.
    """
    require("ONNX", "onnxruntime")
    import onnxruntime

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"path must be an ONNX file, got {path}: there is no such file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base
        raise UsageError(f"path must be an ONNX file, got {path}: {one_line(error)}") from error


def _repeated(arguments: Arguments, batch: int, to: int) -> Arguments:
    """Return the arguments with `to` samples in place of `batch`."""

    def repeat(tensor: Tensor) -> Tensor:
        return tensor[torch.arange(to, device=tensor.device) % batch] if _batched(tensor, batch) else tensor

    return tree_map_only(Tensor, repeat, arguments)  # type: ignore[no-any-return]


def _program(model: nn.Module, arguments: Arguments, batch: int, several: int) -> onnx.ModelProto:
    """Export the model with `several` samples, with the first axes named."""
    args, kwargs = _repeated(arguments, batch, several)
    dim = torch.export.Dim("batch")
    shapes = tree_map(
        lambda leaf: {0: dim} if _batched(leaf, batch) else None,
        dict(inspect.signature(model.forward).bind(*arguments[0], **arguments[1]).arguments),
    )
    first = [_batched(tensor, batch) for tensor in tensors(arguments)].index(True)
    named = tuple({0: "batch"} if i == first else None for i in range(len(tensors(arguments))))
    try:
        with _quiet():
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
            program = torch.onnx.export(exported, dynamic_shapes=named, dynamo=True, verbose=False)
    except Exception as error:  # of many types, with pages of advice for developers of exporters
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        raise RunError(f"PyTorch cannot export this model with a free batch size: {_first_line(cause)}") from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces, longer than all the rest
    return proto


_CHATTER = (
    "torch.onnx._internal.exporter._registration",  # that there is no torchvision
    "torch.onnx._internal.exporter._core",  # that an output is None
    "torch.fx.experimental.symbolic_shapes",
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages of the exporters to their developers."""
    unheard = io.StringIO()
    with (
        warnings.catch_warnings(),
        log_level(_CHATTER, logging.ERROR),
        contextlib.redirect_stdout(unheard),
        contextlib.redirect_stderr(unheard),
    ):
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        yield


def _error(path: Path, model: nn.Module, arguments: Arguments) -> float:
    """Return the largest relative error of the file's outputs against the eager model's."""
    given = [leaf.detach().cpu().numpy() for leaf in tensors(arguments)]
    try:
        session = onnx_session(path)
        found = session.run(None, {to.name: value for to, value in zip(session.get_inputs(), given, strict=True)})
    except Exception as error:  # onnxruntime's errors have no common base
        raise RunError(f"onnxruntime cannot run this model: {_first_line(error.__cause__ or error)}") from error
    largest = largest_error([torch.from_numpy(output) for output in found], tensors(run(model, arguments)))
    if largest is None:
        raise RunError("onnxruntime's outputs have other shapes than the model's")
    return largest


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _batch(arguments: Arguments) -> int:
    """Return the number of samples, the length of the first floating-point tensor's first axis."""
    for tensor in tensors(arguments):
        if tensor.is_floating_point() and tensor.ndim > 0 and len(tensor) > 0:
            return len(tensor)
    raise UsageError("example_inputs must have a floating-point tensor with a batch axis, got none")


def _batched(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch


def _random(arguments: Arguments) -> Arguments:
    """Return the arguments with floating-point numbers drawn again; others may only have certain values."""
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)

    return tree_map_only(Tensor, draw, arguments)  # type: ignore[no-any-return]
