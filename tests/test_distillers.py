"""The contract of every method, their neutral settings, and what they compose."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mdistiller_ext import distiller_dict, get_cfg
from mdistiller_ext.losses import dkd_loss, kd_loss, kl_divergence
from mdistiller_ext.policies import Context
from mdistiller_ext.policies.dat import sample_temperature
from mdistiller_ext.policies.lp import pruning_mask

METHODS = [name for name in distiller_dict if name != "NONE"]
OVER_DKD = ["DKD_EAT", "DKD_DAT", "DKD_LP", "DKD_EAT_DAT_LP"]
NEUTRAL = {
    "DKD_EAT": ["DKD_EAT.RANGE", 0.0],
    "DKD_DAT": ["DKD_DAT.RANGE", 0.0],
    "DKD_LP": ["DKD_LP.RATIOS", [0.0, 0.0, 0.0, 0.0]],
    "DKD_EAT_DAT_LP": [
        *("DKD_EAT_DAT_LP.EAT.RANGE", 0.0, "DKD_EAT_DAT_LP.DAT.RANGE", 0.0),
        *("DKD_EAT_DAT_LP.LP.RATIOS", [0.0]),
    ],
}


class Tiny(nn.Module):
    """A linear network with batch norm, so that its mode shows, in the models' output format."""

    def __init__(self, classes=100):
        super().__init__()
        self.norm = nn.BatchNorm1d(12)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        return 5 * self.fc(self.norm(x.flatten(1))), {}


def build(name, options=(), classes=100):
    cfg = get_cfg()
    cfg.SOLVER.EPOCHS = 80
    cfg.merge_from_list(list(options))
    torch.manual_seed(0)
    return distiller_dict[name](Tiny(classes), Tiny(classes), cfg).train()


def batch(size=64, classes=100):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(size, 3, 2, 2, generator=generator)
    return {"image": image, "target": torch.randint(classes, (size,), generator=generator)}


def step(distiller, epoch, **more):
    """One step from the start: losses and the student's gradients."""
    distiller.zero_grad()
    _, losses = distiller(**batch(), epoch=epoch, **more)
    sum(losses.values()).backward()
    return losses, [p.grad for p in distiller.student.parameters()]


@pytest.mark.parametrize("name", METHODS)
def test_contract(name):
    distiller = build(name)
    logits, losses = distiller(**batch(), epoch=1, index=torch.arange(64), anything="else")
    assert logits.shape == (64, 100) and logits.requires_grad
    assert list(losses) == ["loss_ce", "loss_kd"]
    assert all(loss.shape == () and loss.requires_grad for loss in losses.values())
    assert distiller.student.training and not distiller.teacher.training
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
    learnable = {id(p) for p in distiller.get_learnable_parameters()}
    own = learnable - {id(p) for p in distiller.student.parameters()}
    assert len(learnable) - len(own) == len(list(distiller.student.parameters()))
    assert len(own) == distiller.get_extra_parameters() == (name == "CTKD")
    distiller.eval()
    image = batch()["image"]
    assert torch.equal(distiller(image=image), distiller.student(image)[0])


def test_vanilla_is_cross_entropy():
    student = Tiny()
    distiller = distiller_dict["NONE"](student).train()
    logits, losses = distiller(**batch(), epoch=1)
    assert list(losses) == ["loss_ce"]
    assert losses["loss_ce"] == F.cross_entropy(logits, batch()["target"])


@pytest.mark.parametrize("name", list(NEUTRAL))
@pytest.mark.parametrize("epoch", [1, 11, 50, 80])
def test_neutral_settings_are_dkd_bit_for_bit(name, epoch):
    options = ["DKD.BETA", 2.0]
    losses, gradients = step(build(name, NEUTRAL[name]), epoch)
    expected_losses, expected_gradients = step(build("DKD", options), epoch)
    for key, expected in expected_losses.items():
        assert torch.equal(losses[key], expected)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("name", list(NEUTRAL))
def test_default_settings_are_not_dkd(name):
    losses, _ = step(build(name), 80)
    assert not torch.equal(
        losses["loss_kd"], step(build("DKD", ["DKD.BETA", 2.0]), 80)[0]["loss_kd"]
    )


