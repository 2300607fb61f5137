"""Every command, every kind of wrong input: one line that names the cure, status 2, nothing written, nothing lost."""

import contextlib
import os
import re
import resource
import shlex
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from wrong import content, without_bars

from diffstride.cli import COMMANDS, main
from diffstride.training.fit import train

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A working folder with a set of pictures, two runs, one of which is a study's, and files that are nothing."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DIFFSTRIDE_CACHE", str(tmp_path_factory.mktemp("cache")))
        draw = np.random.default_rng(0)
        for split, count in ("train", 8), ("test", 4):
            for i in range(count):
                path = Path("set", split, f"class{i % 2}", f"{i}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        demo = yaml.safe_load(CONFIG.read_text())
        demo["data"]["init_args"] = {"train_samples": 64, "test_samples": 32, "batch_size": 32}
        demo["model"] |= {"milestones": [3, 4, 5]}
        demo["model"]["network"]["init_args"] |= {"width": 4}
        demo["trainer"] |= {"max_steps": 2, "enable_progress_bar": False}
        Path("demo.yaml").write_text(yaml.safe_dump(demo))
        pictures = demo | {"data": {"class_path": "ImageData", "init_args": {"path": "set", "batch_size": 4}}}
        pictures["model"]["network"]["init_args"] |= {"in_channels": 3, "num_classes": 2}
        Path("pictures.yaml").write_text(yaml.safe_dump(pictures | {"name": "pictures"}))
        train(["--config", "pictures.yaml"])
        study = {"base": "demo.yaml", "axes": {"seed": [0]}, "tables": [], "figures": []}
        Path("tiny.yaml").write_text(yaml.safe_dump(study))
        assert main(["study", "tiny.yaml"]) == 0
        Path("empty").touch()
        Path("folder").mkdir()
        Path("text").write_text("hello")
        Path("binary").write_bytes(bytes(range(256)))
        Path("broken.yaml").write_text("a: [1")
        Path("list.yaml").write_text("- 1\n- 2\n")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of it to work in."""
    folder = shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(tmp_path / "cache"))
    return folder


def refused(line, capsys, new=None):
    """The one line that answers a command; the status is 2, and no name and no byte in the folder has changed.

    Only the folder `new` may be left, of a run that had begun.
    """
    before = content(Path())
    assert main(shlex.split(line)) == 2
    error = without_bars(capsys.readouterr().err)
    assert error.startswith("diffstride: error: ")
    assert error.count("\n") == 1, error
    after = {name: data for name, data in content(Path()).items() if new is None or not name.startswith(new)}
    assert after.keys() == before.keys()
    assert after == before
    return error


class Malicious:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return open, ("executed", "w")


def text(file, content):
    return lambda: Path(file).write_text(content)


def binary(file):
    return lambda: Path(file).write_bytes(bytes(range(256)))


def cut(file):
    return lambda: Path(file).write_bytes(Path(file).read_bytes()[:-100])


def folder_for(file):
    def change():
        Path(file).unlink(missing_ok=True)
        Path(file).mkdir()

    return change


def pickled(file):
    """A checkpoint with something to execute, as torch writes them."""

    def change():
        state = {"state_dict": Malicious(), "global_step": 2, "epoch": 0, "loops": {}}
        torch.save(state, file)

    return change


def study_of(content):
    return text("other.yaml", f"base: demo.yaml\n{content}")


def table_of(table):
    return text(f"{TINY}/study.yaml", f"name: tiny\nruns: {{seed0: {{seed: 0}}}}\ntables: [{table}]\n")


PICTURES, TINY = "runs/pictures", "runs/tiny"
LAST, DESCRIBED, RESULT = (f"{PICTURES}/{name}" for name in ("checkpoints/last.ckpt", "config.yaml", "result.json"))
DONE, ASKED = f"{TINY}/seed0/result.json", f"{TINY}/seed0/request.json"
RESUME = "--config pictures.yaml --ckpt_path last --trainer.max_steps 3"

# Command and arguments; what its answer must match; what is done to the folder before.
CASES = [
    # fit: keys and classes
    ("fit", r"model.network, data must be given: start from one of configs/ with --config FILE"),
    ("fit --nothing 1", r"unknown key nothing: --print_config shows"),
    ("fit --config demo.yaml --model.cost_wieght 1", r"unknown key .*: did you mean model.cost_weight\?"),
    ("fit --config demo.yaml --trainer.max_step 1", r"unknown key .*: did you mean trainer.max_steps\?"),
    ("fit --config demo.yaml --model.network ResNte", r"one of .*, got 'ResNte': did you mean ResNet\?"),
    ("fit --config demo.yaml --data ImagData", r"one of .*, got 'ImagData': did you mean ImageData\?"),
    ("fit --config demo.yaml extra", r"unrecognized arguments: extra"),
    # fit: values of a wrong type
    ("fit --config demo.yaml --data.batch_size many", r"data.batch_size must be a whole number, got many"),
    ("fit --config demo.yaml --data.batch_size 2.5", r"data.batch_size must be a whole number, got 2.5"),
    ("fit --config demo.yaml --trainer.max_steps x", r"trainer.max_steps must be a whole number, got x"),
    ("fit --config demo.yaml --seed_everything x", r"seed_everything must be .* a whole number, got x"),
    ("fit --config demo.yaml --model.learning_rates 3", r"model.learning_rates must be a list, got 3"),
    ("fit --config demo.yaml --model.network.strides x", r"model.network.strides must be a list, got x"),
    ("fit --config demo.yaml --trainer.precision 12", r"trainer.precision must be .*'bf16-mixed'.*, got 12"),
    # fit: out of range
    ("fit --config demo.yaml --data.batch_size 0", r"batch_size must be at least 1, not 0"),
    ("fit --config demo.yaml --data.batch_size 1000", r"larger than the 64 training samples .*: lower batch_size"),
    ("fit --config demo.yaml --data.train_samples 0", r"train_samples must be at least 1, not 0"),
    ("fit --config demo.yaml --seed_everything -1", r"seed_everything must be between 0 and 4294967295, got -1"),
    ("fit --config demo.yaml --checkpoint_minutes -1", r"checkpoint_minutes must be >=0, got -1"),
    ("fit --config demo.yaml --trainer.max_steps -3", r"max_steps` must be .* -3"),
    ("fit --config demo.yaml --trainer.devices 0", r"devices='0'.* is not a valid input"),
    ("fit --config demo.yaml --model.momentum -1", r"momentum must be >= 0 and < 1, got -1"),
    ("fit --config demo.yaml --model.label_smoothing 2", r"label_smoothing must be >= 0 and < 1, got 2"),
    ("fit --config demo.yaml --model.weight_decay -1", r"weight_decay must be >= 0 and finite, got -1"),
    ("fit --config demo.yaml --model.stride_lr .inf", r"stride_lr must be >= 0 and finite, got inf"),
    ("fit --config demo.yaml --model.cost_weight .nan", r"cost_weight must be >= 0 and finite, got nan"),
    ("fit --config demo.yaml --model.milestones [3,2,1]", r"milestones must be increasing steps >= 1, got"),
    ("fit --config demo.yaml --model.network.strides [[0,0]]", r"stride must be >= 1, got 0, 0"),
    ("fit --config demo.yaml --model.network.downsample pool", r"downsample must be one of .*, got 'pool'"),
    # fit: arguments that do not go together
    ("fit --config demo.yaml --model.network.num_classes 7", r"set model.network.num_classes to 4"),
    ("fit --config demo.yaml --model.network.in_channels 3", r"the network cannot take .* in_channels"),
    ("fit --config demo.yaml --model.learning_rates []", r"learning_rates must have one entry more than milestones"),
    ("fit --config demo.yaml --model.budget 1e-9", r"budget must be between .*, got 1e-09"),
    ("fit --config demo.yaml --trainer.logger false", r"trainer.logger cannot be set: .*--runs, --name"),
    ("fit --config demo.yaml --trainer.accelerator abacus", r"'abacus'.* Available names are: .*cpu"),
    # fit: its configuration
    ("fit --config nowhere.yaml", r"cannot open nowhere.yaml \(No such file .*\): check the path; --config"),
    ("fit --config folder", r"cannot open folder \(Is a directory\): check the path; --config takes a YAML file"),
    ("fit --config empty", r"empty must be a mapping .* as configs/demo.yaml is, got None"),
    ("fit --config binary", r"binary is not YAML: "),
    ("fit --config broken.yaml", r"broken.yaml is not YAML: .*line 1"),
    ("fit --config list.yaml", r"list.yaml must be a mapping .*, got \[1, 2\]"),
    ("fit --config tiny.yaml", r"tiny.yaml: unknown key axes"),
    ("fit --config c.yaml", r"c.yaml: unknown key modle: did you mean model\?", text("c.yaml", "modle: {}")),
    # fit: where it writes
    ("fit --config pictures.yaml", r"holds a run already: give another --name, or resume it with --ckpt_path last"),
    ("fit --config demo.yaml --runs text", r"cannot write to text/demo \(Not a directory\): give another --runs"),
    ("fit --config demo.yaml --name ''", r"--name must be a plain file name .*, got ''"),
    # fit: its data
    ("fit --config pictures.yaml --name new --data.path ./no", r"\./no does not exist: check the path"),
    ("fit --config pictures.yaml --name new --data.path folder", r"folder has no images: it must be a folder with train"),
    ("fit --config pictures.yaml --name new --data.path text", r"text is not a parquet file: give"),
    ("fit --config pictures.yaml --name new --data.path x.parquet", r"could not read x.parquet", binary("x.parquet")),
    ("fit --config pictures.yaml --name new --data.train_split no", r"no split 'no': set train_split and test_split"),
    ("fit --config pictures.yaml --name new --data.image_column no", r"no column 'no': set image_column to one of"),
    ("fit --config pictures.yaml --name new", r"row 0 .*0.png\): not a readable", binary("set/train/class0/0.png")),
    # fit: the checkpoint that it goes on from
    ("fit --config pictures.yaml --ckpt_path nowhere.ckpt", r"there is no checkpoint nowhere.ckpt: check --name"),
    ("fit --config pictures.yaml --ckpt_path folder", r"there is no checkpoint folder: check --name"),
    ("fit --config pictures.yaml --ckpt_path empty", r"empty is not a readable checkpoint"),
    ("fit --config pictures.yaml --ckpt_path binary", r"binary is not a readable checkpoint"),
    (f"fit --config pictures.yaml --ckpt_path {LAST}", r"last good one is .*epoch=0.ckpt \(step 2\)", cut(LAST)),
    ("fit --config pictures.yaml --ckpt_path bad.ckpt", r"bad.ckpt is not a readable", pickled("bad.ckpt")),
    ("fit --config pictures.yaml --ckpt_path last", r"is finished \(max_steps 2\): raise --trainer.max_steps"),
    (f"fit {RESUME} --model.network.width 5", r"is of another network: resume with --config"),
    (f"fit {RESUME} --data.batch_size 100", r"batch_size 100 is larger than"),
    (f"fit {RESUME} --data.path folder", r"folder has no images: it must be a folder with train"),
    (f"fit {RESUME}", r"strides.csv is damaged, .*: remove it", binary(f"{PICTURES}/strides.csv")),
    (f"fit {RESUME}", r"metrics.csv is damaged, .*: remove it", text(f"{PICTURES}/metrics.csv", "a,b\n1,2\n")),
    # study
    ("study", r"arguments are required: FILE.yaml \(see diffstride study --help\)"),
    ("study nowhere.yaml", r"cannot open nowhere.yaml \(No such file .*\): check the path; it must be a YAML file"),
    ("study folder", r"cannot open folder \(Is a directory\): check the path; it must be a YAML file"),
    ("study empty", r"empty: the file must be a mapping from names to values, got null"),
    ("study binary", r"binary is not YAML"),
    ("study broken.yaml", r"broken.yaml is not YAML: .*line 1"),
    ("study demo.yaml", r"demo.yaml: key must be one of name, question, .*, got 'data'"),
    ("study tiny.yaml --process 2", r"unknown option --process: did you mean --processes\?"),
    ("study tiny.yaml --dry", r"unknown option --dry: did you mean --dry-run\?"),
    ("study tiny.yaml extra", r"cannot read the argument 'extra': arguments for the runs are given as --NAME VALUE"),
    ("study tiny.yaml --processes two", r"--processes: invalid int value: 'two'"),
    ("study tiny.yaml --processes 0", r"--processes must be at least 1, got 0"),
    ("study tiny.yaml --name new --ray localhost:1", r"--ray localhost:1: no cluster answers: start one with"),
    ("study tiny.yaml --name new --ray localhost:x", r"--ray localhost:x: no cluster answers: start one with"),
    ("study tiny.yaml --processes 2 --ray auto", r"--ray: not allowed with argument --processes"),
    ("study tiny.yaml --model.network.widht 3", r"unknown key .*: did you mean model.network.width\?"),
    ("study tiny.yaml --model.network.width x", r"model.network.width must be a whole number, got x"),
    ("study tiny.yaml --seed_everything 3", r"--seed_everything cannot be given: the axis seed of tiny.yaml sets it"),
    ("study tiny.yaml --model.cost_weight 3", r"other settings \(model.cost_weight 0.3, now 3\): give another --name"),
    ("study tiny.yaml --runs text", r"cannot write to text/tiny \(Not a directory\): give another --runs"),
    ("study tiny.yaml --name ../x", r"--name must be a plain file name .*, got '../x'"),
    ("study other.yaml", r"the key 'axes' is missing", study_of("")),
    ("study other.yaml", r"key must be one of .*, got 'axis': did you mean axes\?", study_of("axis: {seed: [0]}")),
    ("study other.yaml", r"axes must be one of .*, got 'sede': did you mean seed\?", study_of("axes: {sede: [0]}")),
    ("study other.yaml", r"axes must be a mapping from names to values, got 3", study_of("axes: 3")),
    ("study other.yaml", r"axes: seed has no values", study_of("axes: {seed: []}")),
    ("study other.yaml", r"run seed-1: seed_everything must be between 0 and", study_of("axes: {seed: [-1]}")),
    ("study other.yaml", r"method must be one of conv, .*, got 'pool'", study_of("axes: {method: [pool]}")),
    ("study other.yaml", r"cpus must be a number >= 1, got 0", study_of("axes: {seed: [0]}\ncpus: 0")),
    ("study other.yaml", r"name must be a text, got \[3\]", study_of("axes: {seed: [0]}\nname: [3]")),
    ("study other.yaml", r"cannot open no.yaml \(the base", text("other.yaml", "base: no.yaml\naxes: {seed: 0}")),
    ("study tiny.yaml", r"result.json is damaged .*: remove it", text(DONE, "{")),
    ("study tiny.yaml", r"result.json is not the result of a run.*: remove it", text(DONE, "{}")),
    ("study tiny.yaml", r"request.json cannot be read .*: remove runs/tiny/seed0", binary(ASKED)),
    ("study tiny.yaml", r"request.json cannot be read", text(ASKED, '{"config":1,"settings":2,"cpus":1}')),
    # report
    ("report", r"arguments are required: RUN_OR_STUDY"),
    ("report nowhere", r"there is no folder nowhere: give one that"),
    ("report text", r"there is no folder text: give one that"),
    ("report folder", r"folder is not the folder of a run or of a study: give one that"),
    (f"report {PICTURES} --uot x.html", r"unrecognized arguments: .*: did you mean --out\?"),
    (f"report {PICTURES} --out page.txt", r"--out must end in .html, got page.txt"),
    (f"report {PICTURES} --out nowhere/page.html", r"there is no folder nowhere: make it, or give another path"),
    (f"report {PICTURES} --out page.html", r"page.html is a folder: give the path of a file", folder_for("page.html")),
    (f"report {PICTURES}", r"result.json is damaged .*: remove it", cut(RESULT)),
    (f"report {PICTURES}", r"result.json is damaged .*: remove it", binary(RESULT)),
    (f"report {PICTURES}", r"result.json is not the result of a run.*: remove it", text(RESULT, "[1]")),
    (f"report {PICTURES}", r"cannot open .*result.json \(Is a directory\)", folder_for(RESULT)),
    (f"report {PICTURES}", r"strides.csv is damaged, .*: remove it", binary(f"{PICTURES}/strides.csv")),
    (f"report {PICTURES}", r"metrics.csv is damaged, .*: remove it", binary(f"{PICTURES}/metrics.csv")),
    (f"report {TINY}", r"study.yaml cannot be read .*writes it anew", text(f"{TINY}/study.yaml", "a: [1")),
    (f"report {TINY}", r"study.yaml cannot be read .*writes it anew", text(f"{TINY}/study.yaml", "")),
    (f"report {TINY}", r"cannot be read .*a table of macs needs columns", table_of("{rows: seed, value: macs}")),
    (f"report {TINY}", r"cannot be read .*no table has the value mcas", table_of("{rows: a, columns: b, value: mcas}")),
    (f"report {TINY}", r"study.yaml cannot be read .*'rows'", table_of("{columns: seed}")),
    # demo
    ("demo nowhere.yaml", r"there is no file nowhere.yaml: leave it out, for the one that comes with the package"),
    ("demo folder", r"there is no file folder: leave it out"),
    ("demo empty", r"empty must be a mapping"),
    ("demo binary", r"binary is not YAML"),
    ("demo broken.yaml", r"broken.yaml is not YAML"),
    ("demo pictures.yaml", r"the demo is about PlantedBands and TinyCNN: leave its file out"),
    ("demo tiny.yaml", r"tiny.yaml: unknown key axes"),
    ("demo demo.yaml extra", r"unrecognized arguments: extra \(see diffstride demo --help\)"),
    ("demo demo.yaml --run x", r"did you mean --runs\?"),
    ("demo demo.yaml --runs", r"--runs: expected one argument"),
    ("demo demo.yaml --runs text", r"cannot write to text/.* \(Not a directory\): give another --runs"),
    # bench
    ("bench layer", r"unknown suite 'layer'; there are layers, convolutions, steps: did you mean layers\?"),
    ("bench --repeat 3", r"did you mean --repeats\?"),
    ("bench --dtypes float8", r"invalid choice: 'float8' \(choose from .*float32"),
    ("bench --repeats x", r"--repeats: invalid int value: 'x'"),
    ("bench --repeats 1", r"--repeats must be at least 2, for a spread, got 1"),
    ("bench --seed -1", r"--seed must be between 0 and"),
    ("bench --device tpu", r"invalid choice: 'tpu'"),
    ("bench --calibrate layers", r"--calibrate takes the place of the suites: leave out their names"),
    ("bench --out nowhere/x.json", r"there is no folder nowhere: make it, or give another path"),
    ("bench --out folder", r"folder is a folder: give the path of a file"),
    # predict
    (f"predict {PICTURES}", r"arguments are required: FILE"),
    ("predict nowhere set", r"there is no checkpoint nowhere: give the folder of a run"),
    ("predict folder set", r"there is no checkpoint folder/checkpoints/last.ckpt: give the folder of a run"),
    ("predict text set", r"there is no config.yaml beside text: give a checkpoint where `diffstride fit` left it"),
    (f"predict {PICTURES} folder", r"folder is an empty folder: give files"),
    (f"predict {PICTURES} set --topp 1", r"did you mean --top\?"),
    (f"predict {PICTURES} set --top x", r"--top: invalid int value: 'x'"),
    (f"predict {PICTURES} set --top 0", r"--top must be at least 1, got 0"),
    (f"predict {PICTURES} set --csv text", r"text is there already: give another path, or --force to replace it"),
    (f"predict {PICTURES} set --csv folder --force", r"folder is a folder: give the path of a file"),
    (f"predict {PICTURES} set --csv nowhere/x.csv", r"there is no folder nowhere: make it, or give another path"),
    (f"predict {TINY}/seed0 set", r"was trained on PlantedBands, which is made by code: it reads no files"),
    (f"predict {PICTURES} set", r"is not a readable checkpoint: the last good one is .*epoch=0", cut(LAST)),
    (f"predict {PICTURES} set", r"is not a readable checkpoint", text(LAST, "")),
    (f"predict {PICTURES} set", r"is not a readable checkpoint", pickled(LAST)),
    (f"predict {PICTURES} set", r"config.yaml does not describe a network: ", binary(DESCRIBED)),
    (f"predict {PICTURES} set", r"does not describe a network: .* as `diffstride fit` left", text(DESCRIBED, "")),
    # export
    (f"export {PICTURES}", r"arguments are required: FILE"),
    ("export nowhere model.onnx", r"there is no checkpoint nowhere: give the folder of a run"),
    (f"export {TINY} model.onnx", r"there is no checkpoint runs/tiny/checkpoints/last.ckpt: give the folder of a run"),
    ("export text model.onnx", r"there is no config.yaml beside text"),
    (f"export {PICTURES} model.onx", r"model.onx must end in .onnx or .safetensors"),
    (f"export {PICTURES} model.onnx --bacth 2", r"did you mean --batch\?"),
    (f"export {PICTURES} model.onnx --batch x", r"--batch: invalid int value: 'x'"),
    (f"export {PICTURES} model.onnx --batch 0", r"--batch must be at least 1, got 0"),
    (f"export {PICTURES} model.onnx --input 3,x", r"must be whole numbers with commas, as in 3,32,32, got '3,x'"),
    (f"export {PICTURES} model.onnx --input 1,16,16", r"cannot take inputs of .*--input says another shape"),
    (f"export {PICTURES} model.safetensors --batch 2", r"--batch is for .onnx files, which are timed: leave it out"),
    (f"export {PICTURES} model.onnx", r"is there already: .*--force to replace it", text("model.onnx", "kept")),
    (f"export {PICTURES} model.onnx --force", r"is a folder: give the path of a file", folder_for("model.onnx")),
    (f"export {PICTURES} nowhere/model.onnx", r"there is no folder nowhere: make it, or give another path"),
    (f"export {PICTURES} model.safetensors", r"is not a readable checkpoint: the last good one", cut(LAST)),
    (f"export {PICTURES} model.safetensors", r"is not a readable checkpoint", pickled(LAST)),
    (f"export {PICTURES} model.safetensors", r"config.yaml does not describe a network", text(DESCRIBED, "a: [1")),
    (f"export {PICTURES} model.safetensors", r"result.json is damaged .*: remove it", text(RESULT, "")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "answer", "change"), [(*case, None)[:3] for case in CASES], ids=[line for line, *_ in CASES]
)
def test_one_line_names_the_cure_and_nothing_is_written(line, answer, change, here, capsys):
    if change is not None:
        change()
    assert re.search(answer, refused(line, capsys))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_been_tried(command):
    assert sum(line.split()[0] == command for line, *_ in CASES) >= 10


def test_the_command_itself(here, capsys):
    for name, near in ("fti", "fit"), ("reprot", "report"), ("--halp", "--help"):
        answer = refused(name, capsys)
        assert f"unknown command {name!r}; there are {', '.join(COMMANDS)}" in answer
        assert near == "--help" or answer.endswith(f": did you mean {near}?\n")
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: diffstride [--help] [--version] COMMAND")


# What a disk refuses. Nothing is imitated: the kernel refuses whatever grows beyond the limit, as a full disk does.


@contextlib.contextmanager
def full_disk(free):
    """No file of this process may have more than so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_disk_is_full(here):
    with full_disk(4), Path("file").open("wb", buffering=0) as file:
        assert file.write(b"12345") == 4
        with pytest.raises(OSError, match="File too large"):
            file.write(b"5")


@pytest.mark.parametrize(
    ("line", "answer", "change"),
    [
        ("fit --config demo.yaml", r"cannot write in runs/demo \(File too large\): make room, and start again", None),
        (f"fit {RESUME}", r"cannot write .*: make room, and resume with --ckpt_path last \(step 2\)", None),
        (f"fit {RESUME}", r"make room, and resume with --ckpt_path last \(step 2\)", lambda: os.unlink(RESULT)),
        ("study tiny.yaml", r"cannot write runs/tiny/study.yaml \(File too large\): make room", None),
        (f"report {PICTURES}", r"cannot write runs/pictures/report.html \(File too large\): make room", None),
        (f"report {TINY}", r"cannot write runs/tiny/report.html .*: make room", text(f"{TINY}/report.html", "kept")),
        (f"predict {PICTURES} set --csv x.csv", r"cannot write x.csv \(File too large\): make room", None),
        (f"predict {PICTURES} set --csv x.csv --force", r"cannot write x.csv", text("x.csv", "kept")),
        pytest.param(f"export {PICTURES} model.onnx --repeats 0", r"cannot write model.onnx .*give another path", None,
                     marks=pytest.mark.long),
        (f"export {PICTURES} model.safetensors --force", r"cannot write model.safetensors",
         text("model.safetensors", "kept")),
    ],
)  # fmt: skip
def test_a_full_disk_leaves_what_was_there(line, answer, change, made, here, capsys, monkeypatch):
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(made.parent / "cache0"))  # what was decoded before
    if change is not None:
        change()
    with full_disk(64):
        error = refused(line, capsys, new="runs/demo")
    assert re.search(answer, error)


