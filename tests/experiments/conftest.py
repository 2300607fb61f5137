"""Studies whose runs take a second."""

from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = {
    "question": "Does it work?",
    "base": str(CONFIGS / "demo.yaml"),
    "settings": {
        "data.train_samples": 96, "data.test_samples": 32, "data.batch_size": 32, "model.network.width": 4,
        "model.milestones": [3, 4, 5], "trainer.max_steps": 6,
    },
    "axes": {"method": ["conv", "diffstride"], "strides": [[[3, 3]]], "seed": [0, 1]},
    "tables": [{"rows": "strides", "columns": "method"}],
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write the file of the tiny study with some keys changed, or removed by None."""

    def file(name="tiny", **changes):
        if "axes" in changes:  # the tiny study's table is of its own axes
            changes.setdefault("tables", None)
        content = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return file
