"""Networks of one's own, of any form and with any names: what a run writes can be read again, and
no network is damaged, or laid out in memory as it does not work."""

import copy
import importlib
import json
import sys

import pytest
import torch
from conftest import CPU, same_weights
from torch import nn
from torch.nn import functional

from mdistiller_ext import distill, register_dataset, register_method
from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import DATASETS, ImageSet
from mdistiller_ext.distillers import Vanilla, distiller_dict
from mdistiller_ext.engine import train
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.models import cifar_model_dict
from mdistiller_ext.teacher import digest

MINE = """
import torch
from torch import nn

class LeNet(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc, self.unused = nn.Linear(96, num_classes), nn.Linear(2, 2)
    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn(self.conv(x)).relu(), 2)
        return self.fc(x.view(x.shape[0], -1))

class Holder(nn.Module):
    '''Has a network as an attribute of any name, and a layer called as one of that network's.'''
    def __init__(self, name, network):
        super().__init__()
        setattr(self, name, network)
        self.name, self.fc = name, nn.Linear(10, 10)
    def forward(self, x):
        return self.fc(getattr(self, self.name)(x))

class Counting(LeNet):
    '''Changes buffers whatever its mode.'''
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, x):
        self.calls += 1
        self.bn.running_mean = self.bn.running_mean + 1
        return super().forward(x)

class Pair(LeNet):
    def forward(self, x):
        z = super().forward(x)
        return z, z

def lenet(num_classes): return LeNet(num_classes)
def parallel(num_classes): return nn.DataParallel(LeNet(num_classes))
def compiled(num_classes): return torch.compile(LeNet(num_classes), backend="eager")
def both(num_classes): return nn.DataParallel(compiled(num_classes))
def student(num_classes): return Holder("student", LeNet(num_classes))
def network(num_classes): return Holder("network", LeNet(num_classes))
def model(num_classes): return Holder("model", parallel(num_classes))
def module(num_classes): return nn.DataParallel(Holder("module", student(num_classes)))
def counting(num_classes): return Counting(num_classes)
def pair(num_classes): return Pair(num_classes)
def frozen(num_classes):
    network = LeNet(num_classes)
    network.conv.requires_grad_(False)
    return network
"""


