"""NKD: soft cross-entropies of the target and of the rest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..settings import number, setting
from .base import Loss, Pair, others_of
from .divergence import log_softmax, scalars


@dataclass(frozen=True)
class NKD(Loss):
    """The label as strongly as the teacher is sure of it, and the other classes apart.

    *Yang, Zeng, Yuan, Li: From Knowledge Distillation to Self-Knowledge Distillation: A Unified
    Approach with Normalized Loss and Customized Soft Labels, ICCV 2023.*

    `-p_t,y log p_s,y` at temperature 1, and `-GAMMA T² Σ_c q_t,c log q_s,c` with softmaxes `q` over
    the classes other than the label. These are cross-entropies: the gradient is that of KL
    divergences, the value is larger by the teacher's entropy. T² stands in the second term alone,
    and no policy of temperatures changes the first.

    CE_WEIGHT 1, KD_WEIGHT 1, no warm-up. Its code has GAMMA 1.5 and T 1, for ImageNet; for
    CIFAR-100 none are published.
    """

    needs_label: ClassVar = True

    GAMMA: float = setting(1.5, number(0), "weight of the classes other than the label")

    def factor(self, pair: Pair, base: float) -> Tensor:
        return torch.ones_like(pair.student[:, 0])

    def __call__(self, pair: Pair) -> Tensor:
        label, others = pair.target.unsqueeze(1), others_of(pair, pair.target)
        hit_s, hit_t = (
            log_softmax(logits, 1.0, pair.pruned).gather(1, label).squeeze(1)
            for logits in (pair.student, pair.teacher)
        )
        log_q, q = (
            log_softmax(logits, tau, ~others)
            for logits, tau in ((pair.student, pair.tau_s), (pair.teacher, pair.tau_t))
        )
        rest = (q.exp() * log_q.masked_fill(~others, 0.0)).sum(dim=1)
        factor = scalars(pair.tau, rest) ** 2
        return -hit_t.exp() * hit_s - self.GAMMA * factor * rest
