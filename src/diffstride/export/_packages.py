"""Optional packages of the file formats."""

from __future__ import annotations

import importlib.util

from diffstride.errors import UsageError


def require(kind: str, *packages: str) -> None:
    """Raise a UsageError where a package for files of this kind is missing."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{kind} files need the package {name}: pip install 'diffstride[export]'")
