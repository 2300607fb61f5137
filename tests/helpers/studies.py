"""Studies of small runs, started from the command line."""

import statistics

from diffstride.experiments.commands.main import main
from diffstride.experiments.studies.results import Row, read_study

SLOWER = {
    "data.train_samples": 640, "data.test_samples": 32, "data.batch_size": 32, "model.network.width": 8,
    "trainer.max_steps": -1, "trainer.max_epochs": 6, "model.milestones": [3, 8, 10],
}  # fmt: skip


def study(file, *arguments):
    return main(["study", str(file), "--runs", str(file.parent / "runs"), *map(str, arguments)])


def findings(folder):
    """Return what was learned in each run, without times and hardware; the error of a failed run."""
    _, rows = read_study(folder)
    kept = ("accuracy", "loss", "strides", "strides_initial", "macs", "steps", "seed", "data_fingerprint")
    return {row.name: {key: row.result[key] for key in kept} if row.result else row.error for row in rows}


TASKS = ("Birdsong detection", "Music (pitch)")
METHODS = ("conv", "diffstride")
AXES = {"time": "Hz", "frequency": "cycles per mel band"}


def accuracy(setting, task, method, seed):
    return 0.5 + 0.2 * TASKS.index(task) + 0.1 * METHODS.index(method) + 0.01 * seed - 0.05 * (setting == "multi")


def stride(task, seed, axis):
    return 1.5 + 0.25 * (0 if task is None else 1 + TASKS.index(task)) + 0.1 * seed + axis


def result_of(setting, task, method, seed):
    each = {t: accuracy(setting, t, method, seed) for t in TASKS}
    result = {
        "accuracy": statistics.fmean(each.values()) if task is None else each[task],
        "accuracies": each if task is None else {},
        "axes": AXES, "strides": {}, "strides_initial": {}, "cutoffs": None, "macs": 1e6,
        "resampling_macs": 0.0, "step_time_ms": 1.0,
    }  # fmt: skip
    if method == "diffstride":
        first = [stride(task, seed, axis) for axis in (0, 1)]
        exact = [1 / (2 * first[0] * 0.01), 1 / (2 * first[1])]
        bins = [int(160 / (2 * first[0])) / 1.6, int(64 / (2 * first[1])) / 64]
        result["strides"] = result["strides_initial"] = {"a": first, "b": [9.0, 9.0]}
        result["cutoffs"] = {"exact": {"a": exact, "b": [0.0, 0.0]}, "whole_bins": {"a": bins, "b": [0.0, 0.0]}}
    return result


def task_rows():
    """Yield finished runs of two tasks, each alone and both at once, with two methods and three seeds."""
    for setting in ("single", "multi"):
        for task in TASKS if setting == "single" else (None,):
            for method in METHODS:
                for seed in (0, 1, 2):
                    axes = {"setting": setting} | ({"task": task} if task else {}) | {"method": method, "seed": seed}
                    name = "-".join(map(str, axes.values()))
                    yield Row(name, "done", axes, result_of(setting, task, method, seed))
