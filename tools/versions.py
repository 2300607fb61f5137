"""Run the tests in environments of other versions: the lowest, pinned and newest of each dependency, other Pythons.

    python -m tools.versions --out results/versions.json [NAME ...]

`lowest` takes the lower bound of every requirement in pyproject.toml, `newest` the newest release, `pinned` the version
in constraints.txt. An environment takes 7 GB under .venv/versions, its tests seven minutes on two cores. Warnings are
not errors here, since nobody chose these versions.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import requires
from pathlib import Path

import torch
from packaging.requirements import Requirement

from diffstride._files import atomic_write_text
from diffstride.experiments.provenance import provenance

ROOT = Path(__file__).parents[1]
RESOLUTION = {
    "lowest": ["--resolution", "lowest-direct"],
    "pinned": ["--constraint", "constraints.txt"],
    "newest": [],
}
ENVIRONMENTS = [f"{which}-{python}" for python in ("3.11", "3.12", "3.13") for which in RESOLUTION]
USUAL = ["lowest-3.11", "pinned-3.12", "pinned-3.13", "newest-3.13"]
EXTRAS = [word for extra in ("train", "export", "cluster", "dev") for word in ("--extra", extra)]


def output(*command, check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=check).stdout


def install(name):
    """Make an environment with the package in editable form; return its Python and the versions of its packages."""
    which, _, version = name.partition("-")
    place = ROOT / ".venv" / "versions" / name
    python = str(place / "bin" / "python")
    uv = [sys.executable, "-m", "uv", "--quiet"]
    output(*uv, "venv", "--clear", "--seed", "--python", version, str(place))
    output(*uv, "pip", "install", "--python", python, "-r", "pyproject.toml", *EXTRAS, *RESOLUTION[which])
    output(*uv, "pip", "install", "--python", python, "--no-deps", "--editable", ".")
    packages = json.loads(output(*uv, "pip", "list", "--python", python, "--format", "json"))
    versions = {each["name"].replace("_", "-").lower(): each["version"] for each in packages}
    needed = [Requirement(text).name for text in requires("diffstride") if not re.search(r'"(dev|docs)"', text)]
    return python, {name: versions[name.lower()] for name in sorted([*needed, "numpy"])}


def run_tests(python, selection):
    """Return the number of tests by outcome, and the message of each failure."""
    text = output(python, "-m", "pytest", "-q", "-n", "2", "-W", "default", "-rfE", *selection, check=False)
    counts = {outcome: int(n) for n, outcome in re.findall(r"(\d+) (passed|failed|skipped|error)", text[-300:])}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", text, re.M)
    return {"failed": 0, **counts, "failures": {test: message[:300] for test, message in failures}}


def table(results):
    """Return the Markdown of docs/results/versions.md."""
    names = sorted(results, key=lambda name: (list(RESOLUTION).index(name.partition("-")[0]), name))
    rows = {"Python": "python", "run on": "date", "tests passed": "passed", "failed": "failed", "skipped": "skipped"}
    lines = [["", *(name.partition("-")[0] for name in names)], ["---"] * (len(names) + 1)]
    lines += [[head, *(str(results[name].get(key, 0)) for name in names)] for head, key in rows.items()]
    for package in sorted(results[names[0]]["versions"], key=lambda package: (package != "torch", package)):
        lines.append([package, *(results[name]["versions"].get(package, "") for name in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=USUAL, metavar="NAME", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--out", type=Path, required=True, help="JSON file; its results of other environments stay")
    parser.add_argument("--tests", nargs="*", default=[], help="paths of tests (default: those of `make test`)")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    facts = provenance(torch.device("cpu"))
    for name in options.names:
        start = time.monotonic()
        python, versions = install(name)
        results[name] = {
            **{key: facts[key] for key in ("commit", "hardware")},
            "date": datetime.now(UTC).date().isoformat(),
            "python": output(python, "-V").split()[1],
            "versions": versions,
            **run_tests(python, options.tests),
            "seconds": round(time.monotonic() - start),
        }
        atomic_write_text(options.out, json.dumps(results, indent=2, sort_keys=True) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
