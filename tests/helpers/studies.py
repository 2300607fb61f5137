"""Studies of small runs, started as a user would."""

from diffstride.experiments.commands.main import main
from diffstride.experiments.studies.results import read_study

SLOWER = {
    "data.train_samples": 640, "data.test_samples": 32, "data.batch_size": 32, "model.network.width": 8,
    "trainer.max_steps": -1, "trainer.max_epochs": 6, "model.milestones": [3, 8, 10],
}  # fmt: skip


def study(file, *arguments):
    return main(["study", str(file), "--runs", str(file.parent / "runs"), *map(str, arguments)])


def findings(folder):
    """What was learned in each run: without times, and where it ran."""
    _, rows = read_study(folder)
    kept = ("accuracy", "loss", "strides", "strides_initial", "macs", "steps", "seed", "data_fingerprint")
    return {row.name: {key: row.result[key] for key in kept} if row.result else row.error for row in rows}
