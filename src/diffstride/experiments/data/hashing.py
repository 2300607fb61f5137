"""Digests of content, and random numbers that are a function of a key."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def digest(*parts: object) -> str:
    """Return a hexadecimal digest of tensors' contents and of other parts' `repr`. All processes get the same one."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            total.update(part.detach().cpu().contiguous().numpy().data)
        else:
            total.update(f"{part!r};".encode())
    return total.hexdigest()[:32]


def seed_of(*key: object) -> int:
    """Return a seed for random numbers that are a function of `key`."""
    return int(digest(*key)[:15], 16)


@contextmanager
def seeded(*key: int, device: torch.device) -> Iterator[None]:
    """Make random numbers on the CPU and on `device` a function of `key`, and restore the global state at the end."""
    seed = seed_of(*key)
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
