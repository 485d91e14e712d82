"""GDKD: the teacher's top classes, the rest, and one against the other."""

from dataclasses import dataclass

from torch import Tensor

from ..settings import count, number, setting
from .base import Loss, Pair, kept_of, kl_of
from .divergence import binary_kl, group_margin, prune


@dataclass(frozen=True)
class GDKD(Loss):
    """KD's divergence in three parts: the top classes against the rest, within each of the two.

    *Zheng, Cheng: Rethinking Decoupled Knowledge Distillation: A Predictive Distribution
    Perspective, arXiv:2512.04625.*

    `W0 KL(b_t ‖ b_s) + W1 KL(top) + W2 KL(rest)`, factor `T²`. The top are the TOP classes of
    highest teacher logit, the label among them or not; b are their mass and that of the rest. With
    W1 and W2 the masses themselves this is KD; with W2 0 the rest is one class, and not removed as
    by LP.

    CE_WEIGHT 1, T 4, WARMUP 20, TOP 5. Published W0, W1, W2: ResNet-56 → 20 and 110 → 32 1, 1, 1;
    32x4 → 8x4 1, 2, 8.
    """

    TOP: int = setting(5, count(1), "how many classes are the top")
    W0: float = setting(1.0, number(0), "weight of the top against the rest")
    W1: float = setting(1.0, number(0), "weight within the top")
    W2: float = setting(8.0, number(0), "weight within the rest")

    def __call__(self, pair: Pair) -> Tensor:
        kept = kept_of(pair)
        order = prune(pair.teacher, ~kept).argsort(dim=1, descending=True, stable=True)
        top = (order.argsort(dim=1) < self.TOP) & kept
        rest = kept & ~top
        # Where there is no rest, anything that is finite: it does not count.
        apart = rest.any(dim=1)
        out = rest | ~apart.unsqueeze(1)
        margins = (
            group_margin(logits, tau, top, out)
            for logits, tau in ((pair.student, pair.tau_s), (pair.teacher, pair.tau_t))
        )
        binary = binary_kl(*margins).where(apart, 0.0)
        return self.W0 * binary + self.W1 * kl_of(pair, top) + self.W2 * kl_of(pair, rest)
