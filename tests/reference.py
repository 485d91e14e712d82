"""The specification's losses in numpy and float64: values, gradients by hand, and their condition.

Nothing here comes from the package. Each loss is an array (B, 1 + C): in every row the loss of a
sample, then its derivatives by the student's logits. Beside it stands, in the same shape, what it
moves by, to first order and at most, for each unit that log-probabilities are off: the condition
of the problem, which says how exact a float32 result can be.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp


class Rows(NamedTuple):
    """A loss of each sample with its gradient, and by how much both move; each (B, 1 + C)."""

    value: np.ndarray
    moves: np.ndarray

    def times(self, weight) -> "Rows":
        """`weight`: not negative, a number or one of each sample."""
        weight = np.reshape(weight, (-1, 1))
        return Rows(weight * self.value, weight * self.moves)

    def plus(self, other: "Rows") -> "Rows":
        return Rows(self.value + other.value, self.moves + other.moves)


def method(name, cfg, epoch, student, teacher, target, spread: Callable):
    """A method's (loss_ce, loss_kd, temperatures (B,), pruned (B, C) or None).

    Args:
        spread: (node, temperature, KL at that temperature) -> temperatures (B,), for DAT.
    """
    node, ce = cfg[name], cross_entropy(student, target)
    if name == "KD":
        tau = np.full(len(target), float(node.TEMPERATURE))
        loss = kd(student, teacher, tau)
        return ce.times(node.LOSS.CE_WEIGHT), loss.times(node.LOSS.KD_WEIGHT), tau, None
    base, pruned = node.T, None
    if "LP" in name:
        pruned = lp(node.get("LP", node), teacher, target, epoch)
    if "EAT" in name:
        base = eat(node.get("EAT", node), base, epoch, cfg.SOLVER.EPOCHS)
    tau = np.full(len(target), base)
    if "DAT" in name:
        divergence = kl(student, teacher, tau, None if pruned is None else ~pruned)
        tau = spread(node.get("DAT", node), base, divergence)
    loss = dkd(student, teacher, target, node.ALPHA, node.BETA, tau, pruned)
    return ce.times(node.CE_WEIGHT), loss.times(min(epoch / node.WARMUP, 1)), tau, pruned


def cross_entropy(student, target) -> Rows:
    log_p = _log_softmax(student, np.ones(student.shape, bool))
    hit = np.eye(student.shape[1])[target]
    p = np.exp(log_p)
    return _rows(-(hit * log_p).sum(1), p - hit, np.ones(len(p)), p + hit)


def kl(student, teacher, temperature, kept=None) -> Rows:
    """KL(softmax(z_t / T) || softmax(z_s / T)) over the kept classes."""
    kept = np.ones(student.shape, bool) if kept is None else kept
    tau = np.reshape(temperature, (-1, 1))
    log_s, log_t = (_log_softmax(logits / tau, kept) for logits in (student, teacher))
    ratio = np.subtract(log_t, log_s, out=np.zeros(student.shape), where=kept)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    return _rows(
        (p_t * ratio).sum(1),
        (p_s - p_t) / tau,
        (p_t * (np.abs(ratio) + 2)).sum(1),
        (p_s + p_t) / tau,
    )


def kd(student, teacher, temperature) -> Rows:
    tau = np.broadcast_to(temperature, len(student))
    return kl(student, teacher, tau).times(tau**2)


def dkd(student, teacher, target, alpha, beta, temperature, pruned=None) -> Rows:
    """Per sample T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s)) over the classes that stay."""
    tau = np.broadcast_to(temperature, len(student))
    is_target = np.eye(student.shape[1], dtype=bool)[target]
    others = ~is_target if pruned is None else ~is_target & ~pruned
    tckd = _target_kl(student, teacher, tau, is_target, others)
    nckd = kl(student, teacher, tau, others)
    return tckd.times(alpha * tau**2).plus(nckd.times(beta * tau**2))


def eat(node, temperature, epoch, epochs) -> float:
    stages = math.ceil(epochs / node.STEP_EPOCHS)
    if stages == 1:
        return temperature
    stage = min((epoch - 1) // node.STEP_EPOCHS, stages - 1)
    return temperature * (1 + node.RANGE - 2 * node.RANGE * stage / (stages - 1))


def lp(node, teacher, target, epoch) -> np.ndarray:
    """The pruned classes, (B, C), bool; of equal logits those that come first."""
    stage = min((epoch - 1) // node.STEP_EPOCHS, len(node.RATIOS) - 1)
    size, classes = teacher.shape
    count = math.floor(node.RATIOS[stage] * classes + 0.5)
    pruned = np.zeros((size, classes), bool)
    for row, logits, y in zip(pruned, teacher, target, strict=True):
        others = np.delete(np.arange(classes), y)
        row[others[np.argsort(logits[others], kind="stable")[:count]]] = True
    return pruned


def dat(node, temperature, divergence, doubt, found) -> np.ndarray:
    """The temperatures that `found` stands for, (B,).

    Samples whose divergences (B,) differ by less than their `doubt` (B,) may rank either way.

    Raises:
        AssertionError: they are not DAT's.
    """
    count = math.floor(node.FRACTION * len(divergence))
    side = np.round((found / temperature - 1) / node.RANGE)
    tau = temperature * (1 + node.RANGE * side)
    assert np.allclose(found, tau, rtol=1e-6, atol=0), "DAT: other temperatures than three"
    assert [(side == s).sum() for s in (-1, 1)] == [count, count], "DAT: groups of another size"
    for below, above in ((side < 1, side == 1), (side == -1, side > -1)):
        highest = (divergence - doubt)[below].max(initial=-np.inf)
        assert highest <= (divergence + doubt)[above].min(initial=np.inf), "DAT: a wrong ranking"
    return tau


def _target_kl(student, teacher, tau, is_target, others) -> Rows:
    """KL between the binary distributions (p_y, 1 - p_y)."""
    (hit_s, miss_s, q_s), (hit_t, miss_t, _) = (
        _log_binary(logits / tau[:, None], is_target, others) for logits in (student, teacher)
    )
    hit, miss = np.exp(hit_t), np.exp(miss_t)
    loss = hit * (hit_t - hit_s) + miss * (miss_t - miss_s)
    moves = hit * (np.abs(hit_t - hit_s) + 2) + miss * (np.abs(miss_t - miss_s) + 2)
    # p_s - p_t of the target = p_s (1 - p_t) - p_t (1 - p_s), which is exact where both are 1.
    more, less = np.exp(hit_s + miss_t) / tau, np.exp(hit_t + miss_s) / tau
    share = is_target - q_s
    return _rows(
        loss, (more - less)[:, None] * share, moves, (more + less)[:, None] * np.abs(share)
    )


def _log_binary(scaled, is_target, others):
    """log p_y and log(1 - p_y), (B,), and the softmax over the others, (B, C)."""
    of_target = scaled[is_target]
    of_others = logsumexp(np.where(others, scaled, -np.inf), axis=1)
    hit, miss = -np.logaddexp(0, of_others - of_target), -np.logaddexp(0, of_target - of_others)
    return hit, miss, np.exp(_log_softmax(scaled, others))


def _log_softmax(scaled, kept):
    masked = np.where(kept, scaled, -np.inf)
    return masked - logsumexp(masked, axis=1, keepdims=True)


def _rows(loss, gradient, loss_moves, gradient_moves) -> Rows:
    return Rows(np.column_stack([loss, gradient]), np.column_stack([loss_moves, gradient_moves]))
