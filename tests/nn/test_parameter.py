"""The parameter of strides: shared strides stay shared wherever torch makes new parameters."""

import copy
import io

import accelerate
import pytest
import torch
from torch import nn

import diffstride as ds

X = torch.randn(1, 3, 32, 32)


class Branches(nn.Module):
    """Two branches whose outputs are added, so that their strides must be one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 1, 2)

    def forward(self, x):
        return self.a(x) + self.b(x)


PLAN = ds.plan(Branches(), X)


def converted(context=None):
    with context or torch.device("cpu"):
        model = Branches()
        PLAN.apply(model)
    return model


def assigned(model):
    model.load_state_dict(converted().state_dict(), assign=True)
    return model


def loaded_in_part(model):
    state = converted().state_dict()
    del state["b.stride"]  # as safetensors' writers drop the second name of a tensor
    model.load_state_dict(state, assign=True, strict=False)
    return model


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def under(option, move):
    def moved():
        getattr(torch.__future__, f"set_{option}")(True)
        try:
            return move()
        finally:
            getattr(torch.__future__, f"set_{option}")(False)

    return moved


META = torch.device("meta")
OVERWRITE, SWAP = "overwrite_module_params_on_conversion", "swap_module_params_on_conversion"
MOVES = {
    "to_empty from meta": lambda: converted(META).to_empty(device="cpu"),
    "to_empty": lambda: converted().to_empty(device="cpu"),
    "assign on meta": lambda: assigned(converted(META)),
    "assign": lambda: assigned(converted()),
    "assign in part": lambda: loaded_in_part(converted(META)),
    "assign twice": lambda: assigned(assigned(converted(META))),
    "overwrite": under(OVERWRITE, lambda: converted().double().float()),
    "swap": under(SWAP, lambda: converted().double().float()),
    "swap from meta": under(SWAP, lambda: converted(META).to_empty(device="cpu")),
    "swap, assign": under(SWAP, lambda: assigned(converted(META))),
    "half and back": lambda: converted().half().float(),
    "a file": lambda: through_a_file(converted()),
    "a copy": lambda: copy.deepcopy(converted(META)).to_empty(device="cpu"),
    "accelerate": lambda: converted(accelerate.init_empty_weights()).to_empty(device="cpu"),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_branches_still_meet_after_their_model_was_moved(move):
    model = move()
    (stride,) = {id(layer.stride): layer.stride for layer in (model.a, model.b)}.values()
    with torch.no_grad():
        stride.fill_(3.0)
    assert model.a.strides == model.b.strides == (3.0, 3.0)
    assert [name for name, _ in model.named_parameters() if "stride" in name] == ["a.stride"]
    model(X).sum().backward()
    assert stride.grad is not None


def test_layers_that_part_stay_apart():
    model = converted()
    model.b.stride = nn.Parameter(torch.tensor([4.0, 4.0]))
    model = under(OVERWRITE, lambda: model.double())()
    assert (model.a.strides, model.b.strides) == ((2.0, 2.0), (4.0, 4.0))
