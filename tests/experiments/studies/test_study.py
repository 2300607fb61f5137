"""The meaning of a study's file, and the mistakes in it."""

import re
from pathlib import Path

import pytest
import yaml

from diffstride.errors import UsageError
from diffstride.experiments.studies.pictures import FIGURES as ALL_FIGURES
from diffstride.experiments.studies.study import label_of, load_study, run_name
from diffstride.experiments.training.fit import parse

STUDIES = Path(__file__).parents[3] / "configs" / "studies"
FIGURES = tuple(ALL_FIGURES)


def load(file, settings=None):
    return load_study(file, settings, FIGURES)


def test_all_combinations_in_order(write):
    study = load(write(axes={"method": ["conv", "spectral"], "strides": [[[2, 2]], [[3, 2]]], "seed": [0, 7]}))
    assert study.name == "tiny"
    assert [run.name for run in study.runs] == [
        "conv-2x2-seed0", "conv-2x2-seed7", "conv-3x2-seed0", "conv-3x2-seed7",
        "spectral-2x2-seed0", "spectral-2x2-seed7", "spectral-3x2-seed0", "spectral-3x2-seed7",
    ]  # fmt: skip
    assert study.runs[3].axes == {"method": "conv", "strides": [[3, 2]], "seed": 7}


def test_a_run_is_what_fit_would_do_with_these_arguments(write):
    axes = [
        {"method": "diffstride", "smoothness": 2, "basis": "dct", "budget": 1.5, "seed": 4},
        {"variant": {"wide": {"model.network.width": 9, "model.weight_decay": 0.5}}},
    ]
    first, second = load(write(axes=axes), {"data.seed": 3, "trainer.max_steps": 2}).runs
    config = parse(first.request.arguments())
    network = config.model.network.init_args
    assert (network.downsample, network.strides) == ("diffstride", [(3.0, 3.0)])
    assert network.downsample_options == {"smoothness": 2, "basis": "dct"}
    assert (config.model.budget, config.seed_everything, config.trainer.max_steps) == (1.5, 4, 2)
    assert config.data.init_args.batch_size == 32
    assert second.name == "variantwide"
    config = parse(second.request.arguments())
    assert (config.model.network.init_args.width, config.model.weight_decay) == (9, 0.5)


def test_names_are_folders_and_labels_leave_the_seed_out():
    axes = {
        "dataset": "../some where/cifar10",
        "method": "conv",
        "strides": [2, [3, 1.5]],
        "cost_weight": 0.1,
        "seed": 3,
    }
    assert run_name(axes) == "cifar10-conv-2-3x1.5-cost0.1-seed3"
    assert label_of(axes) == "cifar10 conv 2-3x1.5 cost0.1"
    assert re.fullmatch(r"[\w.-]+", run_name({"data.subset": "a/b c:é"}))
    assert label_of({"seed": 1}) == "all runs"


def test_requests_differ_where_the_user_would_see_it(write):
    def request(**changes):
        return load(write(**changes)).runs[0].request

    assert request().differences(request(question="Another?", cpus=2)) == []
    settings = {**load(write()).definition["settings"], "model.network.width": 8}
    assert request().differences(request(settings=settings)) == ["model.network.width 8, now 4"]


PIVOT = {"rows": "strides", "columns": "method"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": {}}, "key must be one of name, question, .* got 'axis': did you mean axes\\?"),
        ({"axes": None}, "a study must have axes"),
        ({"base": "broken.yaml"}, "it or its base is not YAML"),
        ({"axes": {"methods": ["conv"]}}, "axes must be one of .* got 'methods': did you mean method\\?"),
        ({"axes": {"method": ["convs"]}}, "axes: method must be one of conv, .*got 'convs'.*mean conv"),
        ({"axes": {"method": ["conv", "conv"]}}, "the run conv is there twice"),
        ({"axes": {"method": "conv", "strides": [3, 3]}}, "there twice: .* one value of strides is a list"),
        ({"axes": {"model.network.widht": [3]}}, "model.network.widht"),
        ({"axes": {"budget": ["much"]}}, "budget"),
        ({"axes": {"task": {"pitch": 3}}}, "axes: task\\['pitch'\\] must be a mapping, got 3"),
        ({"settings": [1]}, "\\['settings'\\] must be .* got \\[1\\]"),
        ({"latency": 0.5}, "\\['latency'\\] must be .* got 0.5"),
        ({"figures": ["stride"]}, "figures must be one of .* got 'stride': did you mean strides\\?"),
        ({"tables": [PIVOT | {"rows": "stride"}]}, "tables: rows must be one of .* got 'stride'"),
        ({"tables": [{"rows": "strides"}]}, "tables: columns must be one of .* got None"),
        ({"tables": [PIVOT | {"value": "macz"}]}, "tables: value must be one of"),
        ({"tables": [PIVOT | {"over": "conv", "value": "macs"}]}, "tables: value beside over must be one of accuracy"),
        ({"tables": [PIVOT | {"over": "avg"}]}, "tables: over must be one of .*, got 'avg'"),
        ({"tables": [PIVOT | {"paper": "table2"}]}, "tables: paper must be one of release, table1, table3"),
        ({"tables": [PIVOT | {"where": {"seed": 9}}]}, "tables: where: seed must be one of 0, 1, got 9"),
        ({"tables": [{"rows": "seed", "value": "cutoffs", "paper": "table1"}]}, "paper must be one of table2"),
    ],
)
def test_mistakes_are_one_line_that_names_the_place(write, tmp_path, changes, message):
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UsageError, match=message) as caught:
        load(write(**changes))
    assert "\n" not in str(caught.value)
    assert "tiny.yaml" in str(caught.value)


def test_labels_that_make_one_name_are_refused(write):
    for labels in ("a b", "a_b"), ("A", "a"), ("x", "../x"):
        with pytest.raises(UsageError, match="is there twice"):
            load(write(axes={"dataset": {label: {"model.network.width": 4} for label in labels}}))


def test_an_argument_cannot_go_over_an_axis(write):
    with pytest.raises(UsageError, match=r"--seed_everything cannot be given: the axis seed of the study sets it"):
        load(write(), {"seed_everything": 3})


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_study_is_right(file):
    study = load(file)
    assert study.definition["question"].endswith(("?", "has none."))
    assert len(study.runs) == len({run.name for run in study.runs})
    text = file.read_text()
    assert f"diffstride study configs/studies/{file.name}" in text
    if file.stem.endswith("-small"):
        assert study.definition["notes"]
        assert study.definition["gpus"] == 0
    elif study.definition["gpus"]:
        assert "Not run yet" in text.split("question:")[0]
        assert all(is_long(parse(run.request.arguments()).trainer) for run in study.runs)


def is_long(trainer):
    return (trainer.max_epochs or 0) >= 90 or (trainer.max_steps or 0) >= 30_000


def test_the_papers_table_is_asked_for_in_full():
    """Six initial strides, three methods, two sets, three seeds: Section 4.2 of the paper."""
    axes = yaml.safe_load((STUDIES / "table3.yaml").read_text())["axes"]
    study = load(STUDIES / "table3.yaml")
    assert len(study.runs) == 6 * 3 * 2 * 3
    assert axes["strides"] == [[2, 2, 2], [2, 2, 3], [1, 3, 1], [3, 1, 3], [3, 1, 2], [3, 2, 3]]
    hundred = [run for run in study.runs if run.axes["dataset"] == "cifar100"]
    config = parse(hundred[0].request.arguments())
    assert config.model.network.init_args.num_classes == 100
    assert config.trainer.max_epochs == 400
