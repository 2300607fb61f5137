"""A user's folder: a set of images, configurations, finished runs, and files of other kinds."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffstride.experiments.commands.main import main
from diffstride.experiments.training.fit import train

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
PICTURES, TINY = "runs/pictures", "runs/tiny"
LAST, DESCRIBED, RESULT = (f"{PICTURES}/{name}" for name in ("checkpoints/last.ckpt", "config.yaml", "result.json"))
DONE = f"{TINY}/seed0/result.json"
RESUME = "--config pictures.yaml --ckpt_path last --trainer.max_steps 3"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder, made once per process."""
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
        Path("folder").mkdir()
        Path("text").write_text("hello")
        Path("binary").write_bytes(bytes(range(256)))
        Path("broken.yaml").write_text("a: [1")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of the folder to work in."""
    folder = shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(tmp_path / "cache"))
    return folder


class Malicious:
    """An object that makes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("executed", "w")


def pickled(file):
    """Return a call that writes a checkpoint with something to execute, as torch writes them."""
    state = {"state_dict": Malicious(), "global_step": 2, "epoch": 0, "loops": {}}
    return lambda: torch.save(state, file)


def text(file, content):
    """Return a call that writes a text."""
    return lambda: Path(file).write_text(content)


def binary(file):
    """Return a call that writes bytes of no format."""
    return lambda: Path(file).write_bytes(bytes(range(256)))


def cut(file):
    """Return a call that cuts a file short."""
    return lambda: Path(file).write_bytes(Path(file).read_bytes()[:-100])
