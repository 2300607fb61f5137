"""`diffstride predict`: the classes of files are those that the network gives to the same samples of its data."""

import csv
import json
import os
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

pytest.importorskip("datasets")
soundfile = pytest.importorskip("soundfile")

from diffstride.experiments.commands.main import main  # noqa: E402
from diffstride.experiments.training import load  # noqa: E402
from diffstride.experiments.training.fit import train  # noqa: E402
from diffstride.experiments.training.runs import build_data  # noqa: E402
from tests.helpers.runs import small  # noqa: E402

RATE = 2000
PITCHES = {"high": 600, "low": 100, "middle": 300}
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.max_steps", "3"]


def tone(pitch, seconds, seed=0):
    noise = 0.1 * np.random.default_rng(seed).normal(size=round(seconds * RATE))
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(len(noise)) / RATE) + noise


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSTRIDE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder of sounds of unlike lengths, by class."""
    folder = tmp_path_factory.mktemp("sounds")
    for split, count in (("train", 12), ("test", 5)):
        for name, pitch in PITCHES.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                wave = tone(pitch, 0.2 + 0.05 * i, seed=i)
                soundfile.write(folder / split / name / f"{i}.wav", wave, RATE, subtype="PCM_16")
    return folder


def data_of(folder, **options):
    data = {"path": str(folder), "seconds": 0.4, "features": {"bands": 16}, "batch_size": 8, **options}
    return {"class_path": "AudioData", "init_args": data}


def network_of(classes):
    options = {"num_classes": classes, "width": 1 / 32, "downsample_options": {"smoothness": 1}}
    return {"class_path": "AudioCNN", "init_args": options}


def trained(folder, data, network):
    arguments = ["--data", json.dumps(data), "--model.network", json.dumps(network)]
    return train([*arguments, "--runs", str(folder), "--name", "run", *QUIET]).run_folder


@pytest.fixture(scope="module")
def run(sounds, caches, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs"), data_of(sounds, crop_seconds=0.2), network_of(3))


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_probabilities_are_those_of_the_network_on_its_own_test_split(run, sounds, tmp_path, capsys):
    target = tmp_path / "found.csv"
    assert main(["predict", str(run), str(sounds / "test"), "--top", "3", "--csv", str(target)]) == 0
    loaded = load(run)
    network, config = loaded.network, loaded.config
    data = build_data(config["data"])
    expected = {}
    for place in range(15):  # two views of each, whose logits are averaged
        inputs, _ = data.prepare_batch((data.test_set[0][place : place + 1], data.test_set[1][place : place + 1]))
        assert len(inputs) == 2
        with torch.no_grad():
            probabilities = network(inputs).mean(0).softmax(0).tolist()
        expected[place] = dict(zip(data.classes, probabilities, strict=True))
    found = rows(target)
    assert [row["rank"] for row in found] == ["1", "2", "3"] * 15
    files = sorted((sounds / "test").rglob("*.wav"))
    assert data.classes == ("high", "low", "middle")  # as folders are sorted, and so are the files
    for place, file in enumerate(files):
        own = {row["class"]: float(row["probability"]) for row in found if row["file"] == str(file)}
        assert own == pytest.approx(expected[place], abs=1e-5)
        assert list(own.values()) == sorted(own.values(), reverse=True)


def test_a_line_for_each_file_with_the_best_classes(run, sounds, capsys):
    files = [str(sounds / "test" / "low" / f"{i}.wav") for i in (0, 1)]
    assert main(["predict", str(run / "checkpoints" / "last.ckpt"), *files, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == files
    for line in lines:
        (first, a), (second, b) = (part.split() for part in line.split(": ")[1].split(", "))
        assert {first, second} < set(PITCHES)
        assert 1 >= float(a) >= float(b) >= 0


def test_hidden_files_in_folders_are_left_out(run, sounds, tmp_path, capsys):
    whole = (sounds / "test" / "low" / "0.wav").read_bytes()
    for name in (".hidden.wav", ".folder/a.wav", "seen.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(whole)
    assert main(["predict", str(run), str(tmp_path)]) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [str(tmp_path / "seen.wav")]


def test_unreadable_files_are_listed_and_the_rest_is_classified(run, sounds, tmp_path, capsys):
    good = sounds / "test" / "low" / "0.wav"
    (tmp_path / "text.wav").write_text("not a sound")
    whole = good.read_bytes()
    (tmp_path / "empty.wav").write_bytes(whole[:40] + b"\0\0\0\0")
    files = [tmp_path / "text.wav", tmp_path / "empty.wav", tmp_path / "missing.wav", good]
    target = tmp_path / "found.csv"
    assert main(["predict", str(run), *map(str, files), "--top", "1", "--csv", str(target)]) == 1
    error = capsys.readouterr().err
    for file in files[:3]:
        assert f"{file}: " in error
    assert "not a readable audio file" in error
    assert "it has no samples" in error
    assert "No such file" in error
    assert error.strip().endswith("diffstride: error: 3 of 4 files could not be read: they are listed above")
    found = {row["file"]: row for row in rows(target)}
    assert {file for file, row in found.items() if row["error"]} == set(map(str, files[:3]))
    assert found[str(good)]["class"] in PITCHES


def test_several_tasks_have_a_line_each(sounds, caches, tmp_path, capsys):
    tasks = {"pitch": data_of(sounds), "again": data_of(sounds)}
    data = {"class_path": "MultiTask", "init_args": {"batch_size": 8, "tasks": tasks}}
    run = trained(tmp_path, data, network_of({"pitch": 3, "again": 3}))
    file = sounds / "test" / "high" / "1.wav"
    assert main(["predict", str(run), str(file), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [[str(file), "pitch"], [str(file), "again"]]
    loaded = load(run)
    network, config = loaded.network, loaded.config
    data = build_data(config["data"]).tasks["again"]
    inputs, _ = data.prepare_batch((data.read(file)[None], torch.zeros(1)))
    with torch.no_grad():
        best = network(inputs)["again"].softmax(-1)[0].max().item()
    assert float(lines[1].split(": ")[2].split(", ")[0].split()[1]) == pytest.approx(best, abs=6e-4)


def pictures(folder):
    """Write images of two classes in both splits, and return the options of a training on them."""
    for split in ("train", "test"):
        for label in ("größe", "=1+1"):
            (folder / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    data = {"class_path": "ImageData", "init_args": {"path": str(folder), "batch_size": 4}}
    return data, {"class_path": "TinyCNN", "init_args": {"num_classes": 2, "in_channels": 3, "width": 4}}


def test_images_are_prepared_as_the_test_split_was(caches, tmp_path, capsys):
    run = trained(tmp_path, *pictures(tmp_path / "images"))
    loaded = load(run)
    network, config = loaded.network, loaded.config
    data = build_data(config["data"])
    inputs, _ = data.prepare_batch(data.test_set)
    with torch.no_grad():
        expected = network(inputs).softmax(-1)
    loaded = load(run)
    assert loaded.classes == {"": sorted(path.name for path in (tmp_path / "images" / "test").iterdir())}
    assert torch.equal(loaded.network(inputs), network(inputs))
    for place, file in enumerate(sorted((tmp_path / "images" / "test").rglob("*.png"))):
        own = {p.label: p.probability for p in loaded.predict(str(file), top=2)}
        assert loaded.predict(file, top=1)[0].probability == max(own.values())
        assert [own[label] for label in data.classes] == pytest.approx(expected[place].tolist(), abs=1e-5)
    PIL.Image.new("RGB", (20, 16)).save(tmp_path / "wide.png")
    assert main(["predict", str(run), str(tmp_path / "wide.png")]) == 1
    assert "it is 3×16×20 but the network was trained on 3×16×16" in capsys.readouterr().err


def test_images_of_another_size_are_resized_on_request(caches, tmp_path, capsys):
    run = trained(tmp_path, *pictures(tmp_path / "images"))
    pixels = np.random.default_rng(7).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "large.png")
    middle = PIL.Image.fromarray(pixels).resize((16, 16), PIL.Image.Resampling.BILINEAR, (10, 0, 50, 40))
    middle.save(tmp_path / "small.png")
    found, expected = load(run).predict(tmp_path / "large.png", resize=True), load(run).predict(tmp_path / "small.png")
    assert [prediction[1:] for prediction in found] == [prediction[1:] for prediction in expected]
    assert main(["predict", str(run), str(tmp_path / "large.png"), "--resize"]) == 0
    assert f"{found[0].label} {found[0].probability:.3f}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def hostile(caches, tmp_path_factory):
    """A run whose classes are called `größe` and `=1+1`, and pictures whose names are not for a terminal."""
    folder = tmp_path_factory.mktemp("hostile")
    names = ("0.png", "\x1b[2Jcleared.png", "b\nforged.png: dog 1.000", "=1+1.png", os.fsdecode(b"\xff.png"))
    options = pictures(folder)
    (folder / "new").mkdir()
    for name in names:
        shutil.copy(folder / "test" / "größe" / "0.png", folder / "new" / name)
    (folder / "new" / "\x1b[31mbroken\n.png").write_text("no picture")
    return trained(folder / "runs", *options), folder / "new", len(names)


def test_a_hostile_name_is_one_line_whose_escapes_are_seen(hostile, capsys):
    run, files, readable = hostile
    assert main(["predict", str(run), str(files), "--top", "2"]) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == readable
    assert len(printed.err.splitlines()) == 2  # the broken file, and how many there were
    assert all(line.isprintable() for line in [*lines, *printed.err.splitlines()])
    assert "\\x1b[31mbroken\\n.png: not a readable" in printed.err


def test_a_hostile_name_is_one_cell_and_no_formula(hostile, tmp_path, monkeypatch, capsys):
    run, files, readable = hostile
    monkeypatch.chdir(files)
    target = tmp_path / "found.csv"
    assert main(["predict", str(run), *os.listdir(), "--top", "2", "--csv", str(target)]) == 1
    lines = target.read_text().splitlines()
    assert len(lines) == 1 + 2 * readable + 1
    assert all(line.isprintable() for line in lines)
    found = list(csv.reader(lines))
    assert {len(row) for row in found} == {6}
    assert not any(cell.startswith(("=", "+", "@")) for row in found for cell in row)
    assert {row[3] for row in found[1:]} == {"größe", "'=1+1", ""}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["FILE", "--top", "-1"], "--top: must be a whole number of at least 1, got '-1'"),
        (["EMPTY"], "is an empty folder"),
        (["FILE", "--tpo", "1"], "unrecognized arguments: --tpo"),
    ],
)
def test_a_mistake_is_one_line(arguments, match, run, sounds, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    names = {"FILE": sounds / "test" / "low" / "0.wav", "EMPTY": tmp_path / "empty"}
    assert main(["predict", str(run), *(str(names.get(a, a)) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1


def test_a_run_on_generated_data_is_refused(run, sounds, tmp_path, capsys):
    file = str(sounds / "test" / "low" / "0.wav")
    assert main(["predict", str(tmp_path), file]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    cli, _ = small(tmp_path, "demo", steps=1)
    assert main(["predict", str(cli.run_folder), file, file]) == 2
    assert "was trained on PlantedBands, which is generated and reads no files" in capsys.readouterr().err
