"""Knowledge distillation (Hinton, Vinyals, Dean: arXiv:1503.02531)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from ..losses import kd_loss
from .base import Distiller


class KD(Distiller):
    """CE_WEIGHT CE(z_s, y) + KD_WEIGHT mean_i T^2 KL(softmax(z_t/T) || softmax(z_s/T))."""

    TYPE = "KD"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        super().__init__(student, teacher)
        method = cfg[self.TYPE]
        self.temperature = method.TEMPERATURE
        self.ce_weight = method.LOSS.CE_WEIGHT
        self.kd_weight = method.LOSS.KD_WEIGHT

    def schedule(self, epoch: int) -> dict[str, float]:
        return {"temperature": self.temperature}

    def forward_train(self, *, image: Tensor, target: Tensor, **kwargs: Any):
        logits_student, logits_teacher = self.logits(image)
        return logits_student, {
            "loss_ce": self.ce_weight * F.cross_entropy(logits_student, target),
            "loss_kd": self.kd_weight
            * kd_loss(logits_student, logits_teacher, self.temperature).mean(),
        }
