"""`diffstride bench`: its measurements and its files."""

import json
from pathlib import Path

import pytest

from diffstride.experiments.benchmark.suites import CONTROLS, crossovers
from diffstride.experiments.commands import bench
from diffstride.experiments.commands.main import main

MAKEFILE = Path(__file__).parents[3] / "Makefile"


LAYERS = {"data movement", "avg_pool2d", "FFT, naive port, R=4", "DiffStride, R=4", "SpectralPool"}  # some of them
NETWORKS = {"strided convolution", "DiffStride, R=4", *CONTROLS}


def in_case(rows, reference, **facts):
    return {r["name"]: r for r in rows if r["reference"] == reference and facts.items() <= r["case"].items()}


def test_a_run_measures_everyone_and_leaves_everything(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", "steps", "layers", "--quick", "--seed", "3", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert set(report) == {
        "commit", "versions", "hardware", "device", "threads", "allocator", "repeats", "seed", "command", "rows",
        "missing",
    }  # fmt: skip
    assert (report["threads"], report["repeats"], report["seed"]) == (1, 2, 3)
    assert report["command"] == f"diffstride bench steps layers --quick --seed 3 --out {out}"
    rows = report["rows"]
    for row in rows:
        assert list(row) == [
            "suite", "case", "name", "ms", "ratio", "ratio_low", "ratio_high", "reference", "peak_mb", "peak_ratio",
            "operations",
        ]  # fmt: skip
        assert 0 < row["ratio_low"] <= row["ratio_high"]
        assert row["peak_mb"] > 0

    for memory_format in ("contiguous", "channels_last"):
        wide = in_case(rows, "avg_pool2d", dtype="float32", memory_format=memory_format)
        assert set(wide) >= LAYERS
        samples = 2 * 4 * 12 * 12
        assert wide["avg_pool2d"]["peak_mb"] * 2**20 == 4 * (samples / 4 + samples)
        assert wide["data movement"]["peak_mb"] * 2**20 == 4 * 2 * samples
        half = in_case(rows, "avg_pool2d", dtype="bfloat16", memory_format=memory_format)
        absent = {m["name"] for m in report["missing"] if m["case"]["memory_format"] == memory_format}
        assert set(half) | absent == set(wide)
        assert absent <= {"antialiased bilinear"}
    for dtype in ("float32", "bfloat16"):
        assert set(in_case(rows, "strided convolution", dtype=dtype)) >= NETWORKS
        for control, name in CONTROLS.items():
            assert set(in_case(rows, control, dtype=dtype)) == {control, name}

    printed = capsys.readouterr().out
    assert [printed.count(f"{suite}: time, over that of") for suite in ("layers", "steps", "convolutions")] == [1, 1, 0]
    row = in_case(rows, "strided convolution", dtype="bfloat16")["DiffStride, R=4"]
    assert f"{row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})" in printed


def test_the_host_part_counts_operations(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", "host", "--quick", "--dtypes", "float32", "--out", str(out)]) == 0
    rows = in_case(json.loads(out.read_text())["rows"], "avg_pool2d")
    assert rows["avg_pool2d"]["operations"] == 2
    assert rows["DiffStride2d, stride held"]["operations"] < rows["DiffStride2d, stride moved"]["operations"] <= 40
    printed = capsys.readouterr().out
    assert "host: time, over that of avg_pool2d" in printed
    assert "host: operations" in printed


def test_convolutions(tmp_path):
    out = tmp_path / "bench.json"
    assert main(["bench", "convolutions", "--quick", "--dtypes", "bfloat16", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    names = {"convolution, then layer", "one operator", "strided convolution"}
    for facts in (
        {"stride": 2, "smoothness": 1}, {"stride": 2, "smoothness": 4, "window": "outer"}, {"stride": 3},
        {"window": "inner"},
    ):  # fmt: skip
        assert set(in_case(rows, "convolution, then layer", **facts)) == names
    assert len(rows) == 12


def test_calibration_finds_the_crossover_and_records_the_allocator(tmp_path, capsys, monkeypatch):
    for name, value in bench.ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "c.json"
    assert main(["bench", "--calibrate", "--quick", "--dtypes", "float32", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["allocator"] == bench.ALLOCATOR
    printed = capsys.readouterr().out
    assert "MALLOC" not in printed
    assert f"DENSE_UP_TO = {{torch.float32: {report['crossover']['float32']}}}" in printed
    assert report["crossover"] == crossovers(report["rows"])
    shapes = {tuple(r["case"]["shape"]) for r in report["rows"]}
    assert shapes == {(16, 16, 16), (8, 16, 32), (1, 16, 16, 16), (1, 16, 32, 32)}
    assert {r["name"] for r in report["rows"]} == {"fft", "matmul"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer"], "unknown suite 'layer'; there are host, layers, convolutions, steps"),
        (["--repeats", "1"], "argument --repeats: must be a whole number of at least 2, got '1'"),
        (["--dtypes", "int8"], "argument --dtypes: invalid choice: 'int8'"),
        (["--out", "no/such/folder/bench.json"], "there is no folder no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"diffstride: error: {message}")
    assert error.count("\n") == 1


def test_settings_of_the_allocator_are_advised_where_they_are_not_set(capsys, monkeypatch):
    for name in bench.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(bench, "calibration", lambda _: [])
    assert main(["bench", "--calibrate"]) == 0
    advice = next(line for line in capsys.readouterr().out.splitlines() if "MALLOC" in line)
    assert advice.endswith("MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 diffstride bench")
    makefile = MAKEFILE.read_text()
    assert all(f"{name}={value}" in makefile for name, value in bench.ALLOCATOR.items())
