"""Write weights and strides as a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffstride._files import check_output_path
from diffstride.errors import UsageError
from diffstride.export._require import _require, _texts


def to_safetensors(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write the model's `state_dict` as a safetensors file: weights and strides as they are, nothing to be executed.

    It is read back into a model that is built (or converted, see `Plan`) in the same way:

        from safetensors.torch import load_file
        model.load_state_dict(load_file("model.safetensors"))

    What has several names in the model, as a stride that layers share, is written under each of them, so that
    `load_state_dict` finds them all; the model that reads them shares them if it was built so.

    Args:
        model: any module; it is left as it is.
        path: of the file; what is there is replaced, and left alone where something fails.
        metadata: texts by name to put into the file; `safetensors.safe_open(path, "pt").metadata()` has them.

    Returns:
        The path.

    Raises:
        UsageError: a missing package, no folder to write to, a state that is not made of dense tensors of common types.
    """
    require_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = check_output_path(path)
    texts = _texts(metadata)
    state: dict[str, Any] = getattr(model, "_orig_mod", model).state_dict()  # which torch.compile wraps
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise UsageError(f"the model's state must be dense tensors for safetensors, got another thing in {name}")
    # The format knows neither strides in memory nor two names of one tensor.
    own = {name: value.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, value in state.items()}
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        save_file(own, unfinished, texts)
        unfinished.replace(path)
    except (OSError, SafetensorError) as cause:
        raise UsageError(f"cannot write {path} ({cause}): give another path") from cause
    except KeyError as cause:
        raise UsageError(f"the model's state must be of types that safetensors knows, got {cause.args[0]}") from cause
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def require_safetensors() -> None:
    """Name the cure where the package is missing."""
    _require("safetensors", "safetensors")
