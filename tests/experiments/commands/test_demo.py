"""A small demo: the table of its runs, and the figures."""

import json
from pathlib import Path

import yaml

from diffstride.experiments.commands.main import main

CONFIG = Path(__file__).parents[3] / "configs" / "demo.yaml"


def test_table_and_pictures_come_from_the_runs(tmp_path, capsys):
    config = yaml.safe_load(CONFIG.read_text())
    config["data"]["init_args"] |= {"train_samples": 128, "test_samples": 64}
    config["trainer"]["max_steps"] = 2
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(config))
    assert main(["demo", str(small), "--runs", str(tmp_path)]) == 0
    (folder,) = tmp_path.glob("demo-*")
    printed = capsys.readouterr().out
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}
    assert set(results) == {f"{s}-{m}" for s in ("good", "poor") for m in ("conv", "spectral", "diffstride")}
    for result in results.values():
        assert f"{result['accuracy']:.3f}" in printed
        assert f"{(result['macs'] + result['resampling_macs']) / 1e6:.2f} M" in printed
    assert "which strides up to (4, 2) keep" in " ".join(printed.split())
    rows = json.loads((folder / "results.json").read_text())
    assert [(row["method"], row["start"]) for row in rows[3:5]] == [("conv", [3, 3]), ("spectral", [3, 3])]
    assert rows[5]["strides"] == results["poor-diffstride"]["strides"]
    for name in ("strides", "windows", "example"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text()[:2000]


def test_a_wrong_config_is_one_line(tmp_path, capsys):
    assert main(["demo", str(tmp_path / "none.yaml"), "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "none.yaml") in error
    assert error.count("\n") == 1
