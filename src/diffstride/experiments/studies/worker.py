"""One run of a study in a process of its own: `python -m diffstride.experiments.studies.worker FOLDER`.

The run's folder is the only channel. `request.json` holds the request, `result.json` or `failed.json` the outcome. A
run that was cut off resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from diffstride._files import atomic_write_text
from diffstride._text import one_line
from diffstride.errors import DiffStrideError, InterruptedRunError, UsageError
from diffstride.experiments.benchmark.measure import cpu_threads
from diffstride.experiments.studies.study import Request
from diffstride.experiments.training.documents import read_json
from diffstride.experiments.training.fit import train
from diffstride.experiments.training.folders import clear, locked
from diffstride.experiments.training.signals import end_with_parent


def write_request(folder: Path, request: Request) -> None:
    """Request a run, and clear an earlier failure, or a run with other settings that left no checkpoint.

    Raises:
        UsageError: The folder has files of something else, is locked by another process, or cannot be written.
    """
    before = read_request(folder)
    with locked(folder, adopt=before is not None):
        if before is not None and request.differences(before):
            clear(folder)
        (folder / "failed.json").unlink(missing_ok=True)  # of an earlier attempt
        atomic_write_text(folder / "request.json", json.dumps(request._asdict(), indent=1) + "\n")


def read_request(folder: Path) -> Request | None:
    """Return the request of a run; None where there is none."""
    try:
        return Request(**read_json(folder / "request.json"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise UsageError(f"{folder / 'request.json'} cannot be read ({one_line(error)}): remove {folder}") from error


def requested(folder: Path) -> Request:
    """Return the request of a run that has one."""
    request = read_request(folder)
    assert request is not None, folder
    return request


def work(folder: Path) -> None:
    """Complete the run in a folder, from its last checkpoint if it has one.

    A failure is written to `failed.json`. Only an interruption is raised.
    """
    request = requested(folder)
    resume = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").exists() else []
    own = [f"--runs={folder.parent}", f"--name={folder.name}", "--trainer.enable_progress_bar=false"]
    try:
        with cpu_threads(request.cpus):
            train([*request.arguments(), *own, *resume])
    except InterruptedRunError:
        raise
    except Exception as error:  # an error of a library must not end the study
        kind = "" if isinstance(error, DiffStrideError) else f"{type(error).__name__}: "
        write_failure(folder, kind + one_line(error), traceback.format_exc())


def write_failure(folder: Path, error: str, details: str) -> None:
    """Write that a run has failed: the error in one line, and details."""
    atomic_write_text(folder / "failed.json", json.dumps({"error": error, "details": details}, indent=1) + "\n")


if __name__ == "__main__":
    end_with_parent()
    work(Path(sys.argv[1]))
