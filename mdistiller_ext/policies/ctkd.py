"""CTKD, curriculum temperature: a temperature that is learned against the student."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..losses import Pair
from ..settings import SWITCH, count, number, setting
from .base import Context, Policy, RunFacts, with_share


@dataclass(frozen=True)
class CTKD(Policy):
    """One temperature is learned to make the distillation loss larger, more and more so.

    *Li, Li, Yang, Zhao, Song, Luo, Li, Yang: Curriculum Temperature for Knowledge Distillation,
    AAAI 2023.*

    `T (LOW + (HIGH - LOW) sigmoid(θ))` with one parameter θ, 1 at first, in the student's own
    optimizer. Its gradient, that of the factor T² included, is multiplied by
    `-(1 - cos(π min(epoch, EPOCHS) / EPOCHS)) / 2`, from nearly 0 to -1. `mean_temperature` in the
    record of each epoch is what came of it; in the authors' logs it falls to its lower bound within
    three epochs when combined with LS.

    Published: T 4, LOW 0.25, HIGH 5.25, so from 15.6 at first within 1 and 21; EPOCHS 10; CE_WEIGHT
    0.1 and KD_WEIGHT 0.9 on KD, 1 and 1 without warm-up on DKD. Its code has weight decay on θ, as
    here by default, which pulls the temperature to the middle of its range, and does not save θ;
    here a run goes on with the θ that it had.
    """

    LOW: float = setting(0.25, number(0, 100, open_low=True), "lowest temperature, as a share of T")
    HIGH: float = setting(5.25, number(0, 100, open_low=True), "highest temperature, likewise")
    EPOCHS: int = setting(10, count(1), "epochs in which its gradient comes to full strength")
    DECAY: bool = setting(True, SWITCH, "weight decay on θ")

    @property
    def slot(self) -> str:
        return "base"

    @property
    def decayed(self) -> bool:
        return self.DECAY

    def schedule(self, epoch: int, run: RunFacts) -> dict[str, float]:
        done = min(epoch / self.EPOCHS, 1.0)
        return {"ctkd_strength": (1 - math.cos(math.pi * done)) / 2}

    def build(self, run: RunFacts) -> Callable[[Pair, Context], Pair]:
        return LearnedTemperature(self)


class LearnedTemperature(nn.Module):
    """A temperature between two shares of the base's."""

    def __init__(self, settings: CTKD) -> None:
        super().__init__()
        self.settings = settings
        self.theta = nn.Parameter(torch.ones(()))

    def forward(self, pair: Pair, context: Context) -> Pair:
        low, high = self.settings.LOW, self.settings.HIGH
        theta = against(self.theta, context.now["ctkd_strength"])
        share = low + (high - low) * theta.sigmoid()
        return with_share(pair, share.to(pair.student).expand(len(pair.target)))


def against(parameter: Tensor, strength: float | Tensor) -> Tensor:
    """The parameter itself, whose gradient is turned round and multiplied by `strength`."""
    value = parameter.detach()
    strength = torch.as_tensor(strength, dtype=value.dtype, device=value.device)
    return value - strength * (parameter - value)
