"""YAML and JSON files, read with a bound on what they may expand to."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from diffstride._files import read_text

NODES, DEPTH = 200_000, 100  # of one document; a study of a thousand runs has 20,000 nodes
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str) -> Any:
    """Return what a YAML text contains.

    Raises:
        yaml.YAMLError: a text that is not YAML, or one that expands beyond all use: by aliases of aliases, by nesting.
    """
    return _bounded(yaml.load, text, Loader=_Loader)


def read_yaml(file: Path) -> Any:
    """Return what a YAML file contains.

    Raises:
        OSError: a file that cannot be read, a pipe or a device.
        ValueError: a file that is too large, or of bytes that are not UTF-8.
        yaml.YAMLError: as for `load_yaml`.
    """
    return load_yaml(read_text(file))


def read_json(file: Path) -> Any:
    """Return what a JSON file contains.

    Raises:
        OSError: a file that cannot be read, a pipe or a device.
        ValueError: a file that is not JSON, or too large.
    """
    try:
        return json.loads(read_text(file))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _bounded(load: Callable[..., Any], text: str, **options: Any) -> Any:
    _check_size(text)
    try:
        return load(text, **options)
    except (ValueError, TypeError) as error:  # of a date that there is not, a number of 5,000 digits
        raise yaml.YAMLError(str(error)) from error


def _check_size(text: str) -> None:
    """Check what the text expands to: an alias counts as much as what it stands for."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise yaml.YAMLError("it has bytes that are not UTF-8") from error
    sizes: dict[str, int | None] = {}  # by anchor; None for one that is still open
    above: list[tuple[str | None, int]] = []
    anchor: str | None = None
    size = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            above.append((anchor, size))
            anchor, size = event.anchor, 1
            sizes |= {anchor: None} if anchor else {}
        elif isinstance(event, yaml.CollectionEndEvent):
            sizes |= {anchor: size} if anchor else {}
            anchor, before = above.pop()
            size += before
        elif isinstance(event, yaml.ScalarEvent):
            sizes |= {event.anchor: 1} if event.anchor else {}
            size += 1
        elif isinstance(event, yaml.AliasEvent):
            if (own := sizes.get(str(event.anchor), 1)) is None:
                raise yaml.YAMLError(f"the alias *{event.anchor} stands inside of what it stands for")
            size += own
        if size > NODES:
            raise yaml.YAMLError(f"it expands to more than {NODES} values")
        if len(above) > DEPTH:
            raise yaml.YAMLError(f"it is nested more than {DEPTH} deep")


# Files and values that the parser reads itself are bounded, too.
set_loader("yaml", partial(_bounded, get_loader("yaml")), exceptions=(yaml.YAMLError,))
