"""The losses in float64, with their gradients and their condition.

Those of the specification in numpy, with gradients by hand. Any loss with policies as a `formula`
in PyTorch, whose gradient comes of itself and whose condition is tried.

Nothing here comes from the package. Each loss is an array (B, 1 + C): in every row the loss of a
sample, then its derivatives by the student's logits. Beside it stands, in the same shape, what it
moves by, to first order and at most, for each unit that log-probabilities are off: the condition
of the problem, which says how exact a float32 result can be.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logsumexp
from torch import Tensor


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


def formula(
    node: Any,
    epoch: int,
    epochs: int,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    noise: Callable[[Tensor], Tensor] = torch.zeros_like,
) -> Tensor:
    """The distillation loss of each sample, (B,), of a LOGIT node with any loss and some policies.

    With LP's classes, the temperatures of LS, NORM and EAT, and the weights of EAKD; without DAT,
    whose ranking may go either way.

    Args:
        noise: by how many units of what they are known to log-probabilities are off.
    """
    base, kept = node.T, torch.ones_like(student, dtype=torch.bool)
    if "LP" in node.POLICIES:
        kept = ~torch.from_numpy(lp(node.LP, teacher.numpy(), target.numpy(), epoch))
    if "EAT" in node.POLICIES:
        base = eat(node.EAT, base, epoch, epochs)
    tau = torch.full_like(student[:, 0], base)
    given = Given(node, student, teacher, target, kept, tau, tau, tau, noise)
    if {"LS", "NORM"} & set(node.POLICIES):
        given = given.standardised("NORM" in node.POLICIES)
    loss = FORMULAS[node.LOSS](given, node.get(node.LOSS))
    if "EAKD" in node.POLICIES:
        softness = torch.full_like(tau, node.EAKD.SOFTNESS)
        h_s, h_t = (
            -(p.exp() * p).sum(dim=1)
            for p in (given.log_p(z, softness, kept | True) for z in (student, teacher))
        )
        loss = (h_t / 2 * (1 + h_s / math.log(student.shape[1]))).detach() * loss
    return min(epoch / node.WARMUP, 1) * node.KD_WEIGHT * loss


@dataclass(frozen=True)
class Given:
    """What a formula is made of: a node, logits (B, C), labels, the classes that are kept, (B, C),
    and temperatures (B,)."""

    node: Any
    s: Tensor
    t: Tensor
    y: Tensor
    kept: Tensor
    tau_s: Tensor
    tau_t: Tensor
    tau: Tensor
    noise: Callable[[Tensor], Tensor]

    @property
    def label(self) -> Tensor:
        return F.one_hot(self.y, self.s.shape[1]).bool()

    @property
    def two(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.s, self.tau_s), (self.t, self.tau_t)

    def standardised(self, norm: bool) -> "Given":
        count = self.kept.sum(dim=1, keepdim=True)
        centred = [z - (z * self.kept).sum(1, keepdim=True) / count for z in (self.s, self.t)]
        variances = ((z * self.kept).square().sum(1) / (count[:, 0] - 1) for z in centred)
        spread = [v.where(v > 0, 1.0).sqrt() * (v > 0) for v in variances]
        spread = [self.rounded(d) for d in spread]
        tau_s, tau_t = (self.tau * (d.where(d > 0, 1.0) if norm else d + 1e-7) for d in spread)
        tau = self.tau * spread[1] if norm else self.tau
        return replace(self, s=centred[0], t=centred[1], tau_s=tau_s, tau_t=tau_t, tau=tau)

    def log_p(self, z: Tensor, tau: Tensor, kept: Tensor) -> Tensor:
        """Over what is kept, and 0 elsewhere; of a row that keeps nothing, 0."""
        none = ~kept.any(dim=1, keepdim=True)
        scaled = (z / tau[:, None]).masked_fill(none, 0.0)
        largest = (scaled.detach() * kept).abs().amax(dim=1, keepdim=True)
        scaled = scaled + largest * self.noise(z.detach())
        whole = scaled.masked_fill(~(kept | none), -math.inf).logsumexp(dim=1, keepdim=True)
        known = (1 + math.log(z.shape[1])) * self.noise(z.detach())
        return (scaled - self.rounded(whole, 1 + largest) + known).masked_fill(~kept, 0.0)

    def rounded(self, x: Tensor, known: Any = 1.0) -> Tensor:
        """With a gradient that is rounded: it becomes one of terms that may be nearly equal."""
        return x + (x - x.detach()) * known * self.noise(x.detach())

    def p(self, z: Tensor, tau: Tensor) -> Tensor:
        return self.log_p(z, tau, self.kept).exp() * self.kept

    def kl(self, kept: Tensor, tau_s: Tensor | None = None, tau_t: Tensor | None = None) -> Tensor:
        """Over some of the classes; 0 where there is none."""
        s = self.log_p(self.s, self.tau_s if tau_s is None else tau_s, kept)
        t = self.log_p(self.t, self.tau_t if tau_t is None else tau_t, kept)
        return (t.exp() * (t - s) * kept).sum(dim=1)

    def binary(self, in_s: Tensor, in_t: Tensor, share: float = 1.0) -> Tensor:
        """KL between the masses of a set of classes and of what else is kept; 0 if that is none."""
        logs = []
        for (z, tau), inside in zip(self.two, (in_s, in_t), strict=True):
            log_p, rest = self.log_p(z, share * tau, self.kept), self.kept & ~inside
            rest = rest | ~rest.any(dim=1, keepdim=True)
            parts = (log_p.masked_fill(~group, -math.inf) for group in (inside, rest))
            logs += [part.logsumexp(dim=1) for part in parts]
        hit_s, miss_s, hit_t, miss_t = logs
        loss = hit_t.exp() * (hit_t - hit_s) + miss_t.exp() * (miss_t - miss_s)
        return loss.where((self.kept & ~in_t).any(dim=1), 0.0)

    def first(self, z: Tensor, count: int) -> Tensor:
        """The kept classes of the largest logits, (B, count); of equal ones those before others."""
        logits = z.detach().masked_fill(~self.kept, -math.inf).numpy()
        return torch.from_numpy(np.argsort(-logits, axis=1, kind="stable")[:, :count].copy())

    def only(self, classes: Tensor) -> Tensor:
        """Those of some classes (B, n) that are kept, (B, C)."""
        return torch.zeros_like(self.kept).scatter(1, classes, True) & self.kept


def of_kd(g: Given, own: Any) -> Tensor:
    return g.tau**2 * g.kl(g.kept)


def of_dkd(g: Given, own: Any) -> Tensor:
    nckd = g.kl(g.kept & ~g.label)
    return g.tau**2 * (own.ALPHA * g.binary(g.label, g.label) + own.BETA * nckd)


def of_dist(g: Given, own: Any) -> Tensor:
    def apart(a: Tensor, b: Tensor, there: Tensor) -> Tensor:
        n = there.sum(dim=1, keepdim=True)
        a, b = (g.rounded((x - x.sum(dim=1, keepdim=True) / n) * there) for x in (a, b))
        squares = (x.square().sum(dim=1) for x in (a, b))
        norms = [g.rounded(x.where(x > 0, 1.0).sqrt() * (x > 0)) for x in squares]
        alike = g.rounded((a * b).sum(dim=1)) / (norms[0] * norms[1] + 1e-8)
        return 1 - alike * (1 + g.noise(alike.detach()))

    s, t = (g.p(z, tau) for z, tau in g.two)
    loss = own.BETA * apart(s, t, g.kept)
    return g.tau**2 * (loss + own.GAMMA * apart(s.T, t.T, g.kept.T).mean() if own.GAMMA else loss)


def of_ttm(g: Given, own: Any) -> Tensor:
    return g.tau / g.node.T * g.kl(g.kept, torch.ones_like(g.tau))


def of_wttm(g: Given, own: Any) -> Tensor:
    log_p = g.log_p(g.t, torch.ones_like(g.tau), g.kept)
    weight = ((log_p / g.tau_t[:, None]).exp() * g.kept).sum(dim=1)
    return weight * of_ttm(g, own)


def of_rld(g: Given, own: Any) -> Tensor:
    below = g.kept & (g.t < g.t.gather(1, g.y[:, None]))
    confidence = g.binary(g.label, g.only(g.first(g.t, 1)), own.RATIO)
    return g.tau**2 * (own.ALPHA * own.RATIO**2 * confidence + own.BETA * g.kl(below))


def of_ldrld(g: Given, own: Any) -> Tensor:
    top = g.first(g.s, own.TOP)
    loss = own.BETA * g.kl(g.kept & ~g.only(top))
    if own.ALPHA:
        terms = [g.kl(g.only(top))]
        for a, b in combinations(range(top.shape[1]), 2):
            weight = 2 * math.exp(-0.05 * (a + b + 2)) / (1.5 + b - a)
            terms.append(weight * g.kl(g.only(top[:, [a, b]])))
        loss = loss + own.ALPHA * torch.stack(terms).mean(dim=0)
    return g.tau**2 * loss


def of_abkd(g: Given, own: Any) -> Tensor:
    a, b = own.ALPHA, own.BETA
    q, p = (g.log_p(z, tau, g.kept) for z, tau in g.two)
    if a == 0 and b == 0:
        terms = (q - p).square() / 2
    elif b == 0:
        terms = ((a * q).exp() - (a * p).exp()) / a**2 - (a * p).exp() * (q - p) / a
    elif a == 0:
        terms = ((b * p).exp() - (b * q).exp()) / b**2 + (b * q).exp() * (q - p) / b
    else:
        terms = ((a + b) * p).exp() / (b * (a + b)) + ((a + b) * q).exp() / (a * (a + b))
        terms = terms - (a * p + b * q).exp() / (a * b)
    return (g.tau / g.node.T) ** 2 * (terms * g.kept).sum(dim=1)


def of_dtkd(g: Given, own: Any) -> Tensor:
    largest = (z.masked_fill(~g.kept, -math.inf).amax(dim=1).clamp_min(1e-6) for z in (g.s, g.t))
    m_s, m_t = largest
    share = (2 * m_s / (m_s + m_t)).clamp(0.02, 1.98)
    apart = share * (2 - share) * g.kl(g.kept, g.tau * share, g.tau * (2 - share))
    return g.tau**2 * (own.ALPHA * apart + own.BETA * g.kl(g.kept))


def of_nkd(g: Given, own: Any) -> Tensor:
    hit_s, hit_t = (g.log_p(z, torch.ones_like(g.tau), g.kept)[g.label] for z in (g.s, g.t))
    others = g.kept & ~g.label
    log_q, q = (g.log_p(z, tau, others) for z, tau in g.two)
    rest = (q.exp() * log_q * others).sum(dim=1)
    return -hit_t.exp() * hit_s - own.GAMMA * g.tau**2 * rest


def of_gdkd(g: Given, own: Any) -> Tensor:
    top = g.only(g.first(g.t, own.TOP))
    inside = own.W1 * g.kl(top) + own.W2 * g.kl(g.kept & ~top)
    return g.tau**2 * (own.W0 * g.binary(top, top) + inside)


def of_mlkd(g: Given, own: Any) -> Tensor:
    loss = torch.zeros_like(g.tau)
    for share in (0.5, 0.75, 1.0, 1.25, 1.5):
        loss = loss + (share * g.tau) ** 2 * g.kl(g.kept, share * g.tau_s, share * g.tau_t)
        s, t = (g.p(z, share * g.tau) for z in (g.s, g.t))
        for a, b in ((s, t), (s.T, t.T)):
            loss = loss + (b.T @ b - a.T @ a).square().sum() / a.shape[1]
    return loss


FORMULAS: dict[str, Callable[[Given, Any], Tensor]] = {
    name[3:].upper(): function for name, function in list(globals().items()) if name[:3] == "of_"
}
