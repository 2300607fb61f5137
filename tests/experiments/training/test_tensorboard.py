"""The TensorBoard events of a run, read back from its files."""

import csv
import json
import re

import pytest

from diffstride.errors import RunError
from diffstride.experiments import history
from diffstride.experiments.training import Classifier, fit

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2


@pytest.fixture
def run(run):
    """Train for two epochs of six steps; returns the run's folder."""
    epochs = ["--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "2"]
    return lambda *more: run("run", *epochs, *more, steps=-1)[0].run_folder


def shown(folder):
    """Return the points (step, value) by tag, in the order of writing."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def logged(folder, column):
    with (folder / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row[column]]


def test_the_curves_have_the_values_of_the_run_s_files(run):
    folder = run("--model.budget", "0.9", "--model.network.downsample_options.window", "inner")
    curves, _ = shown(folder)
    rows = history.read_rows(folder / "strides.csv")
    for axis in "height", "width":
        of_axis = [row for row in rows if row.axis == axis]
        assert curves[f"stride/down/{axis}"] == [(r.step, pytest.approx(r.stride, rel=1e-5)) for r in of_axis]
        assert curves[f"size/down/{axis}"] == [(r.step, r.size) for r in of_axis]
    columns = "val/accuracy", "val/loss", "train/loss", "train/stride_cost", "lr-SGD/strides", "lr-SGD/weights"
    for column in columns:
        points = logged(folder, column)
        assert curves[column] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], column
    macs = dict(curves["train/macs"])
    assert set(logged(folder, "train/macs")) < set(macs.items())
    result = json.loads((folder / "result.json").read_text())
    assert macs[12] == result["macs"] + result["resampling_macs"]


def test_one_chart_has_all_strides_and_another_all_sizes(run):
    network = ["--model.network", "ResNet", "--model.network.in_channels", "1", "--model.network.width", "0.03"]
    more = ["--model.network.num_classes", "4", "--model.network.strides", "[2,1,2,1,2]", "--trainer.max_epochs", "1"]
    folder = run(*network, "--model.network.downsample", "diffstride", *more)
    curves, events = shown(folder)
    places = {f"{row.layer}/{row.axis}" for row in history.read_rows(folder / "strides.csv")}
    assert len(places) == 10

    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    together = [{tag for tag in curves if re.match(chart.multiline.tag[0], tag)} for chart in charts]  # as pages do
    assert together == [{f"{kind}/{place}" for place in places} for kind in ("stride", "size")]


def test_a_resumed_run_shows_every_step_once(run, monkeypatch):
    class Stops(Classifier):
        def on_train_batch_end(self, *_):
            if self.trainer.global_step == 10:  # the checkpoint is that of step 6
                raise RunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(fit, "Classifier", Stops)
        with pytest.raises(RunError, match="stopped"):
            run()
    folder = run("--ckpt_path", "last")
    curves, _ = shown(folder)
    for tag, points in curves.items():
        steps = [step for step, _ in points]
        assert steps == sorted(steps if "epoch" in tag else set(steps)), tag  # the epoch comes with every record
    rows = [row for row in history.read_rows(folder / "strides.csv") if row.axis == "width"]
    assert curves["stride/down/width"] == [(r.step, pytest.approx(r.stride, rel=1e-5)) for r in rows]
    assert [step for step, _ in curves["train/loss"]] == [1, 3, 5, 7, 9, 11]


def test_a_network_without_learnable_strides_shows_its_cost(run):
    folder = run("--model.network.downsample", "conv")
    curves, events = shown(folder)
    macs = curves["train/macs"]
    assert {value for _, value in macs} == {json.loads((folder / "result.json").read_text())["macs"]}
    assert [step for step, _ in macs] == [0, 6, 12]
    assert not any("stride/" in tag or "size" in tag for tag in curves)
    assert "custom_scalars__config__" not in events.Tags()["tensors"]
