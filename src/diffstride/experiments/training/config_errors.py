"""Keys and classes that `fit` does not know: found in its arguments, and refused with the nearest right one."""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from diffstride import nn
from diffstride._files import describe_os_error
from diffstride._text import did_you_mean, one_line
from diffstride.errors import UsageError
from diffstride.experiments import data, models
from diffstride.experiments.training.documents import flatten, load_yaml, read_yaml

# The keys that name a class, with the module of our own classes and their base class.
PLACES: dict[str, tuple[ModuleType, type]] = {
    "data": (data, data.ClassificationData),
    "model.network": (models, models.Network),
    "model.exploration": (nn, nn.Exploration),
}
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def unknown_key(parser: ArgumentParser, arguments: Sequence[str]) -> str | None:
    """Return a message about the first key or class that `fit` does not know; None if it knows all of them.

    Values are not checked, nor is anything below a class that cannot be found.

    Raises:
        UsageError: a `--config` that no configuration can be read from.
    """
    given = list(_given(arguments))
    classes: dict[str, type | None] = {}  # None: not known here
    for source, key, value in given:
        place = key.removesuffix(".class_path")
        if place != key or (place in PLACES and isinstance(value, str)):
            classes[place] = _class_of(str(value))
            if classes[place] is None and place in PLACES and not os.path.isfile(str(value)):
                own = _own_classes(place)
                options = f"{', '.join(own)}, or a class as package.Name"
                return f"{source}{place} must be one of {options}, got {value!r}{did_you_mean(value, own.keys())}"
    known = [*map(str, parser.get_defaults(skip_validation=True).keys())]
    known += [f"{place}.{key}" for place in PLACES for key in _CLASS_KEYS]
    for place, kind in sorted(classes.items()):  # outer classes first
        if kind is not None and any(place == key or place.startswith(f"{key}.") for key in known):
            known += [f"{place}.{key}" for key in (*_arguments_of(kind), *_CLASS_KEYS)]
    for source, key, _ in given:
        if (problem := _unknown(key, classes, known)) is not None:
            return f"{source}{problem}"
    return None


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield each setting in order: the file it is in, its key, its value."""
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        value = value if equals else following
        if name in ("-c", "--config"):
            source, content = _read_config(value)
            yield from ((source, *pair) for pair in flatten(content))
        elif name.startswith("--"):
            key = name[2:].removesuffix("+").replace(".init_args.", ".")
            yield from (("", *pair) for pair in flatten({key: _parsed(value)}))


def _read_config(given: str) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the content of a configuration file; a configuration on the command line has no name."""
    try:
        inline = given.lstrip().startswith("{") or ": " in given or "\n" in given
        content = load_yaml(given) if inline else read_yaml(Path(given))
    except OSError as error:
        raise UsageError(f"{describe_os_error(error, given)}; --config takes a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{given} is not YAML: {one_line(error)}") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"{given} must be a mapping, as configs/demo.yaml is, got {content!r:.60}")
    return "" if inline else f"{given}: ", content


def _parsed(text: str) -> Any:
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text


def _unknown(key: str, classes: Mapping[str, type | None], known: Sequence[str]) -> str | None:
    """Return a message about the first part of a dotted key that is not among the `known` keys."""
    above = ""
    for part in key.split("."):
        start = f"{above}." if above else ""
        below = {name.removeprefix(start).split(".")[0] for name in known if name.startswith(start)}
        if classes.get(above, object) is not None and below and part not in below:
            near = did_you_mean(part, {name: start + name for name in below})
            if not near and above in PLACES and above not in classes:
                return f"{key} needs a class: give --{above} as well, one of {', '.join(_own_classes(above))}"
            near = near or did_you_mean(part, {name.rsplit(".", 1)[-1]: name for name in known})
            return f"unknown key {start}{part}{near or ': --print_config shows all keys'}"
        above = start + part
    return None


def _arguments_of(kind: type) -> list[str]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    keys = parser.get_defaults(skip_validation=True).keys()
    return [str(key).replace(".init_args.", ".") for key in keys]


def _class_of(name: str) -> type | None:
    """Return a class by the bare name of one of ours, or by its path."""
    for place in PLACES:
        if (own := _own_classes(place).get(name)) is not None:
            return own
    if "." not in name:
        return None
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _own_classes(place: str) -> dict[str, type]:
    """Return our classes for a place by their names."""
    module, base = PLACES[place]
    classes = inspect.getmembers(module, lambda it: inspect.isclass(it) and issubclass(it, base) and it is not base)
    return {name: kind for name, kind in classes if name in module.__all__}
