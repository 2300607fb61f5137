import functools

import pytest

from tests.helpers.runs import small


@pytest.fixture
def run(tmp_path):
    """Train in a folder of the test's own: `run(name, *arguments, steps=None)` returns (cli, result)."""
    return functools.partial(small, tmp_path)
