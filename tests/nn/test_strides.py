"""The strides of a whole model: groups for an optimizer, and bounds."""

import torch
from torch import nn

import diffstride as ds


def test_param_groups_keep_strides_apart_and_free_of_decay():
    shared = ds.DiffStride2d(2.0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), shared, nn.BatchNorm2d(2), shared, ds.DiffStride2d(1.5))
    model[0].bias.requires_grad_(False)
    weights, strides = ds.param_groups(model, 0.1, stride_lr=0.02, weight_decay=5e-4)
    assert {id(p) for p in strides["params"]} == {id(shared.stride), id(model[4].stride)}
    assert (strides["lr"], strides["weight_decay"]) == (0.02, 0.0)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 5e-4)
    assert [p.shape for p in weights["params"]] == [(2, 1, 3, 3), (2,), (2,)]
    optimizer = torch.optim.SGD([weights, strides], momentum=0.9)
    model(torch.zeros(1, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert shared.strides == (2.0, 2.0)  # nothing to learn from zeros, and no decay
    assert len(ds.param_groups(nn.Linear(1, 1), 0.1)) == 1


def test_clamp_strides_projects_to_the_users_bounds():
    model = nn.Sequential(ds.DiffStride1d(2.0, bounds=(1.5, 3.0)), ds.DiffStride2d(2.0))
    with torch.no_grad():
        model[0].stride.fill_(7.0)
        model[1].stride.copy_(torch.tensor([-2.0, 50.0]))
    ds.clamp_strides_(model)
    assert [layer.stride.detach().tolist() for layer in model] == [[3.0], [1.0, 50.0]]
    assert ds.strides(model) == {"0": (3.0,), "1": (1.0, 50.0)}
