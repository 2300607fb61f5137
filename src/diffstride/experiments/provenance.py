"""The commit, versions and hardware behind a measured figure."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffstride import __version__
from diffstride._files import atomic_write_text


def provenance(device: torch.device) -> dict[str, Any]:
    """Return the commit, versions and hardware that belong to a measured figure."""
    cpu = f"{_processor()}, {torch.get_num_threads()} threads"
    return {
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "diffstride": __version__,
            **{name: version(name) for name in ("torch", "lightning")},
        },
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
    }


def write_report(file: Path, command: Sequence[str], device: torch.device, found: Mapping[str, Any]) -> None:
    """Write what a command of `diffstride` found on a device as JSON, with the command and its provenance."""
    report = {**provenance(device), "command": shlex.join(["diffstride", *command]), **found}
    atomic_write_text(file, json.dumps(report, indent=1) + "\n")


def _commit() -> str | None:
    """Return the commit of the source tree, marked if files differ from it; None for an installed wheel."""
    if not Path(__file__).parents[3].joinpath("pyproject.toml").is_file():
        return None  # git would find the repository around the environment
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() or None


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
