"""The example inputs of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffstride._text import one_line
from diffstride.errors import RunError, UsageError


class ExampleInputs:
    """The arguments of a model's call, for models that take positional and keyword arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, example_inputs: Any) -> ExampleInputs:
        """Return the arguments given as a tuple or list (positional), a mapping (keywords) or one other value.

        Raises:
            UsageError: they are a shape.
        """
        is_sequence = isinstance(example_inputs, (tuple, list))
        if is_sequence and example_inputs and all(type(size) is int for size in example_inputs):
            shape = ", ".join(map(str, example_inputs))
            raise UsageError(f"example_inputs must be tensors, got the shape ({shape}): try torch.zeros({shape})")
        if isinstance(example_inputs, ExampleInputs):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            return cls(**example_inputs)
        return cls(*example_inputs) if is_sequence else cls(example_inputs)

    @property
    def examples(self) -> int:
        """The number of examples: the first size of all tensors if it is the same, otherwise 1."""
        sizes = {len(own) for own in (*self.args, *self.kwargs.values()) if isinstance(own, Tensor) and own.ndim > 1}
        return sizes.pop() if len(sizes) == 1 else 1

    def call(self, model: nn.Module) -> Any:
        """Call the model with the arguments."""
        return model(*self.args, **self.kwargs)


@contextmanager
def on_examples(model: nn.Module) -> Iterator[None]:
    """Turn an error of the model into one line that blames the example inputs."""
    try:
        yield
    except (UsageError, RunError):
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"model must run on the example inputs, {type(model).__name__} raised {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
