"""Networks by name keep the contract of ours, and what is none is refused with its reason."""

import pytest
import torch
from conftest import CPU, ROOT
from torch import nn

from mdistiller_ext.config import load_cfg
from mdistiller_ext.engine import train
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.models import build_network, is_network, register_network
from mdistiller_ext.models.zoo import OWN
from mdistiller_ext.toolkit.locate import import_toolkit

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, answer=None):
        super().__init__()
        self.flat, self.fc, self.answer = nn.Flatten(), nn.Linear(192, num_classes), answer
    def forward(self, x):
        z = self.fc(self.flat(x))
        return z if self.answer is None else self.answer(z)

def plain(num_classes): return Net(num_classes)
def pair(num_classes): return Net(num_classes, lambda z: (z, {"feats": [z]}))
def wide(num_classes): return Net(num_classes + 1)
def text(num_classes): return Net(num_classes, lambda z: "logits")
def nan(num_classes): return Net(num_classes, lambda z: z / 0)
def flat(num_classes): return Net(num_classes, lambda z: z.flatten())
def whole(num_classes): return Net(num_classes, lambda z: z.long())
def dies(num_classes): raise RuntimeError("no memory\\nat all")
def number(num_classes): return 3
"""


@pytest.fixture
def mine(workdir, monkeypatch):
    (workdir / "mine.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)


def built(name, side=8):
    return build_network(name, 10, side, key="DISTILLER.STUDENT")


def test_a_network_of_ones_own_has_the_contract_and_its_own_state_dict(mine):
    network = built("mine:plain")
    logits, features = network(torch.zeros(4, 3, 8, 8))
    assert logits.shape == (4, 10) and dict(features) == {}
    assert list(network.state_dict()) == ["fc.weight", "fc.bias"]
    other = built("mine:plain")
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.network.fc.weight, network.network.fc.weight)
    inside = nn.ModuleDict({"a": network})
    assert list(inside.state_dict()) == ["a.fc.weight", "a.fc.bias"]
    inside.load_state_dict(inside.state_dict())
    assert list(built("mine:pair")(torch.zeros(2, 3, 8, 8))[1]) == ["feats"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:wide", r"gives torch.float32 of shape \(2, 11\) for 2 images, expected .*\(2, 10\)"),
        ("mine:text", "gives a str, expected logits or"),
        ("mine:nan", "gives logits that are not finite for black images"),
        ("mine:flat", r"gives torch.float32 of shape \(20,\)"),
        ("mine:whole", "gives torch.int64 of shape"),
        ("mine:dies", "network mine:dies: cannot be built: .*no memory"),
        ("mine:number", "gave a int, expected a Module"),
        ("mine:missing", "network mine:missing: module 'mine' has no attribute 'missing'"),
        ("nowhere_at_all:net", "network nowhere_at_all:net: No module named"),
        ("torchvision:no_such", "network torchvision:no_such: cannot be built: .*no_such"),
        ("timm:no_such", "network timm:no_such: "),
    ],
)
def test_what_is_no_network_is_refused(mine, name, message):
    with pytest.raises(ConfigError, match=message) as error:
        built(name)
    assert "\n" not in str(error.value)


def test_images_of_another_size_are_refused(mine):
    with pytest.raises(ConfigError, match=r"mine:plain takes no images of 9 x 9: .*shapes"):
        built("mine:plain", side=9)


@pytest.mark.parametrize("name", ["vgg", "", "a:b:c d", "x y", ":", "timm:"])
def test_what_cannot_be_a_name(name, monkeypatch):
    monkeypatch.delenv("MDISTILLER_ROOT", raising=False)
    assert not is_network(name)


def test_torchvisions_network_trains_with_the_table(digits_cfg, workdir):
    options = ["DISTILLER.STUDENT", "torchvision:shufflenet_v2_x0_5", "SOLVER.EPOCHS", "1"]
    record, folder = train(digits_cfg("dkd", *options), "r", CPU)
    assert record["student"]["name"] == "torchvision:shufflenet_v2_x0_5"
    assert record["teacher_table"] is not None
    saved = torch.load(folder / "student_last", weights_only=True)["model"]
    assert "conv1.0.weight" in saved


def test_a_registered_network_is_allowed_trains_and_resumes(digits_cfg, mine):
    @register_network("my_net")
    def factory(num_classes):
        return build_network("mine:plain", num_classes, 8)

    try:
        options = ["DISTILLER.STUDENT", "my_net"]
        train(digits_cfg("kd", *options, "SOLVER.EPOCHS", "1"), "r", CPU)
        more = digits_cfg("kd", *options, "SOLVER.EPOCHS", "2")
        record, _ = train(more, "r", CPU, resume=True)
        assert len(record["epochs"]) == 2 and record["config"]["DISTILLER"]["STUDENT"] == "my_net"
    finally:
        del OWN["my_net"]


def test_the_toolkits_networks_are_its_own(toolkit):
    import mdistiller.models as there

    assert is_network("vgg8") and is_network("wrn_16_1") and not is_network("vgg9")
    for name in ("vgg8", "wrn_16_1", "MobileNetV2", "ShuffleV2"):
        torch.manual_seed(0)
        ours = build_network(name, 100, 32)
        torch.manual_seed(0)
        theirs = there.cifar_model_dict[name][0](num_classes=100)
        assert type(ours) is type(theirs)
        states = ours.state_dict(), theirs.state_dict()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_the_toolkits_configs_for_cifar_load_as_they_are(toolkit):
    root, *_ = import_toolkit()
    files = sorted((root / "configs" / "cifar100").rglob("*.yaml"))
    refused = []
    for file in files:
        try:
            load_cfg(file)
        except ConfigError as error:
            refused.append((file.parent.name, str(error)))
    assert len(files) > 20 and {folder for folder, _ in refused} == {"dot"}
    assert all("SOLVER.DOT.DELTA: no such key" in reason for _, reason in refused)


def test_a_method_of_features_names_the_network_without(toolkit, digits_cfg, mine):
    cfg = load_cfg(
        ROOT / "configs/cifar100/toolkit/at.yaml",
        [
            "DATASET.TYPE",
            "digits",
            "DISTILLER.STUDENT",
            "mine:plain",
            "DISTILLER.TEACHER",
            "resnet20",
            "SOLVER.EPOCHS",
            "1",
            "DISTILLER.TEACHER_CKPT",
            digits_cfg("kd").DISTILLER.TEACHER_CKPT,
        ],
    )
    with pytest.raises(ConfigError, match=r"takes features .* of mine:plain, which gives logits"):
        train(cfg, "r", CPU)