@pytest.mark.parametrize(
    ("moment", "free", "step", "answer"),
    [
        ("classifier.Classifier.on_train_batch_end", 10_000, 2, r"cannot write \S+\.ckpt \(File too large\)"),
        ("callbacks.provenance", 64, 3, r"cannot write runs/pictures/result.json \(File too large\)"),
    ],
)
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(moment, free, step, answer, here, capsys, monkeypatch):
    """And the run goes on from it to its end once there is room."""
    old = Path(RESULT).read_bytes()

    def fills(*_, **__):
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.RLIM_INFINITY))
        return {}

    with full_disk(resource.RLIM_INFINITY), monkeypatch.context() as patch:
        patch.setattr(f"diffstride.training.{moment}", fills)
        assert main(["fit", *RESUME.split()]) == 2
    error = without_bars(capsys.readouterr().err)
    assert re.search(rf"{answer}: make room, and resume with --ckpt_path last \(step {step}\)", error)
    assert error.count("\n") == 1
    assert not list(Path().rglob("*.tmp"))
    assert Path(RESULT).read_bytes() == old
    assert torch.load(LAST, weights_only=True)["global_step"] == step
    Path(RESULT).unlink()
    assert main(["fit", *RESUME.split()]) == 0
    assert '"steps": 3' in Path(RESULT).read_text()


