"""EAKD: samples weigh as their entropies say."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import Pair
from ..losses.divergence import log_softmax
from ..settings import SWITCH, number, setting
from .base import Context, Policy


@dataclass(frozen=True)
class EAKD(Policy):
    """Samples of which the teacher is uncertain weigh more, those of an uncertain student too.

    *EA-KD: Entropy-based Adaptive Knowledge Distillation, ICCV 2025.*

    The weight is `H(p_t) / 2 (1 + H(p_s) / BOUND)`, H the entropies of the softmaxes over all
    classes at SOFTNESS, without gradient. The paper's BOUND is the largest entropy, log C; its code
    has 100 for CIFAR-100, not log 100, which nearly leaves the student out. The weights do not
    average to 1 and so change the weight of the loss as well; NORMALISE divides them by the batch's
    mean. On KD its code has CE_WEIGHT 0.1, KD_WEIGHT 0.9 and T 4, on DKD what DKD has.
    """

    SOFTNESS: float = setting(3.0, number(0.01, 1000), "temperature of the entropies")
    BOUND: float = setting(0.0, number(0), "of an entropy; 0: log C; its code has 100")
    NORMALISE: bool = setting(False, SWITCH, "divide by the batch's mean")

    @property
    def slot(self) -> str:
        return "weight"

    @property
    def per_sample(self) -> bool:
        return True

    @torch.no_grad()
    def __call__(self, pair: Pair, context: Context) -> Pair:
        bound = self.BOUND or math.log(pair.student.shape[1])
        of_student, of_teacher = (entropy(z, self.SOFTNESS) for z in (pair.student, pair.teacher))
        weight = of_teacher / 2 * (1 + of_student / bound)
        if self.NORMALISE:
            whole, _ = context.whole(weight)
            weight = weight / whole.mean().clamp_min(torch.finfo(weight.dtype).tiny)
        return pair.weighted(weight)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Of softmax(z / T), in nats, (B,)."""
    log_p = log_softmax(logits, temperature)
    return -(log_p.exp() * log_p).sum(dim=1)
