"""The losses against an independent float64 reference, at extremes, and in their limits."""

import math

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F

from mdistiller_ext.losses import dkd_loss, kd_loss, kl_divergence
from mdistiller_ext.policies.lp import pruning_mask

BATCHES = [1, 7, 16, 64]
TEMPERATURES = [0.5, 1.0, 4.0, 20.0]


def logits(batch: int, classes: int, scale: float = 3.0, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, batch, classes, generator=generator)
    target = torch.randint(classes, (batch,), generator=generator)
    return student.to(dtype), teacher.to(dtype), target


def assert_rows(loss, student, expected):
    """The losses, and the gradients by the student's logits."""
    (gradient,) = torch.autograd.grad(loss.sum(), student, retain_graph=True)
    found = np.column_stack([loss.detach().numpy(), gradient.numpy()])
    np.testing.assert_allclose(found, expected.value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_equals_the_reference(batch, classes, temperature):
    student, teacher, target = logits(batch, classes, dtype=torch.float64)
    z_s, z_t, y = student.numpy(), teacher.numpy(), target.numpy()
    student.requires_grad_()
    kd = kd_loss(student, teacher, temperature)
    assert_rows(kd, student, reference.kd(z_s, z_t, temperature))
    dkd = dkd_loss(student, teacher, target, 1.0, 8.0, temperature)
    assert_rows(dkd, student, reference.dkd(z_s, z_t, y, 1.0, 8.0, temperature))


@pytest.mark.parametrize("batch", BATCHES)
def test_temperature_per_sample_and_pruned_classes_equal_the_reference(batch):
    student, teacher, target = logits(batch, 100, dtype=torch.float64)
    temperature = torch.linspace(0.5, 20, batch, dtype=torch.float64)
    pruned = pruning_mask(teacher, target, 40)
    z_s, z_t, y, tau = (x.numpy() for x in (student, teacher, target, temperature))
    student.requires_grad_()
    loss = dkd_loss(student, teacher, target, 0.7, 2.0, temperature, pruned)
    assert_rows(loss, student, reference.dkd(z_s, z_t, y, 0.7, 2.0, tau, pruned.numpy()))
    kl = kl_divergence(student, teacher, temperature, pruned)
    assert_rows(kl, student, reference.kl(z_s, z_t, tau, ~pruned.numpy()))


def test_float32_is_close_to_float64():
    student, teacher, target = logits(64, 100)
    single = dkd_loss(student, teacher, target, 1.0, 2.0, 4.0)
    double = dkd_loss(student.double(), teacher.double(), target, 1.0, 2.0, 4.0)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=1e-6)


def test_value_worked_out_by_hand():
    # Two classes, T = 1: teacher (3/4, 1/4), student (1/2, 1/2), target 0; NCKD has one class.
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kd_loss(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)
    target = torch.tensor([0])
    loss = dkd_loss(student, teacher, target, 1.0, 8.0, 1.0).item()
    assert loss == pytest.approx(expected, rel=1e-6)


def test_alpha_one_beta_one_minus_target_probability_is_kd():
    """KD = TCKD + (1 - p_y of the teacher) NCKD (Zhao et al., eq. 7)."""
    student, teacher, target = logits(16, 100, dtype=torch.float64)
    tckd, nckd = (dkd_loss(student, teacher, target, a, 1.0 - a, 4.0) for a in (1.0, 0.0))
    others = 1 - F.softmax(teacher / 4.0, dim=1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(kd_loss(student, teacher, 4.0), tckd + others * nckd)


def test_bfloat16_logits_are_computed_in_float32():
    student, teacher, target = (x.bfloat16() if x.is_floating_point() else x for x in logits(7, 10))
    low = dkd_loss(student, teacher, target, 1.0, 2.0, 4.0)
    assert low.dtype == torch.float32
    assert torch.equal(low, dkd_loss(student.float(), teacher.float(), target, 1.0, 2.0, 4.0))


def test_equal_logits_give_zero():
    student, _, target = logits(16, 100)
    assert kd_loss(student, student, 4.0).abs().max() < 1e-5
    assert dkd_loss(student, student, target, 1.0, 8.0, 4.0).abs().max() < 1e-5


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("classes", [2, 100])
def test_a_float_and_equal_temperatures_give_the_same_bits(batch, classes):
    student, teacher, target = logits(batch, classes)
    for value in (4.0, 5.142857142857142):
        same = torch.full((batch,), value)
        for temperature in (same, torch.tensor(value)):
            assert torch.equal(
                dkd_loss(student, teacher, target, 1.0, 2.0, value),
                dkd_loss(student, teacher, target, 1.0, 2.0, temperature),
            )


def test_nothing_pruned_gives_the_same_bits():
    student, teacher, target = logits(64, 100)
    none = torch.zeros(64, 100, dtype=torch.bool)
    assert torch.equal(
        dkd_loss(student, teacher, target, 1.0, 2.0, 4.0),
        dkd_loss(student, teacher, target, 1.0, 2.0, 4.0, none),
    )


def test_pruned_equals_slicing_the_classes_away():
    student, teacher, target = logits(1, 100, dtype=torch.float64)
    pruned = pruning_mask(teacher, target, 27)
    kept = (~pruned[0]).nonzero()[:, 0]
    new_target = (kept == target).nonzero()[0]
    torch.testing.assert_close(
        dkd_loss(student, teacher, target, 1.0, 2.0, 4.0, pruned),
        dkd_loss(student[:, kept], teacher[:, kept], new_target, 1.0, 2.0, 4.0),
    )


def test_pruned_classes_get_exactly_no_gradient():
    student, teacher, target = logits(64, 100, scale=5.0)
    pruned = pruning_mask(teacher, target, 40)
    student.requires_grad_()
    dkd_loss(student, teacher, target, 1.0, 2.0, 4.0, pruned).mean().backward()
    assert student.grad is not None
    assert (student.grad[pruned] == 0).all()
    assert (student.grad[~pruned] != 0).all()


@pytest.mark.parametrize("classes", [2, 5])
def test_gradcheck(classes):
    student, teacher, target = logits(3, classes, scale=1.0, dtype=torch.float64)
    temperature = torch.tensor([0.5, 4.0, 20.0], dtype=torch.float64)
    pruned = pruning_mask(teacher, target, 2) if classes > 3 else None
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, teacher, temperature), student)
    assert torch.autograd.gradcheck(
        lambda s: dkd_loss(s, teacher, target, 1.0, 2.0, temperature, pruned), student
    )


