"""The toolkit's methods on pairs of its own networks, with its own settings for them."""

import re

import pytest
import torch
from conftest import ROOT, train_on

from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import ImageSet
from mdistiller_ext.engine.build import (
    build_distiller,
    build_optimizer,
    takes_features,
)
from mdistiller_ext.engine.loop import Meter
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.models import build_network, feature_shapes
from mdistiller_ext.teacher import Weights

FILES = sorted((ROOT / "configs/cifar100/toolkit").glob("*.yaml"))
METHODS = [file.stem for file in FILES]
# Its file of DKD for a pair -> the pair.
PAIRS = {
    "wrn40_2_wrn_16_2": ("wrn_40_2", "wrn_16_2"),
    "res32x4_shuv2": ("resnet32x4", "ShuffleV2"),
    "vgg13_mv2": ("vgg13", "MobileNetV2"),
}
# What its code cannot do: maps of other widths have other singular vectors; and this student shows
# nothing from before an activation.
CANNOT = {
    ("res32x4_shuv2", "kdsvd"): "RuntimeError: 'Expected size for first two dimensions",
    ("vgg13_mv2", "kdsvd"): "RuntimeError: 'Expected size for first two dimensions",
    ("vgg13_mv2", "ofd"): "KeyError: \"'preact_feats'\"",
}
CASES = [(pair, method) for pair in PAIRS for method in METHODS]
# What the toolkit itself does on a recent PyTorch.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def data():
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    targets = torch.arange(20) * 5 + 4
    return ImageSet.build(images, targets, (0.5,) * 3, (0.25,) * 3, 4, True)


def settings(toolkit, pair, method):
    """Its own YAML for the method, or for the method and the pair, and the pair's networks."""
    teacher, student = PAIRS[pair]
    root = toolkit / "configs" / "cifar100"
    file = root / "dkd" / f"{pair}.yaml" if method == "dkd" else root / f"{method}.yaml"
    options = ["DISTILLER.TEACHER", teacher, "DISTILLER.STUDENT", student, "SOLVER.LR", "0.001"]
    options += ["DISTILLER.SOURCE", "mdistiller", "DISTILLER.FIX_UPSTREAM", "True"]
    return file, [*options, *(["CRD.NCE.K", "16"] if method == "crd" else [])]


def fitted(file, options):
    """The config, with what a refusal says that the networks have."""
    try:
        return load_cfg(file, options)
    except ConfigError as error:
        lines = str(error).splitlines()
    assert all(re.search(r" is not allowed, expected .*, as \w+ has$", line) for line in lines)
    found = [re.match(r"([\w.]+): .* expected (.*), as", line).groups() for line in lines]
    return load_cfg(file, [*options, *(word for pair in found for word in pair)])


def two_steps(cfg, data):
    """The loss of each of two steps."""
    torch.manual_seed(0)
    teacher = build_network(cfg.DISTILLER.TEACHER, 100, 32).state_dict()
    distiller = build_distiller(cfg, Weights(teacher, ROOT, ""), data)
    takes_features(distiller, data)
    meter, optimizer = Meter(1, 2), build_optimizer(cfg.SOLVER, distiller)
    batches = data.epoch(10, torch.Generator().manual_seed(0))
    before = [parameter.clone() for parameter in distiller.student.parameters()]
    train_on(batches, distiller, optimizer, meter)
    after = distiller.student.parameters()
    assert not all(map(torch.equal, before, after))
    return meter.terms


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "method"), CASES)
def test_each_method_trains_each_pair_or_says_why_not(toolkit, data, pair, method):
    cfg = fitted(*settings(toolkit, pair, method))
    if (pair, method) not in CANNOT:
        assert two_steps(cfg, data).isfinite().all()
        return
    with pytest.raises(ConfigError) as error:
        two_steps(cfg, data)
    text = f"DISTILLER.TYPE: {method.upper()} does not go with this pair: {CANNOT[pair, method]}"
    assert str(error.value).startswith(text) and "\n" not in str(error.value)
    assert "features of student {'feats': [(" in str(error.value)


@pytest.mark.parametrize(
    ("pair", "method"),
    [("wrn40_2_wrn_16_2", "crd"), ("wrn40_2_wrn_16_2", "reviewkd"), ("vgg13_mv2", "ofd")],
)
def test_what_does_not_fit_is_said_with_what_would(toolkit, data, pair, method):
    test_each_method_trains_each_pair_or_says_why_not(toolkit, data, pair, method)


def test_features_are_those_of_the_network(toolkit):
    shapes = feature_shapes("MobileNetV2", 100, 32, "cifar100")
    assert shapes["pooled_feat"] == (1280,) and "preact_feats" not in shapes
    assert shapes["feats"] == [(16, 16, 16), (12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2)]
    assert feature_shapes("ShuffleV2", 200, 64, "tiny_imagenet") == {}  # it is made for 32 pixels
    before = torch.get_rng_state()
    feature_shapes("resnet8", 100, 32, "cifar100")
    assert torch.equal(torch.get_rng_state(), before)
