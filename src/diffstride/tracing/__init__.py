"""Run a model with symbols in place of sizes: which module runs at which size, and what follows from sizes."""

from diffstride.tracing.evaluate import evaluator
from diffstride.tracing.inputs import ExampleInputs, on_examples
from diffstride.tracing.restore import preserved
from diffstride.tracing.run import Forward, run
from diffstride.tracing.session import Call, Session, TraceError, described, expression, shape

__all__ = [
    "Call",
    "ExampleInputs",
    "Forward",
    "Session",
    "TraceError",
    "described",
    "evaluator",
    "expression",
    "on_examples",
    "preserved",
    "run",
    "shape",
]
