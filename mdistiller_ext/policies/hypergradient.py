"""HYPERGRADIENT: the temperature goes where the student's next step helps images held out."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..losses import Pair
from ..settings import SWITCH, count, number_to, setting
from .base import Bounds, Context, Policy, RunFacts, with_share
from .eat import gradient_norm

NEAR = 0.05  # of log T, for a derivative by central differences


@dataclass(frozen=True)
class HYPERGRADIENT(Bounds, Policy):
    """One temperature b goes where the student's next step makes images that are held out likelier.

    *The form is derived here; of learning a temperature by a look ahead: Meta Knowledge
    Distillation, arXiv:2202.07940.*

    A step down the distillation loss, whose gradient by the logits is δ, changes the cross-entropy
    of a batch of held-out images by `Σ_i <J_i v, ∂δ_i / ∂log b>` for each unit of log b, times
    something negative: v is the gradient of that cross-entropy by the weights, `J_i v` how sample
    i's logits change along it. In every EVERYth step log b moves by at most STEP, along the mean of
    the latest of these estimates over the root of the mean of their squares. b is T at first, stays
    within LOW T and HIGH T, and is part of what is saved. STEP 0 leaves it.

    Much of ∂δ / ∂log b is along δ, which is but another weight of the loss. With PROJECT that part
    is left out, and each batch's loss is multiplied so that δ is as long as it would be at T;
    without, b is a learning rate as well. One step ahead is short: it favours what pays at once.

    Needs DATASET.HOLDOUT, whose images are then no test of it. A run of it takes no CUDA graph and
    no SOLVER.COMPILE; in the toolkit's own trainer b stays T. `mean_temperature` in the record of
    each epoch is what came of it.
    """

    EVERY: int = setting(10, count(1), "steps from one estimate to the next")
    STEP: float = setting(0.01, number_to(0, 1), "largest change of log T by an estimate")
    MEMORY: int = setting(20, count(1), "how many estimates a mean is of, as its decay has it")
    PROJECT: bool = setting(True, SWITCH, "leave out what is but another weight")

    @property
    def slot(self) -> str:
        return "base"

    @property
    def held_every(self) -> int:
        return self.EVERY

    def build(self, run: RunFacts) -> Callable[[Pair, Context], Pair]:
        return LookAhead(self)

    def idle(self, run: RunFacts) -> str:
        return "" if self.STEP else "STEP is 0"


class LookAhead(nn.Module):
    """A share of the base temperature that follows a gradient."""

    log_share: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, settings: HYPERGRADIENT) -> None:
        super().__init__()
        self.settings = settings
        for name in ("log_share", "mean", "square"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, pair: Pair, context: Context) -> Pair:
        own = self.settings
        if context.ahead is not None:
            estimate = self.estimate(pair, context)
            self.mean.lerp_(estimate.to(self.mean), 1 / own.MEMORY)
            self.square.lerp_(estimate.to(self.mean).square(), 1 / own.MEMORY)
            root = self.square.sqrt().clamp_min(torch.finfo(self.square.dtype).tiny)
            self.log_share += own.STEP * self.mean / root
            self.log_share.clamp_(math.log(own.LOW), math.log(own.HIGH))
        there = self._at(pair, 0.0)
        if not own.PROJECT:
            return there
        as_it_was, as_it_is = (gradient_norm(p, context) for p in (pair, there))
        share = as_it_was / as_it_is.clamp_min(torch.finfo(as_it_is.dtype).tiny)
        return there.weighted(share.expand(len(pair.target)))

    def estimate(self, pair: Pair, context: Context) -> Tensor:
        """Of what a higher log b takes from the cross-entropy of images held out, ()."""
        assert context.slope is not None and context.ahead is not None
        below, here, above = (context.slope(self._at(pair, d)) for d in (-NEAR, 0.0, NEAR))
        change, along = (above - below) / (2 * NEAR), context.ahead()

        def product(a: Tensor, b: Tensor) -> Tensor:
            whole, _ = context.whole((a * b).sum(dim=1))
            return whole.sum()

        found = product(along, change)
        if self.settings.PROJECT:
            length = product(here, here).clamp_min(torch.finfo(here.dtype).tiny)
            found = found - product(along, here) * product(change, here) / length
        return found

    def _at(self, pair: Pair, beside: float) -> Pair:
        share = (self.log_share + beside).exp().to(pair.student)
        return with_share(pair, share.expand(len(pair.target)))
