"""Converted models of transformers in its own tools."""

import copy
import pickle

import pytest
import torch
import transformers as T
from torch import nn
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


SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8,
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
}  # fmt: skip
TEXT = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_conv_layers": 2, "conv_kernel_sizes": (5, 5),
    "conv_channels": 16, "input_feat_per_channel": 20, "max_source_positions": 500, "vocab_size": 8,
}  # fmt: skip
WAVES = {"input_values": torch.randn(2, 800)}
FEATURES = {"input_features": torch.randn(2, 320, 20), "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}
ADAPTER = {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 16}
MODELS = {
    "wav2vec2": (lambda: T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**SPEECH)), WAVES),
    "wav2vec2 with an adapter": (lambda: T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**SPEECH, **ADAPTER)), WAVES),
    "hubert": (lambda: T.HubertForCTC(T.HubertConfig(**SPEECH)), WAVES),
    "speech_to_text": (lambda: T.Speech2TextForConditionalGeneration(T.Speech2TextConfig(**TEXT)), FEATURES),
}


def padded(inputs, length):
    """The inputs with a mask, of which the second example's end is padding."""
    mask = torch.ones(2, next(iter(inputs.values())).shape[1], dtype=torch.long)
    mask[1, length:] = 0
    return inputs | {"attention_mask": mask}


@pytest.fixture(scope="module", params=[*MODELS, "speech_to_text-before"])
def speech(request, tmp_path_factory):
    name, _, placement = request.param.partition("-")
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model, length = build().eval(), {"input_values": 600, "input_features": 240}[next(iter(inputs))]
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    ds.plan(model, padded(inputs, length), smoothness=12.0, placement=placement or "after").save(path)
    ds.Plan.load(path).apply(model)
    return model, padded(inputs, length), length


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.1, 1.7])
@torch.no_grad()
def test_frames_of_padded_batches_follow_learned_strides(speech, factor):
    """The number of real frames is that of the part without padding, when it comes alone."""
    model, inputs, length = speech
    for layer in model.modules():
        if hasattr(layer, "stride_id"):
            layer.stride.copy_(torch.tensor(layer.initial_strides) * factor)
    base = model.model.encoder if hasattr(model, "model") else model.base_model

    def frames(n):
        (name,) = {"input_values", "input_features"} & inputs.keys()
        return base(**{name: inputs[name][:, :n]}).last_hidden_state.shape[1]

    whole, part = frames(None), frames(length)
    lengths = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
    assert lengths.tolist() == [whole, part]
    assert base._get_feature_vector_attention_mask(whole, inputs["attention_mask"]).sum(1).tolist() == [whole, part]
    copies = [ds.freeze(model, inputs), copy.deepcopy(model)]
    if not any(hasattr(module, "parametrizations") for module in model.modules()):  # which torch does not pickle
        copies.append(pickle.loads(pickle.dumps(model)))
    for copied in copies:
        assert copied._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1)).tolist() == [whole, part]
        torch.testing.assert_close(copied(**inputs).logits, model(**inputs).logits)


def test_the_loss_of_a_converted_speech_model_trains_its_strides():
    build, inputs = MODELS["wav2vec2"]
    model, labels = build(), torch.tensor([[1, 2, 3], [2, 1, -100]])
    ds.convert(model, padded(inputs, 600), smoothness=20.0)
    optimizer = torch.optim.SGD(ds.param_groups(model, 0.01, stride_lr=1.0), lr=0.01)
    before = ds.strides(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(**padded(inputs, 600), labels=labels).loss.backward()
        optimizer.step()
        ds.clamp_strides_(model)
    assert ds.strides(model) != before


def test_lengths_that_no_layers_explain_are_warned_of():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 4, 5, 2)

        def _get_output_lengths(self, lengths):
            return lengths // 7

        def forward(self, x):
            return self.conv(x).mean(-1)

    plan = ds.plan(Counting(), torch.randn(2, 1, 64))
    assert [(method.method, method.layers) for method in plan.lengths] == [("_get_output_lengths", ())]
    assert "warning: Counting._get_output_lengths computes lengths by fixed strides" in str(plan)
