"""ENTROPY: the temperature at which the teacher is as uncertain as it should be."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..losses import Pair
from ..losses.divergence import log_softmax
from ..settings import number, number_to, one_of, setting
from .base import Bounds, Context, Policy, RunFacts, with_share
from .eakd import entropy


@dataclass(frozen=True)
class ENTROPY(Bounds, Policy):
    """One temperature b, at which the teacher is on average as uncertain as its student.

    `mean_i H(softmax(z_t / b)) = SHARE mean_i H(softmax(z_s))`, H the entropies over all classes,
    without gradient. Each batch moves log b by RATE of Newton's step, which is the difference of
    the two sides over `mean_i Var_p(log p)`, `p = softmax(z_t / b)`, and is taken as at most 1. b
    is T at first, stays within LOW T and HIGH T, and is part of what is saved. RATE 0 changes
    nothing.

    OF `uniform` has SHARE of the largest entropy, log C, for the target: one softness, whatever the
    teacher. `mean_temperature` in the record of each epoch is what came of it.
    """

    OF: str = setting("student", one_of("student", "uniform"), "whose entropy is the measure")
    SHARE: float = setting(1.0, number(0, 100, open_low=True), "of it, what the teacher has")
    RATE: float = setting(0.1, number_to(0, 1), "of a step, with each batch")

    @property
    def slot(self) -> str:
        return "base"

    @property
    def vmappable(self) -> bool:
        return False

    def build(self, run: RunFacts) -> Callable[[Pair, Context], Pair]:
        return Thermostat(self)

    def idle(self, run: RunFacts) -> str:
        return "" if self.RATE else "RATE is 0"


class Thermostat(nn.Module):
    """A share of the base temperature that follows a target."""

    log_share: Tensor

    def __init__(self, settings: ENTROPY) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("log_share", torch.zeros(()))

    @torch.no_grad()
    def forward(self, pair: Pair, context: Context) -> Pair:
        own = self.settings
        found, slope = softness(pair.teacher, pair.tau_t * self._share(pair))
        largest = math.log(pair.teacher.shape[1])
        measure = entropy(pair.student, 1.0) if own.OF == "student" else largest
        (missing, _), (slope, _) = map(context.whole, (own.SHARE * measure - found, slope))
        step = missing.mean() / slope.mean().clamp_min(torch.finfo(slope.dtype).tiny)
        self.log_share += own.RATE * step.clamp(-1, 1)
        self.log_share.clamp_(math.log(own.LOW), math.log(own.HIGH))
        return with_share(pair, self._share(pair))

    def _share(self, pair: Pair) -> Tensor:
        return self.log_share.exp().to(pair.student).expand(len(pair.target))


def softness(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The entropy of softmax(z / T) in nats, and its derivative by log T, each (B,)."""
    log_p = log_softmax(logits, temperature)
    p = log_p.exp()
    entropy = -(p * log_p).sum(dim=1)
    centred = log_p + entropy.unsqueeze(1)
    return entropy, (p * centred * centred).sum(dim=1)
