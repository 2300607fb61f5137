"""Convert a model of `transformers` and train it with the `Trainer`. Needs transformers and accelerate."""

import tempfile

import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import diffstride as ds
from diffstride.integrations.transformers import ClampStrides, from_pretrained, save_pretrained


def main(steps: int = 4) -> ResNetForImageClassification:
    """Convert a network, train it on random images, save it, and return the loaded copy."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
    model = ResNetForImageClassification(config)
    plan = ds.convert(model, {"pixel_values": torch.randn(1, 3, 32, 32)})
    print(plan)

    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 10} for i in range(32)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, save_strategy="no", use_cpu=True, report_to=[]
        )
        # The Trainer would give strides the rate of the weights. This optimiser gives them their own, without decay.
        optimizer = torch.optim.AdamW(ds.param_groups(model, lr=1e-3, stride_lr=1e-2, weight_decay=0.01))
        trainer = Trainer(
            model, arguments, train_dataset=images, optimizers=(optimizer, None), callbacks=[ClampStrides(plan)]
        )
        trainer.train()
        print(ds.strides(model))

        save_pretrained(model, plan, folder)
        loaded = from_pretrained(ResNetForImageClassification, folder)  # in another process, too
    assert ds.strides(loaded) == ds.strides(model)
    return loaded


if __name__ == "__main__":
    main()
