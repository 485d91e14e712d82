import math

import torch
import torch.nn.functional as F

from ._base import Distiller
from .dkd_loss import dkd_loss


def epoch_temperature(epoch, temperature, spread, step_epochs, epochs):
    """From T (1 + spread) to T (1 - spread) in equal steps; epochs count from 1."""
    stages = math.ceil(epochs / step_epochs)
    if stages == 1:
        return temperature
    stage = min((epoch - 1) // step_epochs, stages - 1)
    return temperature * (1 + spread - 2 * spread * stage / (stages - 1))


class DKD_EAT(Distiller):
    """DKD + EAT, epoch adaptive temperature: it falls step by step"""

    def __init__(self, student, teacher, cfg):
        super(DKD_EAT, self).__init__(student, teacher)
        self.ce_loss_weight = cfg.DKD_EAT.CE_WEIGHT
        self.alpha = cfg.DKD_EAT.ALPHA
        self.beta = cfg.DKD_EAT.BETA
        self.temperature = cfg.DKD_EAT.T
        self.warmup = cfg.DKD_EAT.WARMUP
        self.spread = cfg.DKD_EAT.RANGE
        self.step_epochs = cfg.DKD_EAT.STEP_EPOCHS
        self.epochs = cfg.SOLVER.EPOCHS

    def forward_train(self, image, target, **kwargs):
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        temperature = epoch_temperature(
            kwargs["epoch"],
            self.temperature,
            self.spread,
            self.step_epochs,
            self.epochs,
        )

        # losses
        loss_ce = self.ce_loss_weight * F.cross_entropy(logits_student, target)
        loss_dkd = dkd_loss(
            logits_student, logits_teacher, target, self.alpha, self.beta, temperature
        )
        losses_dict = {
            "loss_ce": loss_ce,
            "loss_kd": min(kwargs["epoch"] / self.warmup, 1.0) * loss_dkd.mean(),
        }
        return logits_student, losses_dict
