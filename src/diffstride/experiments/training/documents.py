"""YAML and JSON files read as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from diffstride._files import read_text

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str) -> Any:
    """Return the content of a YAML text. Raise a `yaml.YAMLError`, or a ValueError for a date that does not exist."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(file: Path) -> Any:
    """Return the content of a YAML file. Raise errors of `load_yaml` and `read_text`."""
    return load_yaml(read_text(file))


def read_json(file: Path) -> Any:
    """Return the content of a JSON file. Raise a ValueError, or errors of `read_text`."""
    return json.loads(read_text(file))


def flatten(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a nested configuration with their dotted names, as on the command line."""
    for key, value in config.items():
        name = above if key == "init_args" else f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, name)
        else:
            yield name, value
