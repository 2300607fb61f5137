"""YAML and JSON files read as plain data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from diffstride._files import read_text

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        yaml.YAMLError: a text that is not YAML.
        ValueError: a date or a number that does not exist.
    """
    return yaml.load(text, Loader=_Loader)


def read_yaml(file: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        OSError: a file that cannot be read, or is not a regular file.
        ValueError: a file that is too large, or is not UTF-8.
        yaml.YAMLError: a file that is not YAML.
    """
    return load_yaml(read_text(file))


def read_json(file: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: a file that cannot be read, or is not a regular file.
        ValueError: a file that is not JSON, is too large, or is not UTF-8.
    """
    return json.loads(read_text(file))
