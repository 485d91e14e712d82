"""Refined logit distillation: the teacher's mistakes are not taught."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..settings import number, setting
from .base import Loss, Pair, kl_of, others_of
from .divergence import binary_kl, prune, target_margin


@dataclass(frozen=True)
class RLD(Loss):
    """Match the teacher's confidence at the label, and the classes that it ranks below the label.

    *Sun, Chen, Lyu, Chen, Chen, Wang: Knowledge Distillation with Refined Logits, ICCV 2025.*

    `ALPHA RATIO² KL(b_t ‖ b_s) + BETA KL(p_t ‖ p_s)`, factor `T²`. `b_t` is the teacher's
    `(max p, 1 - max p)`, `b_s` the student's `(p_y, 1 - p_y)`, both at the temperature `RATIO T`;
    the second term is over the classes whose teacher logit is below the label's, and 0 where there
    is none: `rld_empty` counts these samples. Where the teacher is right this is DKD.

    CE_WEIGHT 1, WARMUP 20, T 4. RATIO 1 is the command of its README; its code has `T_a = 1` by
    default, RATIO 0.25 at T 4. Its best ALPHA and BETA differ much between pairs and are published
    for none; its code has 1 and 8. With LS it multiplies both by 9, at T 2.
    """

    needs_label: ClassVar = True

    ALPHA: float = setting(1.0, number(0), "weight of the confidence")
    BETA: float = setting(8.0, number(0), "weight of the classes below the label")
    RATIO: float = setting(1.0, number(0.01, 100), "temperature of the confidence, as a share of T")

    def seen(self, pair: Pair) -> dict[str, Tensor]:
        return {"rld_empty": (~_below(pair).any(dim=1)).sum()}

    def __call__(self, pair: Pair) -> Tensor:
        top = prune(pair.teacher, pair.pruned).argmax(dim=1)
        margins = (
            target_margin(logits, label, self.RATIO * tau, ~others_of(pair, label))
            for logits, label, tau in (
                (pair.student, pair.target, pair.tau_s),
                (pair.teacher, top, pair.tau_t),
            )
        )
        confidence = self.ALPHA * self.RATIO**2 * binary_kl(*margins)
        return confidence + self.BETA * kl_of(pair, _below(pair))


def _below(pair: Pair) -> Tensor:
    """The classes that the teacher ranks below the label, bool (B, C)."""
    of_label = pair.teacher.gather(1, pair.target.unsqueeze(1))
    return others_of(pair, pair.target) & (pair.teacher < of_label)
