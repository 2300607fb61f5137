"""A network of any origin: built by a function, with learned strides inserted or converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

import diffstride
from diffstride import _validation
from diffstride.experiments.models.downsample import imported
from diffstride.experiments.models.network import Network


class Built(Network):
    """Any model, built by a function or class, with learned strides.

    With `torchvision.models.resnet18`, `timm.create_model` or a class of your own:

        class_path: Built
        init_args:
          function: timm.create_model
          arguments: {model_name: resnet18, num_classes: 10}
          input_shape: [3, 64, 64]

    An argument `{function: ..., arguments: ...}` is built first, as the configuration of a `transformers` model is. Of
    an output with `logits`, these are taken.

    Args:
        function: path of the function, with dots.
        arguments: its keyword arguments.
        strides: "insert": strides of 1 are added and the function of trained weights stays (`diffstride.insert`).
            "convert": the strides of the model are learned (`diffstride.convert`). "none": the model stays as it is.
        input_shape: shape of one input, such as [3, 32, 32]. It is needed for "insert" and "convert".
        options: options of `insert` or `convert`.

    Raises:
        ValueError: a path that leads nowhere, or a model that cannot be converted.
    """

    def __init__(
        self,
        function: str,
        arguments: dict[str, Any] | None = None,
        strides: Literal["insert", "convert", "none"] = "insert",
        input_shape: Sequence[int] = (),
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = _build({"function": function, "arguments": arguments or {}})
        _validation.one_of("strides", strides, ("insert", "convert", "none"))
        if strides != "none":
            if not input_shape:
                raise ValueError("input_shape must be the shape of one input, such as [3, 32, 32], got none")
            change = diffstride.insert if strides == "insert" else diffstride.convert
            change(self.model, torch.zeros(2, *input_shape), **(options or {}))

    def forward(self, x: Tensor) -> Any:
        """Return the logits."""
        output = self.model(x)
        return getattr(output, "logits", output)


def _build(given: Any) -> Any:
    """Return what a mapping with `function` and `arguments` describes; anything else as it is."""
    if not isinstance(given, Mapping) or "function" not in given:
        return given
    arguments = {key: _build(value) for key, value in given.get("arguments", {}).items()}
    return imported("function", given["function"])(**arguments)
