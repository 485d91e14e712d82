"""The networks: keys, outputs, and real weights with their known accuracies."""

import pytest
import torch
from conftest import first

from mdistiller_ext import cifar_model_dict
from mdistiller_ext.data import cifar100
from mdistiller_ext.engine import predict
from mdistiller_ext.teacher import load_into, load_weights

NAMES = [f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)] + ["resnet8x4", "resnet32x4"]


def test_names():
    assert list(cifar_model_dict) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_outputs(name):
    model = cifar_model_dict[name][0](num_classes=100).eval()
    widths = (32, 64, 128, 256) if name.endswith("x4") else (16, 16, 32, 64)
    with torch.no_grad():
        logits, features = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 100)
    shapes = [(2, w, side, side) for w, side in zip(widths, (32, 32, 16, 8), strict=True)]
    assert [tuple(f.shape) for f in features["feats"]] == shapes
    assert [tuple(f.shape) for f in features["preact_feats"]] == shapes
    assert features["pooled_feat"].shape == (2, widths[3])
    for after, before in zip(features["feats"][1:], features["preact_feats"][1:], strict=True):
        assert (before < 0).any()
        assert torch.equal(after, before.relu())


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet8", 83_892), ("resnet20", 278_324), ("resnet110", 1_736_564)]
)
def test_size(name, parameters):
    """With 100 classes and convolutions in the two shortcuts that change shape."""
    model = cifar_model_dict[name][0](num_classes=100)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "right"),
    [("resnet20", 214), ("resnet32", 211), ("resnet44", 224), ("resnet56", 218)],
)
def test_real_teachers_are_right_as_often_as_is_known(shared, name, right):
    """On the first 300 test images: those of networks with 68.8, 70.1, 71.7 and 72.6 % on all.

    No two best logits of these are closer than 4e-4. `test_tools.py` has ResNet-20 on all images.
    """
    model = cifar_model_dict[name][0](num_classes=100)
    load_into(model, load_weights(shared / "teachers" / f"cifar100_{name}.pth"), name)
    _, test = cifar100.load(shared)
    few = first(test, 300)
    assert (predict(model, few, 150).argmax(dim=1) == few.targets).sum() == right
