"""One run of a study: its request."""

import pytest

from diffstride.errors import UsageError
from diffstride.experiments.studies.worker import read_request


def test_a_damaged_request_names_its_file(tmp_path):
    (tmp_path / "request.json").write_text("{")
    with pytest.raises(UsageError, match=r"request\.json cannot be read"):
        read_request(tmp_path)
