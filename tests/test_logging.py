"""Levels of loggers come back, also after a failure."""

import logging

import pytest

from diffstride._logging import log_level


def test_records_below_the_level_are_dropped_and_levels_come_back(caplog):
    names = ("diffstride.test.one", "diffstride.test.two")
    one, two = map(logging.getLogger, names)
    one.setLevel(logging.INFO)
    two.setLevel(logging.DEBUG)

    @log_level(names, logging.ERROR)
    def fail():
        one.warning("unheard")
        two.error("heard")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    one.info("again")
    assert [record.message for record in caplog.records] == ["heard", "again"]
    assert (one.level, two.level) == (logging.INFO, logging.DEBUG)
