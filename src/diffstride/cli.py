"""The `diffstride` command: finds the command, prints a user's mistake in one line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from diffstride import __version__

# Name, module that has it, function, what it does.
COMMANDS = {
    "fit": ("diffstride.training.fit", "fit", "train one network; its run folder keeps everything"),
    "demo": (
        "diffstride.studies.demo",
        "demo",
        "strided convolution, spectral pooling and DiffStride on planted bands",
    ),
}

USAGE = "usage: diffstride [--help] [--version] COMMAND ...\n\ncommands:\n" + "".join(
    f"  {name:6s} {text}\n" for name, (_, _, text) in COMMANDS.items()
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0 when done, 2 for a user's mistake, 1 where the work failed."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else ""
    if name == "--version":
        print(f"diffstride {__version__}")
        return 0
    if name in ("", "-h", "--help"):
        print(USAGE + "\n`diffstride COMMAND --help` says more.", file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; there are {', '.join(COMMANDS)}", 2)
    module, function, _ = COMMANDS[name]
    try:
        command = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        return _fail(f"{name} needs the package {error.name}: pip install 'diffstride[train]'", 2)
    from diffstride._check import UserError
    from diffstride.training import TrainingError

    try:
        command(arguments[1:])
    except UserError as error:
        return _fail(str(error), 2)
    except TrainingError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"diffstride: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