def extremes(batch: int, classes: int):
    """Logits of +-1e4, margins of 1e3 either way, equal ones, one dominating class."""
    plain, _, target = logits(batch, classes)
    ahead = torch.zeros(batch, classes).scatter(1, target[:, None], 1e3)
    return target, [1e4 * plain.sign(), ahead, -ahead, torch.zeros(batch, classes), 1e4 * plain]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_extreme_logits_stay_finite_and_right(batch, classes, temperature):
    target, cases = extremes(batch, classes)
    tau = np.full(batch, temperature)
    for teacher in cases:
        pruned = pruning_mask(teacher, target, classes // 2 - 1)
        for student in cases:
            student = student.clone().requires_grad_()
            for mask in (None, pruned):
                loss = dkd_loss(student, teacher, target, 1.0, 2.0, temperature, mask)
                (gradient,) = torch.autograd.grad(loss.sum(), student)
                assert loss.isfinite().all() and gradient.isfinite().all()
                assert (loss >= -1e-3).all()
            wide = kl_divergence(student.detach().double(), teacher.double(), temperature)
            kd = kd_loss(student, teacher, temperature)
            assert (
                kd.isfinite().all() and torch.autograd.grad(kd.sum(), student)[0].isfinite().all()
            )
            torch.testing.assert_close(kd.double(), tau[0] ** 2 * wide, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("shape", [(7, 1), (6,), (1,), (7, 10)])
def test_temperature_of_another_shape_is_refused(shape):
    student, teacher, target = logits(7, 10)
    with pytest.raises(ValueError, match=r"temperature has shape .*expected \(\) or \(7,\)"):
        dkd_loss(student, teacher, target, 1.0, 2.0, torch.ones(shape))


@pytest.mark.parametrize("temperature", [0.0, -4.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    student, teacher, target = logits(7, 10)
    for loss in (
        lambda: kl_divergence(student, teacher, temperature),
        lambda: kd_loss(student, teacher, temperature),
        lambda: dkd_loss(student, teacher, target, 1.0, 2.0, temperature),
    ):
        with pytest.raises(ValueError, match=r"temperature is \S+, expected a positive number"):
            loss()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"logits_teacher": torch.randn(1, 10)}, r"logits_teacher has shape \(1, 10\)"),
        ({"logits_teacher": torch.randn(8, 1)}, r"logits_teacher has shape \(8, 1\)"),
        ({"logits_student": torch.randn(1, 10)}, r"logits_teacher has shape \(8, 10\)"),
        ({"logits_student": torch.randn(10)}, r"shape \(10,\), expected \(B, C\)"),
        ({"pruned": torch.zeros(10).bool()}, r"pruned has shape \(10,\), expected \(8, 10\)"),
        ({"pruned": torch.zeros(8, 1).bool()}, r"pruned has shape \(8, 1\)"),
        ({"target": torch.zeros(7).long()}, r"target has shape \(7,\), expected \(8,\)"),
    ],
)
def test_nothing_is_broadcast(changes, fault):
    given = {name: torch.randn(8, 10) for name in ("logits_student", "logits_teacher")} | changes
    if "target" not in changes:
        with pytest.raises(ValueError, match=fault):
            kl_divergence(**given)
    given = {"target": torch.zeros(8).long(), "alpha": 1.0, "beta": 2.0, **given}
    with pytest.raises(ValueError, match=fault):
        dkd_loss(**given, temperature=4.0)


def test_no_value_of_a_tensor_is_looked_at():
    """That would wait for the device; meta tensors have none."""
    student = torch.empty(8, 10, device="meta")
    target, temperature = torch.empty(8, device="meta").long(), torch.empty(8, device="meta")
    pruned = torch.empty(8, 10, device="meta").bool()
    assert dkd_loss(student, student, target, 1.0, 2.0, temperature, pruned).shape == (8,)
    assert kd_loss(student, student, temperature).shape == (8,)
