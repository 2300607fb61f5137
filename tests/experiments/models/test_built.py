"""Networks built by a function, with learned strides."""

import pytest
import torch

import diffstride as ds
from diffstride.experiments.models import Built, ResNet

RESNET = "diffstride.experiments.models.ResNet"
SMALL = {"width": 1 / 16, "num_classes": 3}


def of_seed(make):
    torch.manual_seed(0)
    return make().eval()


def test_inserted_strides_leave_the_function_as_it_is():
    network = of_seed(lambda: Built(RESNET, SMALL, input_shape=[3, 16, 16], options={"smoothness": 2.0}))
    plain = of_seed(lambda: ResNet(**SMALL))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(network(x), plain(x))
    assert set(network.model.state_dict()) - set(plain.state_dict()) == {f"{n}.stride" for n in all_strides(network)}
    assert {layer.smoothness for layer in layers(network)} == {2.0}


def layers(network):
    return [module for module in network.modules() if isinstance(module, ds.DiffStride2d)]


def all_strides(network):
    return [n.removeprefix("model.") for n, m in network.named_modules() if isinstance(m, ds.DiffStride2d)]


def test_converted_and_left_as_it_is():
    converted = Built(RESNET, SMALL, strides="convert", input_shape=[3, 16, 16])
    assert set(ds.strides(converted).values()) == {(2.0, 2.0)}
    assert not ds.strides(Built(RESNET, SMALL, strides="none"))


def test_a_transformers_model_is_built_from_its_configuration_and_gives_logits():
    config = {
        "function": "transformers.ResNetConfig",
        "arguments": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 5},
    }
    network = Built("transformers.ResNetForImageClassification", {"config": config}, input_shape=(3, 32, 32))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert len(ds.strides(network)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": "nowhere.at.all"}, "function must be a path such as timm.create_model, got 'nowhere.at.all'"),
        ({"function": "ResNet"}, "function must be a path such as timm.create_model, got 'ResNet'"),
        ({"function": RESNET, "arguments": SMALL}, "input_shape must be the shape of one input"),
        ({"function": RESNET, "arguments": SMALL, "strides": "learn"}, "strides must be one of 'insert', 'convert'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Built(**arguments)
