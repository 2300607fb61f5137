"""YAML and JSON files, read with a bound on what they may expand to."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import get_loader, set_loader

from diffstride._files import read_text
from diffstride.experiments.training.schema import check_whole_number

NODES, DEPTH = 200_000, 100  # of one document; a study of a thousand runs has 20,000 nodes
CHARACTERS = 2**22  # of all scalars of one document, as many as a file may have
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str) -> Any:
    """Return what a YAML text contains.

    Raises:
        yaml.YAMLError: a text that is not YAML; one that expands beyond all use, by aliases or by nesting; a whole
            number beyond 2**63.
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
        ValueError: a file that is not JSON, or too large; a whole number beyond 2**63.
    """
    try:
        return json.loads(read_text(file), parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _bounded(load: Callable[..., Any], text: str, **options: Any) -> Any:
    _check_size(text)
    try:
        content = load(text, **options)
        _check_numbers(content)
    except (ValueError, TypeError) as error:  # of a date that there is not, a number of 5,000 digits
        raise yaml.YAMLError(str(error)) from error
    return content


def _check_numbers(content: Any) -> None:
    """Check the whole numbers in what a YAML text contains."""
    if isinstance(content, int):
        check_whole_number(content)
    elif isinstance(content, dict):
        for key, value in content.items():
            _check_numbers(key)
            _check_numbers(value)
    elif isinstance(content, list | tuple | set):
        for value in content:
            _check_numbers(value)


def _whole_number(digits: str) -> int:
    number = int(digits)
    check_whole_number(number)
    return number


class _Size(NamedTuple):
    """The size of a part of a document: its values, and the characters in them."""

    values: int
    characters: int

    def plus(self, other: _Size) -> _Size:
        """Return the size of both together."""
        return _Size(self.values + other.values, self.characters + other.characters)


def _check_size(text: str) -> None:
    """Check what the text expands to: an alias counts as much as what it stands for."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise yaml.YAMLError("it has bytes that are not UTF-8") from error
    sizes: dict[str, _Size | None] = {}  # by anchor; None for one that is still open
    above: list[tuple[str | None, _Size]] = []
    anchor: str | None = None
    size = _Size(0, 0)
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            above.append((anchor, size))
            anchor, size = event.anchor, _Size(1, 0)
            sizes |= {anchor: None} if anchor else {}
        elif isinstance(event, yaml.CollectionEndEvent):
            sizes |= {anchor: size} if anchor else {}
            anchor, before = above.pop()
            size = size.plus(before)
        elif isinstance(event, yaml.ScalarEvent):
            scalar = _Size(1, len(event.value))
            sizes |= {event.anchor: scalar} if event.anchor else {}
            size = size.plus(scalar)
        elif isinstance(event, yaml.AliasEvent):
            if (own := sizes.get(str(event.anchor), _Size(1, 0))) is None:
                raise yaml.YAMLError(f"the alias *{event.anchor} stands inside of what it stands for")
            size = size.plus(own)
        if size.values > NODES:
            raise yaml.YAMLError(f"it expands to more than {NODES} values")
        if size.characters > CHARACTERS:
            raise yaml.YAMLError(f"it expands to more than {CHARACTERS} characters")
        if len(above) > DEPTH:
            raise yaml.YAMLError(f"it is nested more than {DEPTH} deep")


# Files and values that the parser reads itself are bounded, too.
set_loader("yaml", partial(_bounded, get_loader("yaml")), exceptions=(yaml.YAMLError,))
