"""The commit, versions and hardware behind a measured figure."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffstride import __version__


def provenance(device: torch.device) -> dict[str, Any]:
    """Return the commit, versions and hardware that belong to a measured figure."""
    cuda = device.type == "cuda"
    return {
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "diffstride": __version__,
            **{name: version(name) for name in ("torch", "lightning")},
        },
        "hardware": torch.cuda.get_device_name(device)
        if cuda
        else f"{_processor()}, {torch.get_num_threads()} threads",
    }


def _commit() -> str | None:
    """Return the commit of the source tree, marked if files differ from it; None for an installed wheel."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() or None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
