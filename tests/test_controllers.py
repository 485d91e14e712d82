"""Temperatures and pruning that are found while training, against references of their own."""

import math

import numpy as np
import pytest
import torch
from composed import apply, composed, logits
from scipy.optimize import brentq, minimize_scalar

from mdistiller_ext.losses import kl_divergence
from mdistiller_ext.policies.base import RunFacts
from mdistiller_ext.policies.best_fit import ROUNDS, best_fit
from mdistiller_ext.policies.entropy import softness
from mdistiller_ext.policies.nucleus import outside
from mdistiller_ext.policies.steps import STEPS

close = torch.testing.assert_close


def alike(batch=64, classes=20, noise=1.0):
    """A student that is a softer teacher with something of its own."""
    student, teacher, target = logits(batch, classes)
    student = (0.4 * teacher + noise * student.detach() / 3).requires_grad_()
    return student, teacher, target


def divergence(gamma, student, teacher):
    """KL(softmax(γ z_t) ‖ softmax(z_s)) of one sample, in numpy."""
    p, q = (np.exp(z - z.max()) for z in (gamma * teacher, student))
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(np.maximum(p, 1e-300) / q)).sum())


def test_the_best_fit_is_the_least_divergence():
    student, teacher, _ = alike()
    found = best_fit(student.detach(), teacher, 1 / 8, 1.0)
    for gamma, row, answer in zip(found.tolist(), student.detach(), teacher, strict=True):
        fit = minimize_scalar(
            divergence,
            bounds=(1 / 8, 1),
            args=(row.numpy(), answer.numpy()),
            method="bounded",
            options={"xatol": 1e-9},
        )
        assert gamma == pytest.approx(fit.x, rel=8 ** (1 / 2**ROUNDS) - 1)
    assert found.std() > 0.05


