"""Temperatures and pruning that are found while training, against references of their own."""

import math

import numpy as np
import pytest
import torch
from composed import apply, composed, logits
from scipy.optimize import minimize_scalar

from mdistiller_ext.losses import kl_divergence
from mdistiller_ext.policies.best_fit import ROUNDS, best_fit

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
