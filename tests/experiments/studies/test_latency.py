"""Latencies of a study: when they are measured."""

import json
import shutil

from tests.helpers.studies import study


def test_latency_is_measured_again_for_other_batches_and_runs(write):
    axes = {"method": "conv", "seed": 0}
    file = write(axes=axes, latency=2)
    assert study(file) == 0
    measured = file.parent / "runs" / "tiny" / "latency.json"
    before = measured.read_text()
    assert study(file) == 0
    assert measured.read_text() == before
    assert study(write(axes=axes, latency=3)) == 0
    assert json.loads(measured.read_text())["batch"] == 3
    before = measured.read_text()
    shutil.rmtree(measured.parent / "conv-seed0")
    assert study(write(axes=axes, latency=3)) == 0
    assert measured.read_text() != before
