"""Every command with every kind of wrong input: one line that names the cure, status 2, nothing written, nothing lost."""

import errno
import json
import os
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

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
