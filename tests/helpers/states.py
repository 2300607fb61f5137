"""The state of models and of random generators, for tests that nothing has changed."""

import random

import numpy as np
import torch
from torch import nn


def record(model):
    """Return everything of a model that a trace could change."""
    return [
        (
            name,
            id(module),
            module.training,
            {k: id(v) for k, v in vars(module).items()},
            {k: (type(v), repr(v)) for k, v in vars(module).items() if not isinstance(v, (torch.Tensor, dict))},
            {k: list(v.items()) for k, v in vars(module).items() if isinstance(v, dict) and "hooks" in k},
            {k: [(n, id(t)) for n, t in vars(module)[k].items()] for k in ("_parameters", "_buffers", "_modules")},
            [(n, t.clone(), t._version, t.grad) for n, t in module.named_buffers(recurse=False)],
            [(n, t.clone(), t._version, t.grad, t.requires_grad) for n, t in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def random_states():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state()]


def randomise(model):
    """Give normalisations weights and statistics that change the result; use float64 and evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    return model.double().eval()
