"""LDRLD: the student's top classes, each against each."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..settings import count, number, setting
from .base import Loss, Pair, kept_of, kl_of
from .divergence import binary_kl, prune, scalars


@dataclass(frozen=True)
class LDRLD(Loss):
    """Match every pair of the student's top classes, these together, and the others apart.

    *Xu, Liu, Liu, Wang, Xu, Cheng: Local Dense Logit Relations for Enhanced Knowledge Distillation,
    ICCV 2025.*

    Over the TOP classes of highest student logit, with ranks r from 1: ALPHA times the mean of the
    KL divergences of all TOP (TOP - 1) / 2 pairs, each with the weight
    `2 exp(-0.05 (r + r')) / (1.5 + |r - r'|)`, and of all together; BETA times the one over all
    other classes; factor `T²`. The paper sums where its code, whose ALPHA this is, has the mean.
    The pairs are the student's choice and may have a class that is pruned: LP goes with ALPHA 0
    alone.

    CE_WEIGHT 1, T 4, TOP 7, no warm-up. Published: 32x4 → 8x4 ALPHA 10.5, BETA 7.
    """

    ALPHA: float = setting(10.5, number(0), "weight of the pairs")
    BETA: float = setting(7.0, number(0), "weight of the other classes")
    TOP: int = setting(7, count(2), "how many classes are paired")

    @property
    def unprunable(self) -> str:
        return "pairs classes that may be among them (unless its ALPHA is 0)" if self.ALPHA else ""

    def __call__(self, pair: Pair) -> Tensor:
        kept = kept_of(pair)
        order = prune(pair.student, ~kept).argsort(dim=1, descending=True, stable=True)
        top = order[:, : self.TOP]
        others = kept & (order.argsort(dim=1) >= self.TOP)
        loss = self.BETA * kl_of(pair, others)
        return loss + self.ALPHA * self._local(pair, top) if self.ALPHA else loss

    def _local(self, pair: Pair, top: Tensor) -> Tensor:
        """The mean over the pairs of the top (B, TOP), and all of it, (B,)."""
        size = top.shape[1]
        first, second = torch.triu_indices(size, size, 1, device=top.device)
        scaled = [
            logits.gather(1, top) / scalars(tau, logits[:, 0]).unsqueeze(1)
            for logits, tau in ((pair.student, pair.tau_s), (pair.teacher, pair.tau_t))
        ]
        margins = (z[:, first] - z[:, second] for z in scaled)
        ranks = torch.arange(1, size + 1, device=top.device).to(scaled[0])
        weights = 2 * (-0.05 * (ranks[first] + ranks[second])).exp()
        weights = weights / (1.5 + (ranks[first] - ranks[second]).abs())
        log_s, log_t = (z.log_softmax(dim=1) for z in scaled)
        whole = (log_t.exp() * (log_t - log_s)).sum(dim=1)
        return ((weights * binary_kl(*margins)).sum(dim=1) + whole) / (math.comb(size, 2) + 1)
