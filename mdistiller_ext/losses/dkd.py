"""Decoupled knowledge distillation, which the paper's three techniques extend."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..settings import number, setting
from .base import Loss, Pair
from .divergence import (
    Temperature,
    binary_kl,
    check_shapes,
    kl_divergence,
    scalars,
    target_margin,
    target_mask,
)


@dataclass(frozen=True)
class DKD(Loss):
    """KD's divergence in two parts, each with a weight: target against the rest, and the rest.

    *Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022, eq. 7.*

    `ALPHA TCKD + BETA NCKD`, factor `T²`. TCKD is the KL divergence between the binary
    distributions `(p_y, 1 - p_y)`, NCKD the one between the softmaxes over the classes other than
    the label. TCKD is computed from the margin `log(p_y / (1 - p_y)) = -logsumexp_{j≠y}((z_j - z_y)
    / T)`, which loses nothing where `p_y` rounds to 0 or 1. Usual weights: CE_WEIGHT 1, KD_WEIGHT
    1, T 4, WARMUP 20; BETA 8, or 2 for pairs with a ResNet-110 teacher.
    """

    needs_label: ClassVar = True

    ALPHA: float = setting(1.0, number(0), "weight of TCKD")
    BETA: float = setting(8.0, number(0), "weight of NCKD")

    def __call__(self, pair: Pair) -> Tensor:
        logits = pair.student, pair.teacher, pair.target
        return dkd(*logits, self.ALPHA, self.BETA, pair.tau_s, pair.pruned, pair.tau_t)


def dkd(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: Temperature,
    pruned: Tensor | None = None,
    temperature_teacher: Temperature | None = None,
) -> Tensor:
    """alpha TCKD + beta NCKD of each sample, (B,).

    Args:
        target: class indices, shape (B,). The target itself is never pruned.
        temperature: the student's, and the teacher's where `temperature_teacher` is None.
        pruned: at least one class other than the target must be kept in every row.

    Raises:
        ValueError: as `kl_divergence`.
    """
    check_shapes(logits_student, logits_teacher, target=target, pruned=pruned)
    of_teacher = temperature if temperature_teacher is None else temperature_teacher
    not_others = target_mask(target, logits_student)
    if pruned is not None:
        not_others = not_others | pruned
    tckd = binary_kl(
        target_margin(logits_student, target, temperature, not_others),
        target_margin(logits_teacher, target, of_teacher, not_others),
    )
    nckd = kl_divergence(logits_student, logits_teacher, temperature, not_others, of_teacher)
    return alpha * tckd + beta * nckd


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: Temperature,
    pruned: Tensor | None = None,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) of each sample, (B,). Arguments and errors as of `dkd`."""
    loss = dkd(logits_student, logits_teacher, target, alpha, beta, temperature, pruned)
    return scalars(temperature, loss) ** 2 * loss
