"""`diffstride sensitivity`: measured changes of a run's strides, as a table, a file and a picture."""

import json

import pytest
import torch

import diffstride as ds
from diffstride.experiments.commands.main import main
from diffstride.experiments.figures.sensitivity import tradeoffs
from diffstride.experiments.training.measured import recalibrated_loss
from diffstride.experiments.training.runs import build_data, load
from tests.helpers.figures import inside
from tests.helpers.runs import small


@pytest.fixture(scope="module", params=["conv", "diffstride"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    arguments = ["--model.network.downsample", request.param, "--model.network.strides", "[[2, 2]]"]
    return small(folder, "plain", *arguments, steps=12)[0].run_folder


def test_the_file_and_the_table_have_the_measured_changes(trained, capsys):
    before = {file.name: file.read_bytes() for file in trained.iterdir() if file.is_file()}
    assert main(["sensitivity", str(trained), "--samples", "64", "--steps", "2"]) == 0
    report = json.loads((trained / "sensitivity.json").read_text())
    assert report["command"] == f"diffstride sensitivity {trained} --samples 64 --steps 2"
    run = load(trained)
    data = build_data(run.config["data"])
    if not ds.strides(run.network):
        ds.insert(run.network, torch.zeros(2, *data.sample_shape))
    loss = recalibrated_loss(data, torch.device("cpu"), samples=64, steps=2)
    found = ds.CostModel(run.network, torch.zeros(1, *data.sample_shape)).sensitivity(loss)
    assert [change["loss"] for change in report["changes"]] == pytest.approx([c.loss for c in found.changes], abs=1e-6)
    assert report["macs"] == found.cost
    printed = capsys.readouterr().out
    assert f"{found.changes[0].stride:.3f}" in printed
    assert repr(found).splitlines()[0] in printed
    assert "The gradient predicts" in printed
    assert (trained / "sensitivity.png").stat().st_size > 10000
    assert all((trained / name).read_bytes() == content for name, content in before.items())
    assert inside(tradeoffs(found, title="strides"))


def test_exclude_is_refused_where_no_stride_is_inserted(trained, capsys):
    learned = bool(ds.strides(load(trained).network))
    status = main(["sensitivity", str(trained), "--samples", "64", "--exclude", "conv"])
    assert status == (2 if learned else 0)
    assert ("--exclude is for networks without learned strides" in capsys.readouterr().err) == learned
