"""The entry point `diffstride`: run a command, and print a user's mistake in one line."""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from diffstride import __version__
from diffstride._files import DISK_ERRORS, PATH_ERRORS, describe_os_error
from diffstride._text import did_you_mean, printable
from diffstride.errors import RunError, UsageError

COMMANDS = {
    "fit": "train one network; its run folder keeps everything",
    "compress": "make a trained network cheaper: insert strides, learn them under a budget, fine-tune",
    "sensitivity": "measure how the loss of a trained network changes with each stride",
    "study": "train the networks of a table or a figure, here or on a cluster",
    "report": "make a web page of a run or of a study",
    "demo": "compare three ways to downsample on generated images, in about half a minute",
    "bench": "measure speed and memory against the alternatives",
    "predict": "classify image or audio files with a trained network",
    "export": "write a trained network as an ONNX or a safetensors file",
}

USAGE = f"""usage: diffstride [--help] [--version] COMMAND ...

commands:
{"".join(f"  {name:11s} {text}{chr(10)}" for name, text in COMMANDS.items())}
`diffstride COMMAND --help` describes a command. DIFFSTRIDE_TRACEBACK=1 shows the traceback of an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Return 0 when it is done, 2 for a user's mistake, 1 if the work failed."""
    for stream in sys.stdout, sys.stderr:  # a terminal without a character shows its escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else ""
    if name == "--version":
        print(f"diffstride {__version__}")
        return 0
    if name in ("", "-h", "--help"):
        print(USAGE, file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    try:
        here = os.getcwd()  # it may have a network of the user's
        if here not in sys.path:
            sys.path.append(here)  # last, so that it hides no package
        _command(name)(arguments[1:])
    except UsageError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except OSError as error:  # of files that a user names, or of their disk
        if error.errno not in DISK_ERRORS | PATH_ERRORS:
            raise
        return _fail(describe_os_error(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    return 0


def _command(name: str) -> Callable[[Sequence[str]], None]:
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS.keys())
        raise UsageError(f"unknown command {name!r}; the commands are {', '.join(COMMANDS)}{near}")
    try:
        package = "training" if name == "fit" else "commands"
        module = importlib.import_module(f"diffstride.experiments.{package}.{name}")
    except ModuleNotFoundError as error:
        raise UsageError(f"{name} needs the package {error.name}: pip install 'diffstride[train]'") from error
    command: Callable[[Sequence[str]], None] = getattr(module, name)
    return command


def _fail(error: Exception | str, status: int) -> int:
    if os.environ.get("DIFFSTRIDE_TRACEBACK"):
        traceback.print_exc()
    print(f"diffstride: error: {printable(error)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
