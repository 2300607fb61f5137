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
from torch import nn
from torch.utils._pytree import tree_map

from diffstride._files import check_output_path
from diffstride._text import one_line
from diffstride.errors import RunError, UsageError

if TYPE_CHECKING:
    import onnx
    import onnxruntime  # type: ignore[import-untyped]
from diffstride.export._require import _require, _texts
from diffstride.export.freeze import (
    Arguments,
    _arguments,
    _batch,
    _batched,
    _copy,
    _freeze,
    _random,
    _relative,
    _run,
    _same_shapes,
    _tensors,
)

_ONNX_TO = 1e-4


class OnnxFile(NamedTuple):
    """What `to_onnx` has written."""

    path: Path
    bytes: int
    error: float
    """The largest difference from the eager model on random inputs, over the largest output."""


def to_onnx(
    model: nn.Module, example_inputs: Any, path: str | Path, metadata: Mapping[str, str] | None = None
) -> OnnxFile:
    """Freeze the model and write it as one ONNX file with a dynamic batch axis, checked before it takes its place.

    The first axis of every tensor that is as long as that of the first floating-point one is the batch. The file is run
    by onnxruntime on random inputs of one sample and of another number, and compared with the eager model.

    Args:
        model: any module; frozen first, see `freeze`.
        example_inputs: as in `freeze`, batched.
        path: of the file; what is there is replaced, and left alone where something fails.
        metadata: texts by name to put into the file; onnxruntime has them in
            `session.get_modelmeta().custom_metadata_map`.

    Raises:
        UsageError: a missing package, no folder to write to, inputs without a batch axis; all that `freeze` raises.
        RunError: a model that PyTorch cannot export, or a file that gives other numbers than the model (1e-4).
    """
    require_onnx()
    import onnx

    path = check_output_path(path)
    texts = _texts(metadata)
    given = _arguments(example_inputs)
    batch = _batch(given)
    if dtypes := {str(t.dtype) for t in _tensors(given) if t.is_floating_point()} - {"torch.float32"}:
        raise UsageError(f"example_inputs must be float32 for ONNX, got {', '.join(dtypes)}: use model.float()")
    several = max(2, batch)  # torch.export takes a batch of one sample for a constant
    frozen = _freeze(model, given)
    eager = _copy(model)
    program = _onnx_program(frozen, given, batch, several)
    onnx.helper.set_model_props(program, texts)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        onnx.save(program, unfinished)
        onnx.checker.check_model(unfinished, full_check=True)
        error = max(_onnx_error(unfinished, eager, _random(_repeated(given, batch, n))) for n in (1, several + 1))
        if not error <= _ONNX_TO:
            raise RunError(
                f"{path} was not written: onnxruntime's outputs differ from the model's by {error:.1e}, "
                f"relative, where {_ONNX_TO:.0e} are allowed"
            )
        unfinished.replace(path)
    except OSError as cause:
        raise UsageError(f"cannot write {path} ({cause.strerror}): give another path") from cause
    finally:
        unfinished.unlink(missing_ok=True)
    return OnnxFile(path, path.stat().st_size, error)


def require_onnx() -> None:
    """Name the cure where a package of the extra `export` is missing."""
    _require("ONNX", "onnx", "onnxscript", "onnxruntime")


def onnx_session(path: str | Path) -> onnxruntime.InferenceSession:
    """The file, ready to run on the CPU with as many threads as torch has.

    Raises:
        UsageError: a missing package, a file that is not there, or is something else.
    """
    _require("ONNX", "onnxruntime")
    import onnxruntime

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"path must be an ONNX file, got {path}: there is no such file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds have no common one
        raise UsageError(f"path must be an ONNX file, got {path}: {one_line(error)}") from error


def _repeated(arguments: Arguments, batch: int, to: int) -> Arguments:
    """The same with `to` samples in place of `batch`."""

    def repeat(leaf: Any) -> Any:
        return leaf[torch.arange(to, device=leaf.device) % batch] if _batched(leaf, batch) else leaf

    repeated: Arguments = tree_map(repeat, arguments)
    return repeated


def _onnx_program(model: nn.Module, arguments: Arguments, batch: int, several: int) -> onnx.ModelProto:
    """The model, exported with `several` samples, with its first axes named."""
    args, kwargs = _repeated(arguments, batch, several)
    dim = torch.export.Dim("batch")
    shapes = tree_map(
        lambda leaf: {0: dim} if _batched(leaf, batch) else None,
        dict(inspect.signature(model.forward).bind(*arguments[0], **arguments[1]).arguments),
    )
    first = [_batched(tensor, batch) for tensor in _tensors(arguments)].index(True)
    named = tuple({0: "batch"} if i == first else None for i in range(len(_tensors(arguments))))
    try:
        with _quiet():
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
            program = torch.onnx.export(exported, dynamic_shapes=named, dynamo=True, verbose=False)
    except Exception as error:  # they have many kinds, with pages of advice to people who write exporters
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        message = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise RunError(f"PyTorch cannot export this model with a free batch size: {message}") from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # where in whose files it came from, longer than all the rest
    return proto


_CHATTER = (
    "torch.onnx._internal.exporter._registration",  # that there is no torchvision
    "torch.onnx._internal.exporter._core",  # that an output is None
    "torch.fx.experimental.symbolic_shapes",
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say to their makers."""
    loggers = [logging.getLogger(name) for name in _CHATTER]
    levels = [logger.level for logger in loggers]
    unheard = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _onnx_error(path: Path, model: nn.Module, arguments: Arguments) -> float:
    """The largest relative difference between the file's outputs and the eager model's."""
    given = [leaf.detach().cpu().numpy() for leaf in _tensors(arguments)]
    try:
        session = onnx_session(path)
        found = session.run(None, {to.name: value for to, value in zip(session.get_inputs(), given, strict=True)})
    except Exception as error:  # onnxruntime's own kinds have no common one
        message = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise RunError(f"onnxruntime cannot run this model: {message}") from error
    outputs, expected = [torch.from_numpy(output) for output in found], _tensors(_run(model, arguments))
    if not _same_shapes(outputs, expected):
        raise RunError("onnxruntime's outputs have other shapes than the model's")
    pairs = zip(outputs, expected, strict=True)
    return max((_relative(a, b) for a, b in pairs if a.is_floating_point()), default=0.0)
