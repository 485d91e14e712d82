"""Decoupled knowledge distillation (Zhao et al., CVPR 2022), which the three techniques extend."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from ..losses import dkd_loss, kl_divergence
from ..pruning import pruned_count, pruning_mask
from .base import Distiller


class DKD(Distiller):
    """CE_WEIGHT CE(z_s, y) + min(epoch / WARMUP, 1) mean_i T_i^2 (ALPHA TCKD + BETA NCKD).

    A technique is one function put in the place of one of the three below; they compose in this
    order: classes are pruned, the epoch gives the temperature, the samples spread around it.

    Attributes:
        epoch_temperature: epoch -> temperature; constant in DKD.
        sample_temperature: (what ranks the batch (B,), temperature) -> temperatures (B,), or None.
        sample_order: (divergence (B,), drawn) -> what ranks the samples of the batch, (B,).
        epoch_ratio: epoch -> share of the classes that is pruned, or None.
        pruning_order: (the teacher's logits (B, C), drawn) -> what ranks the classes, (B, C).
    """

    TYPE = "DKD"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        super().__init__(student, teacher)
        self.method = cfg[self.TYPE]
        self.epoch_temperature: Callable[[int], float] = lambda epoch: self.method.T
        self.sample_temperature: Callable[[Tensor, float | Tensor], Tensor] | None = None
        self.epoch_ratio: Callable[[int], float] | None = None
        self.sample_order: Callable[[Tensor, Tensor | None], Tensor] = lambda kl, drawn: kl
        self.pruning_order: Callable[[Tensor, Tensor | None], Tensor] = lambda z, drawn: z

    def schedule(self, epoch: int) -> dict[str, float]:
        settings = {
            "warmup": min(epoch / self.method.WARMUP, 1.0),
            "temperature": self.epoch_temperature(epoch),
        }
        if self.epoch_ratio:
            settings["pruned_ratio"] = self.epoch_ratio(epoch)
        return settings

    def forward_train(
        self,
        *,
        image: Tensor,
        target: Tensor,
        epoch: int,
        drawn: Tensor | None = None,
        **kwargs: Any,
    ):
        logits_student, logits_teacher = self.logits(image)
        now = self.scheduled(epoch)
        pruned = None
        if "pruned_ratio" in now:
            count = pruned_count(now["pruned_ratio"], logits_teacher.shape[1])
            pruned = pruning_mask(self.pruning_order(logits_teacher, drawn), target, count)
        temperature: float | Tensor = now["temperature"]
        if self.sample_temperature:
            with torch.no_grad():
                divergence = kl_divergence(
                    logits_student, logits_teacher, now["temperature"], pruned
                )
            whole, own = self.global_batch(self.sample_order(divergence, drawn))
            temperature = self.sample_temperature(whole, now["temperature"])[own]
            raised, lowered = temperature > now["temperature"], temperature < now["temperature"]
            self.monitor = {
                "dat_raised": raised.sum(),
                "dat_lowered": lowered.sum(),
                "dat_raised_kl": (divergence * raised).sum(),
                "dat_lowered_kl": (divergence * lowered).sum(),
                "dat_kl": divergence.sum(),
                "dat_images": torch.full_like(target[0], len(target)),
            }
        loss_dkd = dkd_loss(
            logits_student,
            logits_teacher,
            target,
            self.method.ALPHA,
            self.method.BETA,
            temperature,
            pruned,
        )
        return logits_student, {
            "loss_ce": self.method.CE_WEIGHT * F.cross_entropy(logits_student, target),
            "loss_kd": (now["warmup"] * loss_dkd).mean(),
        }


def uniform(like: Tensor, drawn: Tensor | None) -> Tensor:
    """The numbers drawn for a step, as of `like`'s shape; the toolkit's own trainer draws none."""
    return torch.rand_like(like) if drawn is None else drawn.view_as(like)
