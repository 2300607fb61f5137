"""One run of a study: its request and its outcome."""

import json

import pytest

from diffstride.errors import UsageError
from diffstride.experiments.studies.study import load_study
from diffstride.experiments.studies.worker import read_request, work, write_request


def test_a_request_is_read_back_and_done_in_its_folder(write, tmp_path):
    (run,) = load_study(write(axes={"method": "conv", "seed": 0})).runs
    folder = tmp_path / "run"
    assert read_request(folder) is None
    write_request(folder, run.request)
    assert read_request(folder) == run.request
    work(folder)
    assert json.loads((folder / "result.json").read_text())["steps"] == 6


def test_a_damaged_request_names_its_file(tmp_path):
    (tmp_path / "request.json").write_text("{")
    with pytest.raises(UsageError, match=r"request\.json cannot be read"):
        read_request(tmp_path)
