import torch
import torch.nn.functional as F

from ._base import Distiller
from .dkd_loss import dkd_loss


def sample_temperature(logits_student, logits_teacher, temperature, spread, fraction):
    """T (1 + spread) for the samples of largest KL, T (1 - spread) for those of
    smallest, as many of each: fraction of the batch, rounded down. Shape (B, 1)."""
    log_p_student = F.log_softmax(logits_student.detach() / temperature, dim=1)
    log_p_teacher = F.log_softmax(logits_teacher / temperature, dim=1)
    divergence = (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(dim=1)
    rank = divergence.sort(stable=True)[1].sort(stable=True)[1]
    count = int(fraction * len(rank))
    side = (rank >= len(rank) - count).to(divergence) - (rank < count).to(divergence)
    return (temperature * (1 + spread * side)).unsqueeze(1)


class DKD_DAT(Distiller):
    """DKD + DAT, data adaptive temperature: higher for the hardest samples of a
    batch, lower for the easiest"""

    def __init__(self, student, teacher, cfg):
        super(DKD_DAT, self).__init__(student, teacher)
        self.ce_loss_weight = cfg.DKD_DAT.CE_WEIGHT
        self.alpha = cfg.DKD_DAT.ALPHA
        self.beta = cfg.DKD_DAT.BETA
        self.temperature = cfg.DKD_DAT.T
        self.warmup = cfg.DKD_DAT.WARMUP
        self.spread = cfg.DKD_DAT.RANGE
        self.fraction = cfg.DKD_DAT.FRACTION

    def forward_train(self, image, target, **kwargs):
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        temperature = sample_temperature(
            logits_student,
            logits_teacher,
            self.temperature,
            self.spread,
            self.fraction,
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
