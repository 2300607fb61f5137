"""Caches of the tests' own."""

import pytest


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """Caches of our own, ours and that of `datasets`, and no network."""
    datasets = pytest.importorskip("datasets")

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    own = tmp_path_factory.mktemp("caches")
    folder = own / "diffstride"
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", own / "arrow")
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return folder
