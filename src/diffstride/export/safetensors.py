"""Write weights and strides as a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffstride._files import atomic_path, check_output_path
from diffstride._text import one_line
from diffstride.errors import UsageError
from diffstride.export._outputs import require


def to_safetensors(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write the model's `state_dict`, weights and raw strides, as a safetensors file, which holds no code.

    Read it back into a model that is built (or converted, see `Plan`) in the same way:

        from safetensors.torch import load_file
        model.load_state_dict(load_file("model.safetensors"))

    A tensor with several names, such as a stride that layers share, is written under each of them.

    Args:
        model: any module; it is not changed.
        path: the file. An existing one is replaced if all succeeds, and else not changed.
        metadata: texts by name to put into the file; `safetensors.safe_open(path, "pt").metadata()` has them.

    Returns:
        The path.

    Raises:
        UsageError: a package is missing, the file cannot be written, or the state has other values than dense tensors.
    """
    require("safetensors", "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = check_output_path(path)
    state: dict[str, Any] = getattr(model, "_orig_mod", model).state_dict()  # which torch.compile wraps
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise UsageError(f"the model's state must be dense tensors for safetensors, got another type in {name}")
    # The format has neither strides in memory nor two names of one tensor.
    own = {name: value.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, value in state.items()}
    try:
        with atomic_path(path) as unfinished:
            save_file(own, unfinished, dict(metadata or {}))
    except (OSError, SafetensorError) as cause:
        raise UsageError(f"cannot write {path} ({one_line(cause)}): give another path") from cause
    except KeyError as cause:
        raise UsageError(f"the model's state must be of types that safetensors has, got {cause.args[0]}") from cause
    return path
