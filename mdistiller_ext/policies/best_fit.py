"""BEST_FIT: the temperature at which the teacher is most like its student."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import Pair
from ..losses.divergence import scale
from ..settings import one_of, setting
from .base import Bounds, Context, Policy, with_share

ROUNDS = 7  # of halving, which leave 1/128 of the range


@dataclass(frozen=True)
class BEST_FIT(Bounds, Policy):
    """Each sample's temperature is that at which its teacher is most like its student.

    *After the idea of TA-TTM, arXiv:2608.29099, of which the abstract alone was read.*

    `1 / argmin_γ KL(softmax(γ z_t) ‖ softmax(z_s))` over all classes, within LOW T and HIGH T, is
    the temperature, without gradient. The derivative is `γ Var_p(z_t) - Cov_p(z_t, z_s)` with
    `p = softmax(γ z_t)`: γ is the slope of a regression of the student's logits on the teacher's,
    and a student with `z_s = a z_t` gives γ = a. It starts high and falls as the student sharpens,
    as EAT prescribes, and it is higher for hard samples than for easy ones, as DAT has it. On TTM
    it is the teacher alone that is softened, as in the source; elsewhere student and teacher are.
    The loss's factor is made of it, too. OF `batch` gives all samples the geometric mean.

    The bounds, 1 and 8 at T 4, are those of an untrained student, and no softening: in
    [anatomy.md](anatomy.md) it falls from 8 to 3 in five epochs, and is then nearly constant.
    `mean_temperature` in the record of each epoch is what came of it.
    """

    OF: str = setting("sample", one_of("sample", "batch"), "what has a temperature of its own")

    @property
    def slot(self) -> str:
        return "base"

    @property
    def per_sample(self) -> bool:
        return self.OF == "sample"

    @torch.no_grad()
    def __call__(self, pair: Pair, context: Context) -> Pair:
        teacher = scale(pair.teacher, pair.tau_t)
        share = 1 / best_fit(pair.student, teacher, 1 / self.HIGH, 1 / self.LOW)
        if self.OF == "batch":
            whole, _ = context.whole(share.log())
            share = whole.mean().exp().expand_as(share)
        return with_share(pair, share)


def best_fit(student: Tensor, teacher: Tensor, low: float, high: float) -> Tensor:
    """argmin_γ KL(softmax(γ z_t) ‖ softmax(z_s)) of each sample, (B,), within two bounds.

    The range is halved by the sign of the derivative, in logarithms. Then one step of
    γ = Cov_p(z_t, z_s) / Var_p(z_t) within what is left, which is exact where one is a multiple of
    the other; that step alone, iterated, swings to and fro on some images.

    Args:
        student, teacher: logits (B, C).
        low, high: positive.
    """
    # Behind the class that has nearly all of p, so that nothing cancels.
    top = teacher.argmax(dim=1, keepdim=True)
    student, teacher = (logits - logits.gather(1, top) for logits in (student, teacher))
    lower, upper = (torch.full_like(student[:, 0], bound) for bound in (low, high))

    def at(gamma: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative, and the variance of the teacher's logits."""
        there = gamma.unsqueeze(1) * teacher
        p = there.softmax(dim=1)
        centred = teacher - (p * teacher).sum(dim=1, keepdim=True)
        weighted = p * centred
        return (weighted * (there - student)).sum(dim=1), (weighted * centred).sum(dim=1)

    for _ in range(ROUNDS):
        gamma = (lower * upper).sqrt()
        rising = at(gamma)[0] > 0
        lower, upper = torch.where(rising, lower, gamma), torch.where(rising, gamma, upper)
    gamma = (lower * upper).sqrt()
    slope, variance = at(gamma)
    step = slope / variance.clamp_min(torch.finfo(variance.dtype).tiny)
    return (gamma - step).clamp(lower, upper)
