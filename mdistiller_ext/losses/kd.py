"""Knowledge distillation."""

from dataclasses import dataclass

from torch import Tensor

from .base import Loss, Pair
from .divergence import Temperature, kl_divergence, scalars


@dataclass(frozen=True)
class KD(Loss):
    """Match the teacher's softened probabilities.

    *Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531.*

    `KL(softmax(z_t / T) ‖ softmax(z_s / T))`, factor `T²`. Usual weights: CE_WEIGHT 0.1,
    KD_WEIGHT 0.9, T 4, no warm-up.
    """

    def __call__(self, pair: Pair) -> Tensor:
        return kl_divergence(pair.student, pair.teacher, pair.tau_s, pair.pruned, pair.tau_t)


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: Temperature) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)) of each sample, (B,).

    Raises:
        ValueError: as `kl_divergence`.
    """
    divergence = kl_divergence(logits_student, logits_teacher, temperature)
    return scalars(temperature, divergence) ** 2 * divergence
