"""Do one run of a study in a process of its own: `python -m diffstride.experiments.studies.worker FOLDER`.

Everything passes through the run's folder. `request.json` says what to do; `result.json`, or `failed.json`, says what
came of it; a run that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path

import torch

from diffstride._files import atomic_write_text
from diffstride._text import one_line
from diffstride.errors import InterruptedRunError, RunError, UsageError
from diffstride.experiments.studies.study import Request
from diffstride.experiments.training.documents import read_json
from diffstride.experiments.training.fit import train
from diffstride.experiments.training.folders import clear, held


def write_request(folder: Path, request: Request) -> None:
    """Ask for a run, in a folder that is new or that was made for one; what a run without checkpoint left is cleared.

    Raises:
        UsageError: a folder with files of something else, one that another process holds, one that cannot be written.
    """
    before = read_request(folder)
    with held(folder, adopt=before is not None):
        if before is not None and request.differences(before):
            clear(folder)
        atomic_write_text(folder / "request.json", json.dumps(request._asdict(), indent=1) + "\n")


def read_request(folder: Path) -> Request | None:
    """What a run was asked to do; None where none was asked for."""
    try:
        request = Request(**read_json(folder / "request.json"))
        return request._replace(config=dict(request.config), settings=dict(request.settings), cpus=int(request.cpus))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"{folder / 'request.json'} cannot be read ({one_line(error)}): remove {folder}") from error


def work(folder: Path) -> None:
    """Bring the run in a folder to its end, from its last checkpoint if it has one.

    A failure is written down, with the traceback where it was not foreseen; only an interruption is raised.
    """
    request = read_request(folder)
    assert request is not None, folder
    (folder / "failed.json").unlink(missing_ok=True)
    resume = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").exists() else []
    quiet = ["--trainer.enable_progress_bar", "false"]
    threads = torch.get_num_threads()
    torch.set_num_threads(request.cpus)
    try:
        train([*request.arguments(), f"--runs={folder.parent}", f"--name={folder.name}", *quiet, *resume])
    except (InterruptedRunError, KeyboardInterrupt):
        raise
    except (UsageError, RunError) as error:
        failed(folder, str(error))
    except Exception as error:  # of libraries: the study goes on, and its user is told
        failed(folder, f"{type(error).__name__}: {one_line(error)}", traceback.format_exc())
    finally:
        torch.set_num_threads(threads)


def failed(folder: Path, error: str, details: str | None = None) -> None:
    """Write down that a run has failed: one line, and what else may help to find out why."""
    atomic_write_text(folder / "failed.json", json.dumps({"error": error, "details": details}, indent=1) + "\n")


def _end_with_parent() -> None:
    """Whoever holds the other end of standard input has died: a second copy of the run may be started any time."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(Path(sys.argv[1]))
