"""The callbacks for Lightning, in a training whose steps push strides out of their bounds."""

import csv

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

import diffstride as ds
from diffstride.integrations.lightning import ClampStrides, LogStrides

BOUNDS = (1.5, 3.0)


class Net(LightningModule):
    """A loss whose slope pushes the stride up (sign 1) or down (sign -1)."""

    def __init__(self, sign, lr=1.0):
        super().__init__()
        self.down, self.sign, self.lr = ds.DiffStride1d(2.0, bounds=BOUNDS), sign, lr

    def training_step(self, x):
        return self.down(x).mean() - self.sign * self.down.stride.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def train(model, *callbacks, **options):
    options = {"logger": False, **options}
    trainer = Trainer(accelerator="cpu", max_steps=4, callbacks=[*callbacks], enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, **options)  # fmt: skip
    data = torch.utils.data.DataLoader([torch.randn(2, 32) for _ in range(8)], batch_size=2)
    trainer.fit(model, data)
    return model.down.stride.item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("sign", "bound"), [(1, BOUNDS[1]), (-1, BOUNDS[0])])
def test_a_stride_that_steps_push_out_of_its_bounds_comes_back(sign, bound):
    assert train(Net(sign), ClampStrides()) == bound
    assert (train(Net(sign)) - bound) * sign > 0.5


@pytest.mark.filterwarnings("ignore")
def test_strides_sizes_and_cost_reach_every_logger(tmp_path):
    class Seen(LogStrides):
        """Notes what the model has when it logs."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            super().on_train_batch_end(trainer, pl_module)
            (stride,) = pl_module.down.strides
            rows[trainer.global_step] = (stride, pl_module.down.output_size(32)[0], self.cost.exact())

    rows, model = {}, Net(1, lr=0.1)
    model.after = torch.nn.Conv1d(1, 1, 3)
    cost = ds.CostModel(torch.nn.Sequential(model.down, model.after), torch.randn(1, 1, 32))
    loggers = [CSVLogger(tmp_path / name, name="", version="") for name in "ab"]
    train(model, ClampStrides(), Seen(cost), logger=loggers, log_every_n_steps=2, accumulate_grad_batches=2)
    for name in "ab":
        with (tmp_path / name / "metrics.csv").open() as file:
            logged = list(csv.DictReader(file))
        logged = {int(row["step"]): row for row in logged}
        assert list(logged) == [2, 4]
        for step, row in logged.items():
            found = [float(row[column]) for column in ("stride/down/length", "size/down/length", "cost/macs")]
            assert found == pytest.approx(rows[step])
    assert rows[2] != rows[4]
    assert not model.down._forward_pre_hooks
