"""The exceptions that the library raises on purpose. Each message is one line that names the cause and the cure."""

from __future__ import annotations


class DiffStrideError(Exception):
    """The base class of the library's own errors."""


class UsageError(DiffStrideError, ValueError):
    """The caller made a mistake that one line can explain. The command line prints it and exits with status 2."""


class RunError(DiffStrideError, RuntimeError):
    """A run cannot continue. The message names the step and what to try. The command line exits with status 1."""


class InterruptedRunError(RunError):
    """The user interrupted the run."""
