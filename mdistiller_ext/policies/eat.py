"""EAT, epoch adaptive temperature."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..losses import Pair
from ..losses.divergence import check_temperature
from ..settings import count, number, one_of, setting
from .base import Context, Policy, RunFacts, at_least_one, check_spread, stage_of_epoch


@dataclass(frozen=True)
class EAT(Policy):
    """The temperature falls step by step from `T (1 + RANGE)` to `T (1 - RANGE)`.

    *The 2024 paper, sections 3.1 and 4.1.*

    Early on, a high temperature teaches the smoothed distribution; then it falls, so that the
    student comes to see the teacher's own. `n = ceil(EPOCHS / STEP_EPOCHS)` stages, stage
    `i = min((epoch - 1) // STEP_EPOCHS, n - 1)`, `T(epoch) = T (1 + RANGE - 2 RANGE i / (n - 1))`.

    The paper: T 4, steps of 10 epochs, ±40 % best for ResNet-8, ±20 % for ResNet-20: 5.6, 5.14,
    4.69, 4.23, 3.77, 3.31, 2.86, 2.4. A negative RANGE lets the temperature rise. RANGE 0 changes
    nothing.

    MODE `gradient` is a control: the temperature stays T, and each batch's distillation loss is
    multiplied so that its gradient by the logits is as long as it would be at EAT's temperature.
    What EAT gains beyond it, it gains by the temperature and not by another weight.
    """

    SCHEDULED: ClassVar = ("RANGE", "STEP_EPOCHS")

    RANGE: float = setting(0.4, number(-1, 1, open_low=True), "share of T above and below it")
    STEP_EPOCHS: int = setting(10, count(1), "epochs at one temperature")
    MODE: str = setting("temperature", one_of("temperature", "gradient"), "what changes")

    @property
    def slot(self) -> str:
        return "base" if self.MODE == "temperature" else "size"

    @property
    def vmappable(self) -> bool:
        return self.MODE == "temperature"

    def schedule(self, epoch: int, run: RunFacts) -> dict[str, float]:
        name = "temperature" if self.MODE == "temperature" else "eat_temperature"
        stages = self.RANGE, self.STEP_EPOCHS, run.epochs
        return {name: epoch_temperature(epoch, run.temperature, *stages)}

    def __call__(self, pair: Pair, context: Context) -> Pair:
        if self.MODE == "temperature":
            return pair
        relative = context.now["eat_temperature"] / context.now["temperature"]
        there = pair.spread(torch.ones_like(pair.student[:, 0]) * relative)
        here, of_eat = (gradient_norm(p, context) for p in (pair, there))
        share = of_eat / here.clamp_min(torch.finfo(here.dtype).tiny)
        return pair.weighted(share.expand(len(pair.target)))

    def idle(self, run: RunFacts) -> str:
        if self.RANGE == 0:
            return "RANGE is 0"
        one = run.epochs <= self.STEP_EPOCHS
        return f"STEP_EPOCHS is {self.STEP_EPOCHS}, SOLVER.EPOCHS {run.epochs}" if one else ""


def epoch_temperature(
    epoch: int, temperature: float, spread: float, step_epochs: int, epochs: int
) -> float:
    """EAT: the temperature falls in equal steps from T (1 + spread) to T (1 - spread).

    Args:
        epoch: counted from 1.
        temperature: T, positive.
        spread: RANGE, in (-1, 1); 0 gives T in every epoch, a negative one a rising temperature.
        step_epochs: length of a stage in epochs.
        epochs: length of the whole run, which gives ceil(epochs / step_epochs) stages.

    Raises:
        ValueError: an argument is outside its range.
    """
    at_least_one(epoch=epoch, step_epochs=step_epochs, epochs=epochs)
    check_temperature(temperature, ())
    check_spread(spread)
    stages = math.ceil(epochs / step_epochs)
    if stages == 1:
        return temperature
    stage = stage_of_epoch(epoch, step_epochs, stages)
    return temperature * (1 + spread - 2 * spread * stage / (stages - 1))


def gradient_norm(pair: Pair, context: Context) -> Tensor:
    """The length of the gradient of the whole batch's loss by the student's logits, ()."""
    assert context.slope is not None
    squares, _ = context.whole(context.slope(pair).square().sum(dim=1))
    return squares.sum().sqrt()
