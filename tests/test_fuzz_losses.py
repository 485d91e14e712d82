"""The fuzz in its short form, that it sees faults, and that its reference is right."""

from dataclasses import replace
from decimal import Decimal, localcontext

import fuzz_losses
import numpy as np
import pytest
import reference
import torch

from mdistiller_ext.losses import LOSSES, kl_divergence
from mdistiller_ext.losses.dkd import DKD
from mdistiller_ext.policies import dat, lp


def fuzz(name, cases):
    *_, tally = fuzz_losses.fuzz(name, cases)
    return tally


@pytest.mark.parametrize("name", fuzz_losses.METHODS)
def test_short_form(name):
    tally = fuzz(name, 800)
    assert tally.faults == []
    # The bound is near what happens: a result ten times less exact is a fault.
    assert min(tally.worst.values()) > 0.01 and max(tally.worst.values()) > 0.1


@pytest.mark.parametrize("name", fuzz_losses.COMPOSED)
def test_short_form_of_any_composition(name):
    tally = fuzz(name, 300)
    assert tally.faults == []
    assert max(tally.worst.values()) > 0.001


@pytest.mark.parametrize("loss", LOSSES)
def test_every_composition_is_finite_at_the_extremes(loss):
    assert fuzz_losses.compositions_stay_finite(loss, 30) == []


@pytest.mark.parametrize("loss", LOSSES)
def test_a_fault_of_any_loss_is_seen(loss, monkeypatch):
    right = LOSSES[loss].__call__
    monkeypatch.setattr(LOSSES[loss], "__call__", lambda own, pair: right(own, pair) * 1.001)
    assert f"LOGIT {loss} with" in str(fuzz(f"LOGIT {loss}", 60).faults)


def test_what_is_not_finite_is_seen(monkeypatch):
    monkeypatch.setattr(LOSSES["KD"], "__call__", naive)
    assert "nan" in str(fuzz_losses.compositions_stay_finite("KD", 30))


dkd = DKD.__call__


def naive(loss, pair):
    """The logarithm of a softmax that has rounded to 0."""
    tau = torch.as_tensor(pair.tau).reshape(-1, 1)
    p_s, p_t = ((z / tau).softmax(1) for z in (pair.student, pair.teacher))
    return (p_t * (p_t.log() - p_s.log())).sum(1)


def slightly_off(loss, pair):
    return dkd(loss, pair) * (1 + 1e-5)


def rounded(loss, pair):
    logits = {"student": pair.student.bfloat16(), "teacher": pair.teacher.bfloat16()}
    return dkd(loss, replace(pair, **logits))


def offset_gradient(loss, pair):
    extra = 1e-5 * pair.student[:, 0]
    return dkd(loss, pair) + extra - extra.detach()


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (naive, "loss_kd nan"),
        (slightly_off, "loss_kd "),
        (rounded, "loss_kd gradient"),
        (offset_gradient, "loss_kd gradient"),
    ],
)
def test_a_fault_is_seen(monkeypatch, fault, seen):
    monkeypatch.setattr(DKD, "__call__", fault)
    assert seen in str(fuzz("DKD", 300).faults)


def test_a_wrong_ranking_is_seen(monkeypatch):
    monkeypatch.setattr(dat, "kl_divergence", lambda *args: -kl_divergence(*args))
    assert "DAT: a wrong ranking" in str(fuzz("DKD_DAT", 300).faults)


def test_a_wrongly_pruned_class_is_seen(monkeypatch):
    mask = lp.pruning_mask
    monkeypatch.setattr(lp, "pruning_mask", lambda z, y, count: mask(-z, y, count))
    assert "a pruned class gets a gradient" in str(fuzz("DKD_LP", 300).faults)


def kl_by_definition(p, q):
    return sum(a * (a / b).ln() for a, b in zip(p, q, strict=True))


def losses_by_definition(student, teacher, y, tau):
    """CE, T^2 KL of KD, T^2 (KL(b) + 2 KL(q)) of DKD, with probabilities as they are written."""
    certain = [z.exp() for z in student]
    exps = [[(z / tau).exp() for z in logits] for logits in (teacher, student)]
    others = [e[:y] + e[y + 1 :] for e in exps]
    p_t, p_s = ([e / sum(row) for e in row] for row in exps)
    q_t, q_s = ([e / sum(row) for e in row] for row in others)
    b_t, b_s = (
        (row[y] / sum(row), sum(rest) / sum(row)) for row, rest in zip(exps, others, strict=True)
    )
    return (
        -(certain[y] / sum(certain)).ln(),
        tau**2 * kl_by_definition(p_t, p_s),
        tau**2 * (kl_by_definition(b_t, b_s) + 2 * kl_by_definition(q_t, q_s)),
    )


def with_differences(student, teacher, y, tau):
    """Each loss, followed by its difference quotients by the student's logits."""
    step = Decimal("1e-25")
    columns = [losses_by_definition(student, teacher, y, tau)]
    for j, z in enumerate(student):
        above, below = (
            losses_by_definition([*student[:j], z + h, *student[j + 1 :]], teacher, y, tau)
            for h in (step, -step)
        )
        columns.append([(a - b) / (2 * step) for a, b in zip(above, below, strict=True)])
    return [[float(value) for value in losses] for losses in zip(*columns, strict=True)]


@pytest.mark.parametrize("tau", [0.5, 4.0])
def test_the_reference_is_the_definition(tau):
    """At the same extremes, with 80 digits, where nothing underflows."""
    rng = np.random.default_rng(0)
    student, teacher = fuzz_losses.rows(rng, 24, 4), fuzz_losses.rows(rng, 24, 4)
    target = rng.integers(4, size=24)
    expected = []
    with localcontext() as context:
        context.prec = 80
        for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
            row = with_differences([*map(Decimal, s)], [*map(Decimal, t)], y, Decimal(tau))
            expected.append(row)
    largest = np.maximum(np.abs(student).max(1), np.abs(teacher).max(1))
    unit = 8 * np.finfo(float).eps * (1 + largest / min(tau, 1))[:, None]
    found = (
        reference.cross_entropy(student, target),
        reference.kd(student, teacher, tau),
        reference.dkd(student, teacher, target, 1.0, 2.0, tau),
    )
    for rows, exact in zip(found, np.swapaxes(expected, 0, 1), strict=True):
        assert (np.abs(rows.value - exact) <= unit * rows.moves + 1e-20).all()