def test_a_best_fit_at_a_bound_is_the_bound():
    _, teacher, _ = logits(4)
    for share, bound in ((5.0, 1.0), (0.01, 1 / 8), (-1.0, 1 / 8), (0.0, 1 / 8)):
        assert (best_fit(share * teacher, teacher, 1 / 8, 1.0) == bound).all()
    assert (best_fit(teacher, torch.zeros_like(teacher), 1 / 8, 1.0) <= 1).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_best_fit_of_single_precision_is_that_of_double(scale):
    """Also of a teacher that is certain."""
    student, teacher, _ = (scale * z.detach() for z in alike())
    found = best_fit(student.float() + 100, teacher.float() - 30, 1 / 8, 1.0)
    close(found.double(), best_fit(student, teacher, 1 / 8, 1.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("of", ["sample", "batch"])
@pytest.mark.parametrize("loss", ["KD", "DKD", "TTM"])
def test_a_student_that_is_a_multiple_of_its_teacher_has_that_temperature(loss, of, share):
    _, teacher, target = logits(32)
    batch = (share * teacher).requires_grad_(), teacher, target
    pair = apply(composed(loss, ["BEST_FIT"], BEST_FIT={"OF": of}), batch).pair
    tau = torch.full((32,), 1 / share, dtype=torch.float64)
    close(pair.tau_t, tau, rtol=1e-9, atol=0)
    close(pair.tau, tau, rtol=1e-9, atol=0)
    close(pair.seen["mean_temperature"], tau.sum(), rtol=1e-9, atol=0)
    if loss == "TTM":
        assert pair.tau_s == 1
        kl = kl_divergence(*batch[:2], 1.0, None, pair.tau_t)
        assert kl.max() < 1e-12  # at the best fit there is nothing left to learn
    else:
        close(pair.tau_s, tau, rtol=1e-9, atol=0)


def test_best_fits_of_a_batch_are_their_geometric_mean():
    batch = alike()
    each, one = (
        apply(composed("KD", ["BEST_FIT"], BEST_FIT={"OF": of}), batch).pair.tau
        for of in ("sample", "batch")
    )
    close(one, each.log().mean().exp().expand_as(one))
    assert each.min() < one[0] < each.max()


def test_a_best_fit_is_the_temperature_of_the_loss_and_has_no_gradient():
    """The loss and its gradient at temperatures that are given as numbers."""
    batch = alike()
    found = apply(composed("KD", ["BEST_FIT"]), batch)
    tau = found.pair.tau
    assert not tau.requires_grad
    value = tau**2 * kl_divergence(*batch[:2], tau)
    (gradient,) = torch.autograd.grad(value.sum(), batch[0])
    close(found.value, value.detach())
    close(found.gradient, gradient)


def test_the_bounds_are_shares_of_the_temperature():
    batch, bounds = alike(), {"LOW": 0.5, "HIGH": 1.5}
    tau = apply(composed("KD", ["BEST_FIT"], T=2.0, BEST_FIT=bounds), batch).pair.tau
    whole = apply(composed("KD", ["BEST_FIT"], T=2.0), batch).pair.tau
    assert math.isclose(tau.min(), 1.0) and math.isclose(tau.max(), 3.0)
    close(whole.clamp(1, 3), tau, rtol=8 ** (1 / 2**ROUNDS) - 1, atol=0)


def entropies(rows, temperature=1.0):
    """Of each row's softmax, in numpy."""
    p = np.exp((rows - rows.max(1, keepdims=True)) / temperature)
    p /= p.sum(1, keepdims=True)
    return -(p * np.log(np.maximum(p, 1e-300))).sum(1)


@pytest.mark.parametrize("tau", [0.5, 2.0, 8.0])
def test_softness_is_the_entropy_and_its_slope(tau):
    _, teacher, _ = logits()
    found, slope = softness(teacher, torch.full((16,), tau).double())
    below, there, above = (entropies(teacher.numpy(), tau * math.exp(d)) for d in (-1e-4, 0, 1e-4))
    close(found, torch.from_numpy(there))
    close(slope, torch.from_numpy((above - below) / 2e-4), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("of", "share"), [("student", 1.0), ("student", 0.7), ("uniform", 0.6)])
def test_the_teacher_comes_to_the_entropy_that_it_should_have(of, share):
    """As a root says that was found otherwise; on the way, as the formula says."""
    batch = alike()
    teacher, target = batch[1].numpy(), math.log(20)
    if of == "student":
        target = entropies(batch[0].detach().numpy()).mean()
    distiller = composed("KD", ["ENTROPY"], ENTROPY={"OF": of, "SHARE": share}).double()
    b = 4.0
    for _ in range(150):
        found = apply(distiller, batch).pair
        slope = np.mean(
            entropies(teacher, b * math.exp(1e-5)) - entropies(teacher, b * math.exp(-1e-5))
        )
        step = (share * target - entropies(teacher, b).mean()) / (slope / 2e-5)
        b *= math.exp(0.1 * min(max(step, -1), 1))
        assert found.tau.tolist() == pytest.approx([b] * 64, rel=1e-6)
    root = brentq(lambda t: entropies(teacher, t).mean() - share * target, 1, 8)
    assert b == pytest.approx(root, rel=1e-4) and abs(root - 4) > 0.1
    assert found.seen["mean_temperature"].item() == pytest.approx(64 * b)
    assert not found.tau.requires_grad


@pytest.mark.parametrize(("share", "bound"), [(1.0, 6.0), (0.001, 2.0)])
def test_an_entropy_out_of_reach_is_the_bound(share, bound):
    settings = {"OF": "uniform", "SHARE": share, "RATE": 1.0, "LOW": 0.5, "HIGH": 1.5}
    distiller = composed("KD", ["ENTROPY"], ENTROPY=settings).double()
    for _ in range(5):
        found = apply(distiller, alike())
    assert found.pair.tau[0].item() == pytest.approx(bound)


def test_teachers_that_know_nothing_or_all_leave_the_temperature_finite():
    student, teacher, target = alike()
    for scale in (0.0, 1e6):
        distiller = composed("KD", ["ENTROPY"]).double()
        for _ in range(3):
            found = apply(distiller, (student, scale * teacher, target))
        assert 1 <= found.pair.tau[0] <= 8 and found.gradient.isfinite().all()


def test_a_rate_of_0_is_the_loss_itself():
    kd, found = (
        apply(composed("KD", policies, ENTROPY={"RATE": 0.0}), alike())
        for policies in ([], ["ENTROPY"])
    )
    assert torch.equal(kd.value, found.value) and torch.equal(kd.gradient, found.gradient)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_the_nucleus_is_the_smallest_set_with_the_label_and_nearly_all(epsilon, tau):
    """Sets are tried from the smallest on."""
    _, teacher, target = logits(32, 20)
    target[0] = teacher[0].argmin()
    mask = outside(teacher, target, tau, epsilon).numpy()
    for row, answer, y in zip(mask, teacher.numpy(), target.tolist(), strict=True):
        p = np.exp(answer / tau)
        p /= p.sum()
        others = [c for c in np.argsort(-answer) if c != y]
        for count in range(1, 20):
            kept = [y, *others[:count]]
            if p[kept].sum() > 1 - epsilon:
                break
        assert set(np.flatnonzero(~row)) == set(kept)
        assert p[row].sum() < epsilon
    assert len(set(mask.sum(1))) > 1 or epsilon > 0.9


def test_equal_logits_are_pruned_in_class_order_and_two_classes_stay():
    mask = outside(torch.zeros(1, 6), torch.tensor([1]), 1.0, 0.4)
    assert mask.tolist() == [[True, False, True, False, False, False]]
    certain = torch.tensor([[0.0, 1e4, 1.0, -1.0]])
    for y, kept in ((1, {1, 2}), (3, {1, 3}), (0, {0, 1})):
        mask = outside(certain, torch.tensor([y]), 1.0, 0.05)
        assert set(np.flatnonzero(~mask[0].numpy())) == kept


@pytest.mark.parametrize("policies", [["EAT"], ["BEST_FIT"], ["ENTROPY"], ["CTKD"]])
def test_the_nucleus_is_that_of_the_base_temperature_whoever_sets_it(policies):
    batch = alike()
    distiller = composed("KD", ["NUCLEUS", *policies], NUCLEUS={"EPSILON": 0.1}).double()
    for epoch in (1, 80):
        pair = apply(distiller, batch, epoch).pair
        assert torch.equal(pair.pruned, outside(*batch[1:], pair.tau_t, 0.1))
        assert pair.seen["mean_pruned_ratio"].item() == pytest.approx(pair.pruned.sum() / 20)
    assert not torch.equal(pair.pruned, outside(*batch[1:], 4.0, 0.1))


def test_more_is_pruned_as_the_temperature_falls():
    _, teacher, target = alike()
    counts = [outside(teacher, target, tau, 0.1).sum() for tau in (8.0, 4.0, 2.0, 1.0)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_what_a_nucleus_lumped_leaves_out_is_bounded(epsilon):
    """KL of all - KL lumped = (1 - m) KL of the pruned, 1 - m < EPSILON."""
    batch = alike()
    settings = {"EPSILON": epsilon, "MODE": "lump"}
    lump, full = (
        apply(composed("KD", policies, NUCLEUS=settings), batch) for policies in (["NUCLEUS"], [])
    )
    pruned = outside(*batch[1:], 4.0, epsilon)
    some = pruned.any(dim=1)
    within = kl_divergence(*batch[:2], 4.0, (~pruned).where(some[:, None], False))
    mass = (batch[1] / 4).softmax(dim=1).where(pruned, 0).sum(dim=1)
    missing = full.value - lump.value
    close(missing, (16 * mass * within).detach(), rtol=1e-8, atol=1e-9)
    assert some.any() and (mass < epsilon).all()


@pytest.mark.parametrize("loss", ["KD", "DKD", "TTM"])
def test_what_is_outside_the_nucleus_gets_exactly_no_gradient(loss):
    found = apply(composed(loss, ["NUCLEUS", "BEST_FIT"], NUCLEUS={"EPSILON": 0.2}), alike())
    pruned = found.pair.pruned
    assert pruned.any() and (found.gradient[pruned] == 0).all()
    assert (found.gradient != 0).any(dim=1).all()


def test_an_epsilon_of_0_is_the_loss_itself():
    kd, found = (
        apply(composed("DKD", policies, NUCLEUS={"EPSILON": 0.0}), alike())
        for policies in ([], ["NUCLEUS"])
    )
    assert torch.equal(kd.value, found.value) and torch.equal(kd.gradient, found.gradient)


def test_steps_replay_what_another_run_found():
    distiller = composed("KD", ["STEPS"], STEPS={"TEMPERATURES": [8.0, 3.0], "STEP_EPOCHS": 2})
    found = [distiller.schedule(epoch)["temperature"] for epoch in (1, 2, 3, 4, 80)]
    assert found == [8, 8, 3, 3, 3]
    for epoch, tau in ((1, 8.0), (80, 3.0)):
        constant = apply(composed("KD", T=tau), alike())
        assert torch.equal(apply(distiller, alike(), epoch).value, constant.value)


def test_what_steps_never_do_is_said():
    steps, run = STEPS(TEMPERATURES=[4.0, 4.0, 2.0], STEP_EPOCHS=5), RunFacts(10, 64, 4.0)
    assert steps.idle(run) == "TEMPERATURES are all T, 4.0"
    assert steps.unreached(run) == {"TEMPERATURES": ([2.0], "with STEP_EPOCHS 5 all take 11")}
    assert not steps.idle(run._replace(epochs=11)) and not steps.idle(run._replace(temperature=2.0))
    assert not steps.unreached(run._replace(epochs=11))