def split(count):
    """Images (count, 3, 8, 8) with a bright row that tells the class, and their labels."""
    target = torch.arange(count) % 10
    images = torch.randint(120, (count, 3, 8, 8), dtype=torch.uint8)
    images[torch.arange(count), target % 3, target // 2] += 130
    return images, target


@pytest.fixture
def mine(workdir, monkeypatch):
    """A module of networks; a data set of 130 images and 40 to test, of 8 x 8."""
    (workdir / "own_nets.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(workdir))

    splits = split(130), split(40)

    @register_dataset("few")
    def load(settings):
        return [ImageSet.build(*part, [0.4] * 3, [0.3] * 3, 1, False) for part in splits]

    yield importlib.import_module("own_nets")
    del DATASETS["few"], sys.modules["own_nets"]


def config(*options):
    """One or more epochs on the few images."""
    words = ["DATASET.TYPE", "few", "SOLVER.LR_DECAY_STAGES", [], "SOLVER.EPOCHS", 1]
    return load_cfg(None, [*words, *options])


FORMS = ["lenet", "parallel", "compiled", "student", "network", "model", "module"]


@pytest.mark.parametrize("form", FORMS)
def test_what_a_run_writes_is_read_again(mine, tool, form):
    """A student is trained and gone on with; then evaluated, and a teacher, from its files."""
    words = ["DISTILLER.TYPE", "NONE", "DISTILLER.STUDENT", f"own_nets:{form}"]
    two = [*words, "SOLVER.EPOCHS", 2]
    _, whole = train(config(*two), "whole", CPU)
    train(config(*words), "run", CPU)
    record, folder = train(config(*two), "run", CPU, resume=True)
    assert same_weights(folder, whole)
    for file in ("student_last", "latest"):
        words = "-m", f"own_nets:{form}", "-c", str(folder / file), "-d", "few", "--json"
        status, output, _ = tool("eval", *words)
        assert status == 0 and json.loads(output)["top1"] == record["last_epoch_top1"]
    words = ["DISTILLER.TEACHER", f"own_nets:{form}", "DISTILLER.STUDENT", "own_nets:lenet"]
    words += ["DISTILLER.TYPE", "KD", "DISTILLER.TEACHER_CKPT", str(folder / "student_last")]
    taught, _ = train(config(*words), "taught", CPU)
    assert taught["teacher"]["test_top1"] == record["last_epoch_top1"]
    assert taught["teacher_table"]["misses"] == 130


def test_wrapped_networks_that_are_given_get_their_weights(mine):
    """What torch.compile and DataParallel make of a network, by `distill`."""
    student, images = mine.both(10), split(96)
    options = ["SOLVER.EPOCHS", 1, "SOLVER.LR_DECAY_STAGES", []]
    _, folder = distill(student, mine.compiled(10), images, images, options=options, device=CPU)
    saved = torch.load(folder / "student_last", weights_only=True)["model"]
    assert "module._orig_mod.fc.weight" in saved
    now = student.state_dict()
    assert all(torch.equal(now[key], value) for key, value in saved.items())


@pytest.mark.parametrize("table", ["auto", "off"])
def test_frozen_and_unused_layers_and_views_look_ahead(mine, table):
    """A network that wants torch's own layout, some of whose weights have no gradient."""
    words = ["DISTILLER.STUDENT", "own_nets:frozen", "DISTILLER.TEACHER", "own_nets:lenet"]
    torch.save(mine.lenet(10).state_dict(), "teacher.pth")
    words += ["DISTILLER.TEACHER_CKPT", "teacher.pth", "DISTILLER.TYPE", "DKD_HYPERGRADIENT"]
    words += ["DKD_HYPERGRADIENT.EVERY", 1, "DATASET.HOLDOUT", 0.3, "DKD_HYPERGRADIENT.STEP", 0.1]
    record, folder = train(config(*words, "DISTILLER.TEACHER_TABLE", table), "r", CPU)
    assert record["status"] == "finished"
    kept = torch.load(folder / "latest", weights_only=True)["model"]
    assert kept["learned.HYPERGRADIENT.log_share"] != 0


def test_each_network_is_laid_out_as_it_works(mine):
    """A network that takes any layout has the bits that it has beside a teacher that does not."""
    words = ["DISTILLER.STUDENT", "resnet8", "DISTILLER.TYPE", "KD", "KD.LOSS.KD_WEIGHT", 0.0]
    words += ["DISTILLER.TEACHER_CKPT", "teacher.pth", "DISTILLER.TEACHER_TABLE", "off"]
    folders = []
    for teacher in ("resnet8", "own_nets:lenet"):
        network = mine.lenet(10) if ":" in teacher else cifar_model_dict[teacher][0](num_classes=10)
        torch.save(network.state_dict(), "teacher.pth")
        _, folder = train(config(*words, "DISTILLER.TEACHER", teacher), teacher[:6], CPU)
        folders.append(folder)
    assert same_weights(*folders)


@pytest.fixture
def library(mine, monkeypatch):
    """A stand-in for timm, which gives a trained network in training mode."""
    torch.manual_seed(1)
    trained = {name: getattr(mine, name)(10) for name in ("lenet", "counting", "pair")}
    trained["wide"] = mine.lenet(11)

    class Timm:
        __version__ = "0"

        @staticmethod
        def create_model(name, pretrained=False, num_classes=10):
            return copy.deepcopy(trained[name]) if pretrained else getattr(mine, name)(num_classes)

    monkeypatch.setitem(sys.modules, "timm", Timm)
    return trained


def pretrained(name):
    words = ["DISTILLER.TEACHER", f"timm:{name}", "DISTILLER.TEACHER_CKPT", "pretrained"]
    return config(*words, "DISTILLER.STUDENT", "own_nets:lenet", "DISTILLER.TYPE", "KD")


@pytest.mark.parametrize("name", ["lenet", "counting"])
def test_a_pretrained_teacher_stays_as_it_is(library, name):
    record, _ = train(pretrained(name), "r", CPU)
    assert record["teacher"]["sha256"] == digest(library[name].state_dict())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wide", r"timm:wide gives torch.float32 of shape \(2, 11\) for 2 images, expected .*10"),
        ("pair", r"timm:pair gives \(Tensor, Tensor\), expected logits or"),
    ],
)
def test_a_pretrained_network_that_does_not_fit_is_one_line(library, name, message):
    with pytest.raises(
        ConfigError, match=f"^DISTILLER.TEACHER_CKPT pretrained: {message}"
    ) as error:
        train(pretrained(name), "r", CPU)
    assert "\n" not in str(error.value)


def noise_when_built(self, student, teacher, cfg):
    Vanilla.__init__(self, student, teacher)
    teacher.train()(torch.randn(8, 3, 8, 8))


def test_a_method_that_changes_its_teacher_is_refused(mine):
    register_method("NOISY")(type("Noisy", (Vanilla,), {"__init__": noise_when_built}))
    options = ["SOLVER.EPOCHS", 1, "SOLVER.LR_DECAY_STAGES", []]
    message = "^DISTILLER.TYPE: the constructor of NOISY changes the teacher, as bn.running_mean: "
    given = mine.lenet(10), mine.lenet(10), split(96), split(96)
    try:
        with pytest.raises(ConfigError, match=message) as error:
            distill(*given, method="NOISY", options=options, device=CPU)
        assert "\n" not in str(error.value)
    finally:
        del distiller_dict["NOISY"]


class Unsteady(nn.Module):
    """Its answers depend on chance, or on the rest of the batch."""

    def __init__(self, part):
        super().__init__()
        self.part, self.linear = part, nn.Linear(3 * 8 * 8, 10)

    def forward(self, image):
        return self.linear(self.part(image).flatten(1))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (lambda image: functional.dropout(image, 0.5), "differently each time"),
        (nn.BatchNorm2d(3, track_running_stats=False), "differently in another batch"),
        (nn.BatchNorm2d(3), ""),
    ],
)
def test_a_network_whose_answers_cannot_be_reproduced_is_said(workdir, capsys, part, reason):
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    split, options = (images, torch.arange(20) % 10), ["SOLVER.EPOCHS", 1, "DATASET.FLIPS", "off"]
    options += ["SOLVER.LR_DECAY_STAGES", [], "DISTILLER.TEACHER_TABLE", "off"]
    distill(Unsteady(part), Unsteady(nn.Identity()), split, split, options=options, device="cpu")
    said = capsys.readouterr().out
    assert (f"warning: the student answers an image {reason}" in said) == bool(reason)
    assert "the teacher answers" not in said
