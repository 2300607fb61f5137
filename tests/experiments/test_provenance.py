"""The commit behind a measured figure."""

import subprocess

from diffstride.experiments import provenance


def test_an_installed_wheel_has_no_commit_though_a_repository_is_around_it(tmp_path, monkeypatch):
    for command in (["init"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    folder = tmp_path / ".venv" / "site-packages" / "diffstride" / "experiments"
    folder.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(folder / "provenance.py"))
    assert provenance._commit() is None