# Files in which something would be executed, if they were unpickled.


def test_a_pickle_is_not_a_checkpoint(here):
    """What the cases above with `pickled` would have done."""
    pickled("bad.ckpt")()
    torch.load("bad.ckpt", weights_only=False)["state_dict"].close()
    assert Path("executed").exists()


@pytest.mark.parametrize("command", [f"report {PICTURES}", f"report {TINY}", "study tiny.yaml"])
def test_a_page_is_made_without_what_a_malicious_checkpoint_holds(command, here, capsys):
    pickled(LAST)()
    pickled(f"{TINY}/seed0/checkpoints/last.ckpt")()
    assert main(command.split()) == 0
    assert not Path("executed").exists()
    if command == f"report {PICTURES}":
        page = Path(PICTURES, "report.html").read_text()
        assert "is not a readable checkpoint: the last good one is" in page


def test_a_malicious_array_in_the_cache_is_decoded_anew(here):
    arguments = ["fit", "--config", "pictures.yaml", "--name"]
    assert main([*arguments, "one"]) == 0
    cached = [*Path(os.environ["DIFFSTRIDE_CACHE"]).glob("*.npy")]
    good = {path: path.read_bytes() for path in cached}
    assert len(good) == 2
    for path in cached:
        np.save(path, np.array([Malicious()], dtype=object), allow_pickle=True)
    assert main([*arguments, "two"]) == 0
    assert not Path("executed").exists()
    assert {path: path.read_bytes() for path in cached} == good


