"""DIST: correlations instead of values."""

from dataclasses import dataclass

from torch import Tensor

from ..settings import number, setting
from .base import Loss, Pair, probabilities


@dataclass(frozen=True)
class DIST(Loss):
    """Match how probabilities correlate: over classes for each sample, over samples for each class.

    *Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022.*

    With `P = softmax(z / T)` and Pearson's correlation `ρ`:
    `BETA (1 - ρ(P_s,i, P_t,i)) + GAMMA (1 - mean_c ρ(P_s[:, c], P_t[:, c]))`, factor `T²` as in its
    code; the paper's appendix has none. The second term depends on the whole batch: it allows
    neither pruning nor a factor or weight of single samples, and one process only.

    Published for CIFAR-100: CE_WEIGHT 1, KD_WEIGHT 2, BETA 1, GAMMA 1, T 4, no warm-up.
    """

    BETA: float = setting(1.0, number(0), "weight of the correlation over classes")
    GAMMA: float = setting(1.0, number(0), "weight of the correlation over samples")

    @property
    def coupled(self) -> bool:
        return self.GAMMA > 0

    @property
    def unprunable(self) -> str:
        return "compares a class over samples that keep different classes" if self.coupled else ""

    def __call__(self, pair: Pair) -> Tensor:
        student, teacher = probabilities(pair)
        loss = self.BETA * (1 - correlation(student, teacher, pair.pruned))
        if self.coupled:
            loss = loss + self.GAMMA * (1 - correlation(student.T, teacher.T).mean())
        return loss


def correlation(a: Tensor, b: Tensor, pruned: Tensor | None = None) -> Tensor:
    """Pearson's of each row, (N,), over what is kept; 0 where one of the rows is constant."""
    a, b = (_centred(x, pruned) for x in (a, b))
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


def _centred(x: Tensor, pruned: Tensor | None) -> Tensor:
    if pruned is None:
        return x - x.mean(dim=1, keepdim=True)
    kept = ~pruned
    mean = x.sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)
    return (x - mean) * kept
