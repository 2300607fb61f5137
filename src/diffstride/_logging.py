"""Logs of other libraries, made quieter for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def log_level(names: Iterable[str], level: int) -> Iterator[None]:
    """Give loggers another level, and restore theirs afterwards."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, earlier in zip(loggers, levels, strict=True):
            logger.setLevel(earlier)
