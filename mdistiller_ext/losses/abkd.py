"""ABKD: one family of divergences between forward and reverse KL."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..settings import Rule, setting
from .base import Loss, Pair, kept_of
from .divergence import log_softmax, scalars

# Between 0, its limit, and this the terms cancel to nothing but rounding.
SMALLEST = 0.05
POWER: Rule = (
    lambda v: v == 0 or SMALLEST <= v <= 10,
    f"0 or a number from {SMALLEST:g} to 10",
)


@dataclass(frozen=True)
class ABKD(Loss):
    """The α-β-divergence of the teacher's softened probabilities and the student's.

    *Wang, Yang, Wang, Wang, Xu, Huang: ABKD: Pursuing a Proper Allocation of the Probability Mass
    in Knowledge Distillation via α-β-Divergence, ICML 2025.*

    `-1/(αβ) Σ_c [p^α q^β - α/(α+β) p^{α+β} - β/(α+β) q^{α+β}]`, and its limits where one or both
    are 0: (1, 0) is KL(p ‖ q), (0, 1) KL(q ‖ p), (½, ½) twice the squared Euclidean distance of the
    roots. At β 0 and at α 0 its code has the first power where the limit has the second, and is
    not continuous there. The factor is `(T_i / T)²`, 1 where the temperature is the config's: the
    published KD_WEIGHT has no T². Beside LS its code multiplies by T²; so must KD_WEIGHT.

    CE_WEIGHT 1, T 4, no warm-up. Published: ResNet-56 → 20 ALPHA 0.8, BETA 0.3, KD_WEIGHT 32;
    beside LS 0.9 and 0.3.
    """

    ALPHA: float = setting(0.8, POWER, "how much a class counts by the teacher's probability")
    BETA: float = setting(0.3, POWER, "and by the student's")

    def factor(self, pair: Pair, base: float) -> Tensor:
        return (scalars(pair.tau, pair.student[:, 0]) / base) ** 2

    def __call__(self, pair: Pair) -> Tensor:
        a, b, out = self.ALPHA, self.BETA, ~kept_of(pair)
        # Of a class that is not compared all terms are 1, or 0, and cancel.
        log_q, log_p = (
            log_softmax(logits, tau, pair.pruned).masked_fill(out, 0.0)
            for logits, tau in ((pair.student, pair.tau_s), (pair.teacher, pair.tau_t))
        )
        ratio = log_q - log_p

        def power(log: Tensor, exponent: float) -> Tensor:
            return torch.exp(exponent * log)

        if a == b == 0:
            terms = 0.5 * ratio.square()
        elif a == 0:
            terms = (power(log_p, b) + power(log_q, b) * (b * ratio - 1)) / b**2
        elif b == 0:
            terms = (power(log_q, a) - power(log_p, a) * (a * ratio + 1)) / a**2
        else:
            whole = a * power(log_p, a + b) + b * power(log_q, a + b)
            terms = (whole / (a + b) - power(log_p, a) * power(log_q, b)) / (a * b)
        return terms.sum(dim=1)
