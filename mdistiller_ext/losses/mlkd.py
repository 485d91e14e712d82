"""MLKD: samples, classes and the batch at several temperatures, on one view."""

from dataclasses import dataclass

from torch import Tensor

from .base import Loss, Pair
from .divergence import Temperature, kl_divergence, log_softmax, scalars

SHARES = (0.5, 0.75, 1.0, 1.25, 1.5)  # of T: 2 to 6 at T 4


@dataclass(frozen=True)
class MLKD(Loss):
    """KD's divergence, and how much the probabilities of classes and of samples are alike.

    *Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023*, without its strong view.

    The sum over five temperatures τ, of 0.5 to 1.5 T, of `τ² KL(p_t ‖ p_s)`, `‖P_t' P_t - P_s'
    P_s‖² / C` and `‖P_t P_t' - P_s P_s'‖² / B`, P the probabilities of the batch (B, C) at τ; a
    statistic acts in the first term alone. The masks of its code select nothing: they multiply the
    means of the batch, by 0.5. Half of its weight 0.9 is therefore the KD_WEIGHT here. The last two
    terms need the whole batch.

    CE_WEIGHT 0.1, KD_WEIGHT 0.45, T 4, no warm-up. Published are results with two views and 480
    epochs, none of this form; the code of RLD has it.
    """

    @property
    def coupled(self) -> bool:
        return True

    @property
    def unprunable(self) -> str:
        return "compares products of classes over samples that keep different ones"

    def factor(self, pair: Pair, base: float) -> Tensor:
        return scalars(1.0, pair.student[:, 0])  # T² is in the first term alone

    def __call__(self, pair: Pair) -> Tensor:
        logits = pair.student, pair.teacher
        loss = scalars(1.0, pair.student[:, 0]) - 1
        for share in SHARES:
            kl = kl_divergence(*logits, share * pair.tau_s, None, share * pair.tau_t)
            factor = scalars(share * pair.tau, kl) ** 2
            loss = loss + factor * kl + _alike(*logits, share * pair.tau)
        return loss


def _alike(student: Tensor, teacher: Tensor, temperature: Temperature) -> Tensor:
    """The squared differences of the products of classes and of samples, ()."""
    p_s, p_t = (log_softmax(logits, temperature).exp() for logits in (student, teacher))
    classes = (p_t.T @ p_t - p_s.T @ p_s).square().sum() / p_s.shape[1]
    samples = (p_t @ p_t.T - p_s @ p_s.T).square().sum() / p_s.shape[0]
    return classes + samples
