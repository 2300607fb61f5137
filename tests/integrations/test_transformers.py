"""The callback for the `Trainer` of transformers, in a training whose steps push strides out of their bounds."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import diffstride as ds
from diffstride.integrations.transformers import ClampStrides

BOUNDS = (1.5, 3.0)


class Net(nn.Module):
    """A loss whose slope pushes the stride up (sign 1) or down (sign -1)."""

    def __init__(self, sign):
        super().__init__()
        self.down, self.sign = ds.DiffStride1d(2.0, bounds=BOUNDS), sign

    def forward(self, x, labels):
        return {"loss": self.down(x).mean() - self.sign * self.down.stride.sum()}


def train(model, folder, callbacks):
    arguments = TrainingArguments(str(folder), max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True,
                                  gradient_accumulation_steps=2, save_strategy="no")  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    data = [{"x": torch.randn(2, 32), "labels": 0} for _ in range(8)]
    Trainer(model, arguments, train_dataset=data, callbacks=callbacks, optimizers=(optimizer, None)).train()
    return model.down.stride.item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("sign", "bound"), [(1, BOUNDS[1]), (-1, BOUNDS[0])])
def test_a_stride_that_steps_push_out_of_its_bounds_comes_back(sign, bound, tmp_path):
    assert train(Net(sign), tmp_path, [ClampStrides()]) == bound
    outside = train(Net(sign), tmp_path, [])
    assert (outside - bound) * sign > 0.5
