"""Temperatures from each sample's own logits: LS and NORM."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..losses import Pair
from ..losses.divergence import prune
from .base import Context, Policy


@dataclass(frozen=True)
class LS(Policy):
    """Logit standardisation: both logits are divided by their standard deviation, per sample.

    *Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024.*

    The temperatures are `T (std(z_s) + 1e-7)` and `T (std(z_t) + 1e-7)`, std over the classes that
    are compared, with C - 1 in the denominator; subtracting the mean, as the paper does, cancels in
    a softmax. The gradient flows through `std(z_s)`, so that the loss cannot change the student's
    logit scale. The factor stays T². A standardised logit is at most `(C - 1) / √C`: T is on
    another scale than KD's, and 2 is usual.
    """

    @property
    def slot(self) -> str:
        return "statistic"

    def __call__(self, pair: Pair, context: Context) -> Pair:
        pair, of_student, of_teacher = _centred(pair)
        tau_s, tau_t = pair.tau_s * (of_student + 1e-7), pair.tau_t * (of_teacher + 1e-7)
        return replace(pair, tau_s=tau_s, tau_t=tau_t)


@dataclass(frozen=True)
class NORM(Policy):
    """NormKD: as LS, with the teacher's own temperature in the factor.

    *Chi, Zheng, Li, Yang, Wang, Zhang: NormKD: Normalized Logits for Knowledge Distillation,
    arXiv:2308.00520.*

    The temperatures are `T std(z_s)` and `T std(z_t)`, the factor is `(T std(z_t))²` of each
    sample, so that samples with spread-out teacher logits weigh more. Usual: T 2, CE_WEIGHT 0.1,
    KD_WEIGHT 0.9.
    """

    @property
    def slot(self) -> str:
        return "statistic"

    @property
    def per_sample(self) -> bool:
        return True

    def __call__(self, pair: Pair, context: Context) -> Pair:
        pair, of_student, of_teacher = _centred(pair)
        tau_s, tau_t = pair.tau_s * _not_zero(of_student), pair.tau_t * _not_zero(of_teacher)
        return replace(pair, tau_s=tau_s, tau_t=tau_t, tau=pair.tau * of_teacher)


def _centred(pair: Pair) -> tuple[Pair, Tensor, Tensor]:
    """With logits less their mean, and the standard deviations of both, (B,), over what is kept.

    Centred, because differences that are small beside a row are divided by something small.
    """
    student, of_student = _moments(pair.student, pair.pruned)
    teacher, of_teacher = _moments(pair.teacher, pair.pruned)
    return replace(pair, student=student, teacher=teacher), of_student, of_teacher


def _moments(logits: Tensor, pruned: Tensor | None) -> tuple[Tensor, Tensor]:
    """(logits minus their mean (B, C), standard deviation (B,))."""
    kept = torch.ones_like(logits) if pruned is None else (~pruned).to(logits)
    count = kept.sum(dim=1)
    # From one of them, so that equal ones have a mean that is exactly theirs.
    behind = logits - prune(logits, pruned).detach().amax(dim=1, keepdim=True)
    centred = behind - ((behind * kept).sum(dim=1) / count).unsqueeze(1)
    # Divided by the largest, because the squares of huge logits are infinite.
    largest = _not_zero((centred.detach() * kept).abs().amax(dim=1))
    squares = (centred * kept / largest.unsqueeze(1)).square().sum(dim=1)
    # Of a constant row both the deviation and its gradient are 0.
    return centred, largest * _not_zero(squares).sqrt() * (squares > 0) / (count - 1).sqrt()


def _not_zero(values: Tensor) -> Tensor:
    """1 where 0: a constant row has the same softmax at every temperature."""
    return values.where(values > 0, 1.0)
