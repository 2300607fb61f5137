"""The callback for Lightning, in a training whose steps push strides out of their bounds."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

import diffstride as ds
from diffstride.integrations.lightning import ClampStrides

BOUNDS = (1.5, 3.0)


class Net(LightningModule):
    """A loss whose slope pushes the stride up (sign 1) or down (sign -1)."""

    def __init__(self, sign):
        super().__init__()
        self.down, self.sign = ds.DiffStride1d(2.0, bounds=BOUNDS), sign

    def training_step(self, x):
        return self.down(x).mean() - self.sign * self.down.stride.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def train(model, *callbacks):
    trainer = Trainer(accelerator="cpu", max_steps=4, callbacks=[*callbacks], logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    data = torch.utils.data.DataLoader([torch.randn(2, 32) for _ in range(8)], batch_size=2)
    trainer.fit(model, data)
    return model.down.stride.item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("sign", "bound"), [(1, BOUNDS[1]), (-1, BOUNDS[0])])
def test_a_stride_that_steps_push_out_of_its_bounds_comes_back(sign, bound):
    assert train(Net(sign), ClampStrides()) == bound
    assert (train(Net(sign)) - bound) * sign > 0.5
