"""The metadata of the package agree with the pinned versions, the Makefile and CI."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
}
JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
REQUIREMENTS = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_versions_that_are_tested_lie_in_the_ranges_that_users_get(requirement):
    assert requirement.specifier.contains(PINNED[canonicalize_name(requirement.name)])
    assert any(part.operator == ">=" for part in requirement.specifier) or requirement.name.startswith("types-")


def test_ci_calls_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    called = set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), flags=re.M))
    assert {"check", "docs", "test"} == called <= targets
    for job in JOBS.values():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands, "a job without a command"
        for command in commands:
            (target,) = re.fullmatch(r"make ([a-z-]+|\$\{\{ matrix\.target \}\})(?: +#.*)?", command).groups()
            found = job["strategy"]["matrix"]["target"] if target.startswith("$") else [target]
            assert set(found) <= targets
            called |= set(found)
    assert {"check", "test", "docs", "demo", "smoke", "test-long", "fuzz"} <= called


def test_ci_runs_on_the_pythons_that_the_package_names():
    named = [
        line.rpartition(" ")[2]
        for line in PROJECT["classifiers"]
        if line.startswith("Programming Language :: Python ::")
    ]
    assert JOBS["test"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
