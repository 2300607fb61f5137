"""The example inputs of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from diffstride._text import one_line
from diffstride.errors import RunError, UsageError

if TYPE_CHECKING:
    import sympy

    Expr: TypeAlias = sympy.Expr


class ExampleInputs:
    """The arguments of a model's call, for models that take positional and keyword arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, example_inputs: Any) -> ExampleInputs:
        """A tensor or other value is the one argument, a tuple or list positional ones, a mapping keyword ones."""
        if isinstance(example_inputs, ExampleInputs):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            return cls(**example_inputs)
        if isinstance(example_inputs, (tuple, list)):
            return cls(*example_inputs)
        return cls(example_inputs)

    def call(self, model: nn.Module) -> Any:
        """What the model makes of them."""
        return model(*self.args, **self.kwargs)


@contextmanager
def on_examples(model: nn.Module) -> Iterator[None]:
    """What the model raises inside, in one line of the one who gave the inputs."""
    try:
        yield
    except (UsageError, RunError):
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"model must run on the example inputs, {type(model).__name__} raised {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
