"""The callback for the `Trainer` of transformers, and models that travel with their plan."""

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import diffstride as ds
from diffstride.errors import UsageError
from diffstride.integrations.transformers import ClampStrides, from_pretrained, save_pretrained

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


def converted():
    torch.manual_seed(0)
    config = {"hidden_sizes": [8, 12], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic", "num_labels": 2}
    model = ResNetForImageClassification(ResNetConfig(**config)).eval()
    plan = ds.convert(model, torch.randn(1, 3, 32, 32))
    with torch.no_grad():
        for i, layer in enumerate(m for m in model.modules() if hasattr(m, "stride_id")):
            layer.stride.copy_(torch.tensor([1.3, 2.2]) + 0.1 * i)
    return model, plan


def parameters_by_site(model, plan):
    layers = [module for module in model.modules() if hasattr(module, "stride_id")]
    return len(layers), len({id(layer.stride) for layer in layers})


@pytest.mark.parametrize("shard", ["1GB", "5KB"])
def test_a_saved_model_comes_back_with_plan_and_strides(shard, tmp_path):
    model, plan = converted()
    save_pretrained(model, plan, tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard == "5KB"
    loaded = from_pretrained(ResNetForImageClassification, tmp_path)
    assert type(loaded) is ResNetForImageClassification
    assert ds.strides(loaded) == ds.strides(model)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x).logits, model(x).logits)
    # Branches that meet still share one parameter, so that training keeps their sizes equal.
    assert parameters_by_site(loaded, plan) == parameters_by_site(model, plan) == (4, 3)
    loaded(x).logits.square().sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=1e-2).step()
    assert loaded(x).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_the_trainer_have_the_plan(tmp_path):
    model, plan = converted()
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[ClampStrides(plan)]).train()
    loaded = from_pretrained(ResNetForImageClassification, tmp_path / "checkpoint-2")
    assert ds.strides(loaded) == ds.strides(model)


def test_a_folder_without_a_plan_is_refused(tmp_path):
    model, _ = converted()
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"path must be a plan that Plan.save wrote, got .*diffstride.json"):
        from_pretrained(ResNetForImageClassification, tmp_path)
