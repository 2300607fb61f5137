"""Keys of `fit`: a configuration and arguments read once more, where the parser has refused them, to say it better."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from diffstride import nn
from diffstride._files import describe_os_error
from diffstride._text import did_you_mean
from diffstride.experiments import data, models
from diffstride.experiments.training.documents import load_yaml, read_yaml

# Where a class is named, where ours are, and what they derive from.
PLACES: dict[str, tuple[ModuleType, type]] = {
    "data": (data, data.ClassificationData),
    "model.network": (models, models.Network),
    "model.exploration": (nn, nn.Exploration),
}
_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")


def unknown_key(parser: ArgumentParser, arguments: Sequence[str]) -> str | None:
    """The first key, or name of a class, that `fit` does not know, and what comes nearest to it; None: all are known.

    Values are not looked at; nor is what lies below classes that cannot be found.
    """
    given = list(_given(arguments))
    for source, key, value in given:
        if (said := _unknown_class(key, value)) is not None:
            return f"{source}{said}"
    classes = {place: _class_of(str(value)) for _, key, value in given if (place := _place_of_class(key, value))}
    known = [*map(str, parser.get_defaults(skip_validation=True).keys())]
    for place, kind in sorted(classes.items()):  # from the outermost
        if kind is not None and any(place == key or place.startswith(f"{key}.") for key in known):
            known += [f"{place}.{key}" for key in (*_arguments_of(kind), *_OF_A_CLASS)]
    for source, key, _ in given:
        if (said := _unknown(key, classes, known)) is not None:
            return f"{source}{said}"
    return None


def unreadable_config(arguments: Sequence[str]) -> str | None:
    """What is wrong with the first `--config` that no configuration can be read from; None: all can be read."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name not in ("-c", "--config") or not (equals or arguments[i + 1 :]):
            continue
        value = value if equals else arguments[i + 1]
        if value.lstrip().startswith("{") or ": " in value or "\n" in value:  # a configuration itself
            continue
        try:
            content = read_yaml(Path(value))
        except OSError as error:
            return f"{describe_os_error(error, value)}; --config takes a YAML file"
        except (yaml.YAMLError, ValueError) as error:
            return f"{value} is not YAML: {' '.join(str(error).split())}"
        if not isinstance(content, Mapping):
            return f"{value} must be a mapping from names to values, as configs/demo.yaml is, got {content!r:.60}"
    return None


def in_plain_words(message: str, arguments: Sequence[str]) -> str:
    """What the parser says of a value, in the words that our own classes have."""
    if (missing := re.search("arguments are required: (.+)", message)) is not None:
        return f"{missing[1]} must be given: start from one of configs/ with --config FILE (see diffstride fit --help)"
    if restricted := re.match(
        r'Parser key "(.+?)": Not of type .*: (\S+) does not conform to restriction v(.*)', message
    ):
        return "{0} must be {2}, got {1}".format(*restricted.groups())
    if (
        value := re.match(r'Parser key "(.+?)": (.*?)(?:Given value type.*)?(?:Got|Given) value: (.*)', message)
    ) is None:
        return message
    key, said, got = value.groups()
    whole = {
        given for _, given, _ in _given(arguments) if given.endswith(f".{key}")
    }  # the parser may tell the end alone
    key = whole.pop() if len(whole) == 1 else key
    kinds = re.findall(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*?)\])", said)
    choices = dict.fromkeys(
        _KINDS.get(kind, kind) or ", ".join(sorted(literals.split(", "))) for kind, literals in kinds
    )
    return f"{key} must be {' or '.join(choices)}, got {got}" if choices else message


_KINDS = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "Sequence": "a list",
    "list": "a list", "dict": "a mapping", "Mapping": "a mapping", "NoneType": "null",
}  # fmt: skip


def flatten(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """A nested configuration under the dotted names that the command line has for it."""
    for key, value in config.items():
        name = above if key == "init_args" else f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, name)
        else:
            yield name, value


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Whatever is set, in order: the file that sets it, its key, its value."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        value = value if equals else next(iter(arguments[i + 1 :]), "")
        if name in ("-c", "--config"):
            is_file = os.path.isfile(value)  # a configuration itself is too long for a path's own `is_file`
            content = _yaml(Path(value).read_text(errors="replace") if is_file else value)
            source = f"{value}: " if is_file else ""
            yield from ((source, *pair) for pair in flatten(content if isinstance(content, Mapping) else {}))
        elif name.startswith("--"):
            yield "", name[2:].removesuffix("+").replace(".init_args.", "."), _yaml(value)


def _yaml(text: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def _place_of_class(key: str, value: Any) -> str | None:
    if key.endswith(".class_path"):
        return key.removesuffix(".class_path")
    return key if key in PLACES and isinstance(value, str) else None


def _unknown_class(key: str, value: Any) -> str | None:
    place = _place_of_class(key, value)
    if place not in PLACES or os.path.isfile(str(value)) or _class_of(str(value)) is not None:
        return None
    names = _ours(place)
    near = did_you_mean(value, names)
    return f"{place} must be one of {', '.join(names)}, or a class of your own as package.Name, got {value!r}{near}"


def _unknown(key: str, classes: Mapping[str, type | None], known: Sequence[str]) -> str | None:
    above = ""
    for part in key.split("."):
        start = f"{above}." if above else ""
        below = [k.removeprefix(start).split(".")[0] for k in known if k.startswith(start)]
        without_class = above in PLACES and above not in classes
        if without_class:
            below = [*_OF_A_CLASS]
        if below and part not in below:
            if near := did_you_mean(part, {name: start + name for name in below}):
                return f"unknown key {start}{part}{near}"
            if without_class:
                return f"{key} needs a class: give --{above} as well, one of {', '.join(_ours(above))}"
            elsewhere = did_you_mean(part, {k.rsplit(".", 1)[-1]: k for k in known})
            return f"unknown key {start}{part}{elsewhere or ': --print_config shows those that there are'}"
        above = start + part
    return None


def _arguments_of(kind: type) -> list[str]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    keys = map(str, parser.get_defaults(skip_validation=True).keys())
    return [key.replace(".init_args.", ".") for key in keys]  # of a default that is a class itself


def _class_of(name: str) -> type | None:
    """A class by its bare name where it is one of ours, or by its path."""
    for place in PLACES:
        if name in _ours(place):
            name = f"{PLACES[place][0].__name__}.{name}"
    module, _, bare = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), bare)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _ours(place: str) -> list[str]:
    """The names of our classes for a place."""
    module, base = PLACES[place]
    exported = {name: getattr(module, name) for name in module.__all__}
    return [n for n, kind in exported.items() if isinstance(kind, type) and issubclass(kind, base) and kind is not base]
