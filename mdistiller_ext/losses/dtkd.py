"""DTKD: temperatures from the largest logits."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..settings import number, setting
from .base import Loss, Pair
from .divergence import kl_divergence, prune, scalars

LEAST = 0.02  # of T; the two share 2 T


@dataclass(frozen=True)
class DTKD(Loss):
    """The sharper of the two has the higher temperature; beside KD's divergence.

    *Wei, Bai: Dynamic Temperature Knowledge Distillation, arXiv:2404.12711.*

    `ALPHA T_s T_t KL(p_t at T_t ‖ p_s at T_s) + BETA T² KL(p_t at T ‖ p_s at T)`, with the largest
    logits `m_s` and `m_t` of the classes that are compared, `T_s = 2 T m_s / (m_s + m_t)` and `T_t
    = 2 T m_t / (m_s + m_t)`. The gradient flows through `m_s`. Where one is not positive its code
    has temperatures that are not; here both are at least 0.02 T, and T where neither is positive:
    `dtkd_clamped` counts these samples. Its README says that the paper's derivation is wrong and
    its results stand: a shift of all logits changes no probability, and yet the temperatures.

    CE_WEIGHT 1, T 4, WARMUP 20. Published ALPHA and BETA: ResNet-56 → 20 and 110 → 32 1 and 0.5;
    32x4 → 8x4 3 and 1, as its code by default.
    """

    OWNS: ClassVar = {"statistic": "takes its own, from the largest logits"}

    ALPHA: float = setting(3.0, number(0), "weight at temperatures of their own")
    BETA: float = setting(1.0, number(0), "weight at one temperature")

    def temperatures(self, pair: Pair) -> Pair:
        largest = [prune(z, pair.pruned).amax(dim=1) for z in (pair.student, pair.teacher)]
        m_s, m_t = (m.clamp_min(1e-6) for m in largest)
        share = 2 * m_s / (m_s + m_t)
        clamped = share.clamp(LEAST, 2 - LEAST)
        odd = (clamped != share) | (largest[0] <= 0) | (largest[1] <= 0)
        return replace(
            pair,
            tau_s=pair.tau_s * clamped,
            tau_t=pair.tau_t * (2 - clamped),
            seen=pair.seen | {"dtkd_clamped": odd.sum()},
        )

    def __call__(self, pair: Pair) -> Tensor:
        logits = pair.student, pair.teacher
        tau_s, tau_t = (scalars(tau, pair.student[:, 0]) for tau in (pair.tau_s, pair.tau_t))
        base = ((tau_s + tau_t) / 2).detach()
        own = tau_s * tau_t / base**2 * kl_divergence(*logits, tau_s, pair.pruned, tau_t)
        return self.ALPHA * own + self.BETA * kl_divergence(*logits, base, pair.pruned)
