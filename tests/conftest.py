import pytest
import torch

pytest_plugins = ["tests.helpers.workplace"]  # the fixtures `made` and `here`


@pytest.fixture(autouse=True)
def _one_seed_and_one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """Give sets from files caches of their own, ours and that of `datasets`, and no network."""
    datasets = pytest.importorskip("datasets")

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    own = tmp_path_factory.mktemp("caches")
    folder = own / "diffstride"
    monkeypatch.setenv("DIFFSTRIDE_CACHE", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", own / "arrow")
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return folder
