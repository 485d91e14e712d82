import math

import torch
import torch.nn.functional as F

from ._base import Distiller
from .dkd_loss import dkd_loss


def keep_highest(logits_student, logits_teacher, target, ratio):
    """Both logits, (B, K), without the ratio of the classes that the teacher ranks
    lowest. The target always stays; it is the last class of the result."""
    count = math.floor(ratio * logits_teacher.shape[1] + 0.5)
    ranked = logits_teacher.scatter(1, target.unsqueeze(1), float("inf"))
    kept = ranked.sort(dim=1, stable=True)[1][:, count:]
    last = torch.full_like(target, kept.shape[1] - 1)
    return logits_student.gather(1, kept), logits_teacher.gather(1, kept), last


class DKD_LP(Distiller):
    """DKD + LP, logits pruning: the teacher's lowest logits leave both softmaxes,
    more of them in later stages"""

    def __init__(self, student, teacher, cfg):
        super(DKD_LP, self).__init__(student, teacher)
        self.ce_loss_weight = cfg.DKD_LP.CE_WEIGHT
        self.alpha = cfg.DKD_LP.ALPHA
        self.beta = cfg.DKD_LP.BETA
        self.temperature = cfg.DKD_LP.T
        self.warmup = cfg.DKD_LP.WARMUP
        self.ratios = cfg.DKD_LP.RATIOS
        self.step_epochs = cfg.DKD_LP.STEP_EPOCHS

    def forward_train(self, image, target, **kwargs):
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        stage = min((kwargs["epoch"] - 1) // self.step_epochs, len(self.ratios) - 1)
        kept = keep_highest(logits_student, logits_teacher, target, self.ratios[stage])

        # losses
        loss_ce = self.ce_loss_weight * F.cross_entropy(logits_student, target)
        loss_dkd = dkd_loss(*kept, self.alpha, self.beta, self.temperature)
        losses_dict = {
            "loss_ce": loss_ce,
            "loss_kd": min(kwargs["epoch"] / self.warmup, 1.0) * loss_dkd.mean(),
        }
        return logits_student, losses_dict
