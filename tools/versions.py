"""The tests in environments of other versions: lowest and newest of each dependency, other Pythons.

    python -m tools.versions --out results/versions.json [NAME ...]

`lowest` takes the lower bound of every requirement in pyproject.toml, `newest` the newest release of everything,
`pinned` what constraints.txt says. python3.11, python3.12 and python3.13 must be on PATH, as far as they are asked for.
An environment takes 7 GB under .venv/versions, its tests seven minutes on two cores.
Warnings are errors in `make test`; here they are not: those of a version that nobody chose are not ours.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from diffstride._files import atomic_write_text
from diffstride.experiments.provenance import provenance

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".venv" / "versions"
RESOLUTION = {
    "lowest": ["--resolution", "lowest-direct"],
    "pinned": ["--constraint", "constraints.txt"],
    "newest": [],
}
ENVIRONMENTS = [f"{which}-{python}" for python in ("3.11", "3.12", "3.13") for which in RESOLUTION]
USUAL = ["lowest-3.11", "pinned-3.12", "pinned-3.13", "newest-3.13"]
EXTRAS = ("train", "export", "cluster", "dev")


def uv(*arguments):
    command = [sys.executable, "-m", "uv", "--quiet", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def requirements():
    """Names of what pyproject.toml asks for, without the tools that only developers use."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][extra] for extra in EXTRAS if extra != "dev"]
    return [Requirement(text).name for group in (project["dependencies"], *extras) for text in group]


def install(name):
    """An environment with the package as it lies here; the versions of its direct dependencies."""
    which, _, python = name.partition("-")
    place = PLACE / name
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    wanted = PLACE / f"{name}.txt"
    PLACE.mkdir(parents=True, exist_ok=True)
    uv("pip", "compile", "--python-version", python, *RESOLUTION[which], *extras, "-o", str(wanted), "pyproject.toml")
    uv("venv", "--clear", "--seed", "--python", shutil.which(f"python{python}"), str(place))
    uv("pip", "install", "--python", str(place), "--requirements", str(wanted))
    uv("pip", "install", "--python", str(place), "--no-deps", "--editable", ".")
    found = json.loads(uv("pip", "list", "--python", str(place), "--format", "json"))
    versions = {each["name"].replace("_", "-").lower(): each["version"] for each in found}
    return {each: versions[each.lower()] for each in (*requirements(), "numpy")}


def run_tests(name, selection):
    """Counts of tests by outcome; what failed and why, in a line each."""
    report = PLACE / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [PLACE / name / "bin" / "python", "-m", "pytest", "-n", "2", "-W", "default", "--junitxml", report]
    subprocess.run([*command, *selection], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    outcomes, failed = Counter(), {}
    for case in ET.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcomes["passed" if outcome is None else "skipped" if outcome.tag == "skipped" else "failed"] += 1
        if outcome is not None and outcome.tag != "skipped":
            said = " ".join(outcome.get("message", "").split())
            failed[f"{case.get('classname')}::{case.get('name')}"] = re.sub(re.escape(str(ROOT)), ".", said)[:300]
    return {**outcomes, "failures": failed}


def table(results):
    """Return the Markdown table of docs/results/versions.md."""
    names = sorted(results, key=lambda name: (list(RESOLUTION).index(name.partition("-")[0]), name))
    lines = [["", *(name.partition("-")[0] for name in names)], ["---"] * (len(names) + 1)]
    for head, key in (("Python", "python"), ("run on", "date"), ("tests passed", "passed"), ("failed", "failed"),
                      ("skipped", "skipped")):  # fmt: skip
        lines.append([head, *(str(results[name].get(key, 0)) for name in names)])
    for package in sorted(results[names[0]]["versions"], key=lambda package: (package != "torch", package)):
        lines.append([package, *(results[name]["versions"][package] for name in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=USUAL, metavar="NAME", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what it says of other environments stays")
    parser.add_argument("--tests", nargs="*", default=[], help="paths of tests (default: all that `make test` runs)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(ENVIRONMENTS):
        parser.error(f"NAME must be one of {', '.join(ENVIRONMENTS)}, got {', '.join(sorted(unknown))}")
    pythons = {f"python{name.partition('-')[2]}" for name in options.names}
    if missing := {python for python in pythons if shutil.which(python) is None}:
        parser.error(f"{', '.join(sorted(missing))} must be on PATH")
    here = provenance(torch.device("cpu"))
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.names:
        start = time.monotonic()
        versions = install(name)
        results[name] = {
            **{key: here[key] for key in ("commit", "hardware")},
            "date": datetime.now(UTC).date().isoformat(),
            "python": subprocess.run(
                [PLACE / name / "bin" / "python", "-c", "import platform; print(platform.python_version())"],
                capture_output=True, text=True, check=True,
            ).stdout.strip(),
            "versions": versions,
            **run_tests(name, options.tests),
            "seconds": round(time.monotonic() - start),
            "resolved_by": f"uv {version('uv')}",
        }  # fmt: skip
        atomic_write_text(options.out, json.dumps(results, indent=2, sort_keys=True) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