def test_kd_weights_and_temperature():
    distiller = build("KD", ["KD.LOSS.CE_WEIGHT", 0.3, "KD.LOSS.KD_WEIGHT", 0.7])
    logits, losses = distiller(**batch(), epoch=1)
    teacher = distiller.teacher(batch()["image"])[0]
    assert losses["loss_ce"] == 0.3 * F.cross_entropy(logits, batch()["target"])
    assert losses["loss_kd"] == 0.7 * kd_loss(logits, teacher, 4).mean()


@pytest.mark.parametrize(("epoch", "warmup"), [(1, 0.05), (10, 0.5), (20, 1.0), (60, 1.0)])
def test_warmup(epoch, warmup):
    full = step(build("DKD"), 20)[0]["loss_kd"]
    torch.testing.assert_close(step(build("DKD"), epoch)[0]["loss_kd"], warmup * full)


@pytest.mark.parametrize(("epoch", "temperature"), [(1, 5.6), (40, 29.6 / 7), (80, 2.4)])
def test_the_combined_method_is_its_parts(epoch, temperature):
    """LP's mask first; DAT ranks over the kept classes and spreads around EAT's temperature."""
    distiller = build("DKD_EAT_DAT_LP")
    assert distiller.schedule(epoch)["temperature"] == pytest.approx(temperature)
    logits, losses = distiller(**batch(), epoch=epoch)
    target, teacher = batch()["target"], distiller.teacher(batch()["image"])[0]
    pruned = pruning_mask(teacher, target, {1: 0, 40: 13, 80: 40}[epoch])
    divergence = kl_divergence(logits, teacher, temperature, pruned)
    temperatures = sample_temperature(divergence, temperature, 0.05, 0.1)
    expected = dkd_loss(logits, teacher, target, 1.0, 2.0, temperatures, pruned).mean()
    torch.testing.assert_close(losses["loss_kd"], min(epoch / 20, 1) * expected)
    assert (distiller.monitor["dat_raised"], distiller.monitor["dat_lowered"]) == (6, 6)


@pytest.mark.parametrize("name", list(distiller_dict))
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_losses_are_in_float32_or_better(name, dtype, expected):
    distiller = build(name).to(dtype)
    image = batch()["image"].to(dtype)
    _, losses = distiller(image=image, target=batch()["target"], epoch=50)
    assert {loss.dtype for loss in losses.values()} == {expected}


def test_a_teacher_computes_in_float32_beside_a_student_in_bf16():
    """As its table has its answers."""
    distiller, image = build("DKD"), batch()["image"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student, teacher = distiller.logits(image, Context(distiller.schedule(1)))
        assert distiller.student(image)[0].dtype == torch.bfloat16
    assert torch.equal(teacher, distiller.teacher(image)[0])
    assert not torch.equal(student, distiller.student(image)[0])


def test_schedules_name_what_they_change():
    assert build("KD").schedule(1) == {"temperature": 4}
    assert build("DKD").schedule(5) == {"warmup": 0.25, "temperature": 4.0}
    assert build("DKD_LP").schedule(80) == {"warmup": 1.0, "temperature": 4.0, "pruned_ratio": 0.4}


def test_random_groups_are_as_many_samples_but_not_the_hardest():
    hardest, control = (
        build("DKD_DAT", ["DKD_DAT.GROUPS", groups]) for groups in ("hardest", "random")
    )
    for distiller in (hardest, control):
        step(distiller, 1)
        assert (distiller.monitor["dat_raised"], distiller.monitor["dat_lowered"]) == (6, 6)
    assert hardest.monitor["dat_kl"] == control.monitor["dat_kl"]
    assert hardest.monitor["dat_raised_kl"] > control.monitor["dat_raised_kl"]
    assert hardest.monitor["dat_lowered_kl"] < control.monitor["dat_lowered_kl"]


def test_random_classes_are_as_many_classes_but_not_the_lowest(monkeypatch):
    masks = []

    def kept(logits, target, count):
        masks.append(pruning_mask(logits, target, count))
        return masks[-1]

    monkeypatch.setattr("mdistiller_ext.policies.lp.pruning_mask", kept)
    for classes in ("lowest", "random", "random"):
        step(build("DKD_LP", ["DKD_LP.CLASSES", classes]), 80)
    assert all((mask.sum(dim=1) == 40).all() for mask in masks)
    assert not any(mask.gather(1, batch()["target"][:, None]).any() for mask in masks)
    assert not torch.equal(masks[0], masks[1])
