"""What the file formats share."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from diffstride.errors import UsageError


def _require(kind: str, *packages: str) -> None:
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{kind} files need the package {name}: pip install 'diffstride[export]'")


def _texts(metadata: Mapping[str, str] | None) -> dict[str, str]:
    return dict(metadata or {})
