"""Run a model with symbols in place of sizes: which module runs at which size, and what follows from sizes."""

from diffstride.tracing.evaluate import evaluator
from diffstride.tracing.inputs import ExampleInputs, on_examples
from diffstride.tracing.restore import preserved
from diffstride.tracing.run import Forward, run
from diffstride.tracing.session import Call, Relation, Session, TraceError, Work, described, expression, shape

__all__ = [
    "Call",
    "ExampleInputs",
    "Forward",
    "Relation",
    "Session",
    "TraceError",
    "Work",
    "described",
    "evaluator",
    "expression",
    "on_examples",
    "preserved",
    "run",
    "shape",
]
