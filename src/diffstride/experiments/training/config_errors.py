"""Mistakes in the arguments of `fit`, in one line: unknown keys and classes with the nearest right one."""

from __future__ import annotations

import pydoc
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentParser

from diffstride import nn
from diffstride._text import did_you_mean, one_line
from diffstride.experiments import data, models

# The keys that name a class, with the module of our own classes and their base class.
PLACES: dict[str, tuple[ModuleType, type]] = {
    "data": (data, data.ClassificationData),
    "model.network": (models, models.Network),
    "model.exploration": (nn, nn.Exploration),
}
# Parts of the messages of jsonargparse, which is tried from 4.39 to 4.53.
_NO_CONFIG = re.compile(r"(Problems parsing|Unexpected) config|'utf-8' codec")
_PLACE = re.compile(r"(?:Parser key \"|Group ')([\w.]+)")
_KEY = re.compile(r"(?:rguments: --|[Oo]ption '|[Kk]ey ')([\w.]+)")
_CLASS = re.compile(r"class_path '([\w.]+)'")
_NO_CLASS = re.compile(r"import path string: (\S+)|class_path '(\S+)': (?:No )?module")


def explain(error: Exception, parser: ArgumentParser, arguments: Sequence[str]) -> str:
    """Return the parser's message in one line, or one of ours about a file, a key or a class that it does not know."""
    message = " ".join(str(error).split())
    if _NO_CONFIG.match(message):
        files = re.findall(r"--config[= ](\S+)", " ".join(arguments))
        return f"{', '.join(files)}: not YAML of a configuration ({one_line(error)})"
    found = _PLACE.search(message)
    place = found[1] if found else ""
    if place in PLACES and (found := _NO_CLASS.search(message)):
        name, own = found[found.lastindex or 0], _own_classes(place)
        options = f"{', '.join(own)}, or a class as package.Name"
        return f"{place} must be one of {options}, got {name!r}{did_you_mean(name, own.keys())}"
    if found := _KEY.search(message):
        return _unknown(".".join(filter(None, (place, found[1]))), place, message, parser)
    return one_line(error)


def _unknown(key: str, place: str, message: str, parser: ArgumentParser) -> str:
    """Return a message about a dotted key: its first part that is unknown, and the nearest right key."""
    named: Any = pydoc.locate(_CLASS.findall(message)[-1]) if _CLASS.search(message) else None
    bases = {base for _, base in PLACES.values()}
    classes = {at: _own_classes(at).values() for at in PLACES} if named in {None, *bases} else {place: [named]}
    keys = [*map(str, parser.get_defaults(skip_validation=True).keys())]
    for at, kinds in classes.items():
        keys += [f"{at}.{name}" for kind in kinds for name in ("class_path", "init_args", *_arguments_of(kind))]
    known = {part for each in keys for part in _parts(each)}
    unknown = next((part for part in _parts(key) if part not in known), None)
    if unknown is None:
        at = next((at for at in PLACES if key.startswith(f"{at}.")), "data")
        return f"{key} needs a class: give --{at} as well, one of {', '.join(_own_classes(at))}"
    last = {each.rpartition(".")[2]: each for each in keys}
    near = did_you_mean(unknown, known) or did_you_mean(unknown.rpartition(".")[2], last)
    return f"unknown key {unknown}{near or ': --print_config shows all keys'}"


def _parts(key: str) -> Iterator[str]:
    """Yield `a`, `a.b`, `a.b.c` for `a.b.c`."""
    return accumulate(key.replace(".init_args.", ".").split("."), "{}.{}".format)


def _arguments_of(kind: Any) -> Iterable[str]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    return map(str, parser.get_defaults(skip_validation=True).keys())


def _own_classes(place: str) -> dict[str, type]:
    """Return our classes for a place by their names."""
    module, base = PLACES[place]
    exported = ((name, getattr(module, name)) for name in module.__all__)
    return {
        name: kind for name, kind in exported if kind is not base and isinstance(kind, type) and issubclass(kind, base)
    }
