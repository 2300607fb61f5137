"""`diffstride export`: from a run's folder to a checked file; printed tables and refused arguments."""

import json
import shutil
import sys
from importlib.metadata import version

import pytest
import torch
import yaml

from diffstride.experiments.commands.export import _strided
from diffstride.experiments.commands.main import main
from diffstride.experiments.training.runs import load
from tests.helpers.runs import small

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a tiny run."""
    return small(tmp_path_factory.mktemp("runs"), "tiny", steps=3)[0].run_folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


def edit(run, change):
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def export(*arguments):
    return main(["export", *map(str, arguments)])


def test_a_run_becomes_a_file(run, tmp_path, capsys):
    target = tmp_path / "model.onnx"
    assert export(run, target, "--batch", 3, "--repeats", 2) == 0
    printed = capsys.readouterr().out
    network = load(run).network
    assert not network.training
    end = ", ".join(f"{stride:.4g}" for stride in network.down.strides)
    for text in ("Learned strides", "│ down  │  3, 3 │", end, "32×32 → 18×18", f"{target.stat().st_size / 1e6:.3g} MB",
                 "batches of 1×32×32", "batch of 3×1×32×32", "as trained", "2 repeats in turns"):  # fmt: skip
        assert text in printed
    for model, times in {"as trained": 1, "strides fixed": 2, "strided convolutions": 2}.items():
        assert printed.count(f"│ {model}, ") == times
    images = torch.randn(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(target)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), network(images), rtol=1e-4, atol=1e-5)

    before = target.read_bytes()
    assert export(run, target) == 2
    assert "exists already: give another path, or --force" in capsys.readouterr().err
    target.write_text("other")
    assert export(run / "checkpoints" / "last.ckpt", target, "--force", "--repeats", 0) == 0
    assert len(target.read_bytes()) == len(before)
    assert "Latency" not in capsys.readouterr().out


def test_a_run_becomes_weights_without_pickle(run, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    target = tmp_path / "model.safetensors"
    assert export(run, target) == 0
    printed = capsys.readouterr().out
    assert "Learned strides" in printed
    assert f"{target.stat().st_size / 1e6:.3g} MB, weights and strides as trained" in printed
    assert "Latency" not in printed
    state = safetensors.load_file(target)
    trained = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {f"network.{name}" for name in state} == set(trained)
    assert all(torch.equal(value, trained[f"network.{name}"]) for name, value in state.items())


def test_both_formats_have_metadata(run, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    assert export(run, tmp_path / "model.onnx", "--repeats", 0) == 0
    assert export(run, tmp_path / "model.safetensors") == 0
    texts = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == texts
    facts = {name: json.loads(text) for name, text in texts.items()}
    result = json.loads((run / "result.json").read_text())
    assert set(facts) == {
        "network", "strides", "num_classes", "classes", "sample_shape", "mean", "std", "versions", "accuracy",
    }  # fmt: skip
    assert facts["network"]["class_path"] == "diffstride.experiments.models.TinyCNN"
    assert facts["network"]["init_args"]["width"] == 4
    assert facts["strides"] == {"down": pytest.approx(result["strides"]["down"], abs=1e-4)}
    assert (facts["sample_shape"], facts["accuracy"]) == ([1, 32, 32], result["accuracy"])
    assert facts["versions"]["torch"] == version("torch")
    # Of other steps than the result is, the accuracy is not known.
    (run / "result.json").write_text(json.dumps(result | {"steps": 2}))
    assert export(run, tmp_path / "other.safetensors") == 0
    with safetensors.safe_open(tmp_path / "other.safetensors", "pt") as file:
        assert set(texts) - set(file.metadata()) == {"accuracy"}


def test_a_run_with_a_budget(tmp_path, capsys):
    cli, _ = small(tmp_path, "tiny", "--model.budget", "3", steps=3)  # its state is in the checkpoint, too
    assert export(cli.run_folder, tmp_path / "model.onnx", "--repeats", 2) == 0
    assert capsys.readouterr().out.count("│ strided convolutions, ") == 2


def test_the_reason_for_no_strided_model_is_printed(run, tmp_path, capsys):
    edit(run, lambda config: config["model"]["network"]["init_args"].update(strides=[[1.5, 2]]))
    assert export(run, tmp_path / "model.onnx", "--repeats", 2, "--input", "1,32,32") == 0
    printed = capsys.readouterr().out
    assert "No strided model beside it: " in printed
    assert "stride must be an integer for downsample='conv', got" in printed
    assert "strided convolutions" not in printed
    one = load(run)
    one.config["model"]["network"]["init_args"]["downsample"] = "conv"
    assert _strided(one) == "the network has strided convolutions itself"
    one.config["model"]["network"] = {"class_path": "tests.helpers.processes.Dropped"}
    assert "downsample" in _strided(one)


def test_the_shape_can_be_given_for_data_that_do_not_exist(run, tmp_path, capsys):
    data = {"class_path": "diffstride.experiments.data.ImageData", "init_args": {"path": str(tmp_path / "nowhere")}}
    edit(run, lambda config: config.update(data=data))
    assert export(run, tmp_path / "model.onnx", "--repeats", 0) == 2
    error = capsys.readouterr().err
    assert "the run has no shape of a sample: give it, as in --input 3,32,32 (" in error
    assert error.count("\n") == 1
    assert export(run, tmp_path / "model.onnx", "--repeats", 0, "--input", "1,24,20") == 0
    assert "24×20 → " in capsys.readouterr().out


def test_a_network_without_learned_strides(run, tmp_path, capsys):
    edit(run, lambda config: config["model"]["network"]["init_args"].update(downsample="spectral"))
    checkpoint = run / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    del saved["state_dict"]["network.down.stride"]
    torch.save(saved, checkpoint)
    assert export(run, tmp_path / "model.onnx", "--repeats", 0) == 0
    assert "The network has no learned strides: it is exported as it is." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "3,32,32"), "the network cannot take inputs of 3×32×32 (see --input)"),
        (("--input", "1,70000,2"), "down's height must have at most 65536 samples to be frozen"),
        (("--input", "1,x"), "--input: must be a whole number of at least 1, got 'x'"),
        (("--repeats", "1"), "--repeats: must be a whole number of at least 2 or 0, got '1'"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, capsys, arguments, message):
    assert export(run, tmp_path / "model.onnx", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "there is no checkpoint"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml does not describe a network"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "does not describe a network"),
        (lambda run: (run / "config.yaml").write_text("model: {network: Nothing}"), "does not describe a network"),
        (
            lambda run: edit(run, lambda config: config["model"]["network"]["init_args"].update(width=5)),
            "is of another network than",
        ),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(run, tmp_path, capsys, damage, message):
    damage(run)
    assert export(run, tmp_path / "model.safetensors") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_targets_that_cannot_be_written(run, tmp_path, capsys):
    for name, message in {
        "nowhere/model.onnx": "there is no folder",
        "": "is a folder: give the path of a file",
        "model.pt": "model.pt must end in .onnx or .safetensors",
    }.items():
        assert export(run, tmp_path / name) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_package_has_its_cure(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export(run, tmp_path / "model.onnx") == 2
    assert "need the package onnx: pip install 'diffstride[export]'" in capsys.readouterr().err


def test_a_run_of_a_search_has_a_strided_network_beside_it(run):
    def search(config):
        config["model"] |= {"stride_search": "measured", "stride_steps": 0, "budget": 0.9, "search_steps": 3}

    edit(run, search)
    assert isinstance(_strided(load(run)), torch.nn.Module)
