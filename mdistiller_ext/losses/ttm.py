"""Transformed teacher matching: a temperature for the teacher alone."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .base import Loss, Pair
from .divergence import kl_divergence, prune, scalars, scale


@dataclass(frozen=True)
class TTM(Loss):
    """Match the teacher's softened probabilities with the student's own.

    *Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024.*

    `KL(softmax(z_t / T) ‖ softmax(z_s))`, without T²; the paper's γ is `1 / T`. Equals KD plus a
    Rényi entropy of the student. Where the temperature varies, the factor is its share of the
    config's, `T_i / T`, which keeps KD's ratio of the two losses (eq. 19).

    CE_WEIGHT 1. Published γ and KD_WEIGHT: ResNet-56 → 20 0.3 and 7; 110 → 20 0.2 and 8; 110 → 32
    0.1 and 33; 32x4 → 8x4 0.1 and 100.
    """

    OWNS: ClassVar = {"statistic": "gives the student none"}

    def temperatures(self, pair: Pair) -> Pair:
        return replace(pair, tau_s=1.0, fixed_student=True)

    def factor(self, pair: Pair, base: float) -> Tensor:
        return scalars(pair.tau, pair.student[:, 0]) / base

    def __call__(self, pair: Pair) -> Tensor:
        return kl_divergence(pair.student, pair.teacher, pair.tau_s, pair.pruned, pair.tau_t)


@dataclass(frozen=True)
class WTTM(TTM):
    """TTM with a weight for each sample, larger where the teacher is less certain.

    *Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024.*

    The weight is `Σ_c softmax(z_t)_c^{1/T}`, from 1 where the teacher is certain to `C^{1 - 1/T}`:
    hence the smaller published KD_WEIGHT: ResNet-56 → 20 γ 0.3 and 1.5; 110 → 20 0.2 and 2; 110 →
    32 0.1 and 1.5; 32x4 → 8x4 0.1 and 3.
    """

    def weight(self, pair: Pair) -> Tensor:
        logits = prune(pair.teacher, pair.pruned)
        behind = logits - logits.amax(dim=1, keepdim=True)
        certain, soft = (scale(behind, tau).logsumexp(dim=1) for tau in (1.0, pair.tau_t))
        return (soft - certain / scalars(pair.tau_t, certain)).exp()