# What the system refuses to one who is not root.


@pytest.fixture
def mine(made, monkeypatch):
    """A copy of the folder that belongs to whom the system may refuse: root is another user for the time of a test."""
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(made / "nowhere"))
    with tempfile.TemporaryDirectory() as above:  # those of pytest are for root alone
        folder = shutil.copytree(made, Path(above, "here"))
        monkeypatch.chdir(folder)
        is_root = os.geteuid() == 0
        if is_root:
            Path(above).chmod(0o755)
            for path in (folder, *folder.rglob("*")):
                os.chown(path, 65534, 65534)
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o755)
            monkeypatch.chdir("/")


@pytest.mark.parametrize(
    ("line", "locked", "mode", "answer"),
    [
        (
            "fit --config demo.yaml",
            "runs",
            0o555,
            r"cannot write to runs/demo \(Permission denied\): give another --runs",
        ),
        (
            "fit --config demo.yaml",
            "demo.yaml",
            0,
            r"cannot read demo.yaml \(Permission denied\): give leave to read it",
        ),
        ("study tiny.yaml", "tiny.yaml", 0, r"cannot read tiny.yaml \(Permission denied\): give leave to read it"),
        ("study tiny.yaml", TINY, 0o555, r"cannot write runs/tiny/\S+ \(Permission denied\): give leave to write it"),
        (f"report {PICTURES}", RESULT, 0, r"cannot read \S+/result.json \(Permission denied\): give leave to read it"),
        (f"report {PICTURES}", PICTURES, 0, r"\(Permission denied\): give leave to reach it"),
        (
            f"predict {PICTURES} set",
            DESCRIBED,
            0,
            r"cannot read \S+/config.yaml \(Permission denied\): give leave to read",
        ),
        (f"predict {PICTURES} set", LAST, 0, r"cannot read \S+/last.ckpt \(Permission denied\): give leave to read it"),
        (
            f"predict {PICTURES} set --csv folder/x.csv",
            "folder",
            0o555,
            r"cannot write folder/x.csv \(the folder is locked\)",
        ),
        (
            f"export {PICTURES} folder/x.safetensors",
            "folder",
            0o555,
            r"cannot write folder/x.safetensors \(the folder is locked\)",
        ),
        (
            "bench --quick --out folder/x.json",
            "folder",
            0o555,
            r"cannot write folder/x.json \(the folder is locked\): give leave",
        ),
    ],
)
def test_what_is_locked(line, locked, mode, answer, mine, capsys):
    Path(locked).chmod(mode)
    names = sorted(os.walk("."))
    assert main(line.split()) == 2
    error = without_bars(capsys.readouterr().err)
    assert re.search(answer, error), error
    assert error.count("\n") == 1
    assert sorted(os.walk(".")) == names
