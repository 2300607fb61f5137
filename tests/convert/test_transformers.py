"""Converted models of transformers in its own tools."""

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import diffstride as ds

X = torch.randn(8, 3, 32, 32)
DATA = [{"pixel_values": X[i % 8], "labels": i % 2} for i in range(16)]


def converted():
    config = {"hidden_sizes": [16, 24], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic", "num_labels": 2}
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**config))
    ds.convert(model, X[:2])
    return model


def train(model, folder, steps, checkpoint=None):
    options = {"max_steps": steps, "save_steps": 2, "optim": "sgd", "learning_rate": 0.1, "logging_strategy": "no"}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4}
    Trainer(model, TrainingArguments(str(folder), **options, **quiet), train_dataset=DATA).train(checkpoint)
    return model.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_saves_and_resumes_a_converted_model(tmp_path):
    whole = train(converted(), tmp_path, 4)
    resumed = train(converted(), tmp_path, 4, str(tmp_path / "checkpoint-2"))
    assert sum(name.endswith(".stride") for name in whole) == 4
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    assert not torch.equal(whole["resnet.embedder.embedder.convolution.stride"], torch.tensor([2.0, 2.0]))


@pytest.mark.filterwarnings("ignore")
def test_the_file_of_save_pretrained_is_read_back_into_a_replayed_plan(tmp_path):
    from safetensors.torch import load_file

    model = converted()
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "stride_id"):
                layer.stride.fill_(1.7)
    model.save_pretrained(tmp_path)
    fresh = converted()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh.eval()(X).logits, model.eval()(X).logits)
