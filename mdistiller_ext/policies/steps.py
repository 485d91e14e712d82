"""STEPS: temperatures that were found elsewhere, one stage after the other."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..settings import count, list_of, number, setting
from .base import Policy, RunFacts, stage_of_epoch


@dataclass(frozen=True)
class STEPS(Policy):
    """The temperature is `TEMPERATURES[stage]`: what another run found, its reverse, its average.

    `stage = min((epoch - 1) // STEP_EPOCHS, len(TEMPERATURES) - 1)`. So the schedule that a
    controller found on a part of the training images, as `mean_temperature` in its record, trains
    on all of them; the same temperatures in another order, or their mean as T, say whether it is
    the course that matters, or the level alone.
    """

    SCHEDULED: ClassVar = ("TEMPERATURES", "STEP_EPOCHS")

    TEMPERATURES: list = setting(
        [5.6, 4.0, 2.4], list_of(number(0.01, 1000), least=1), "by stage; the last one stays"
    )
    STEP_EPOCHS: int = setting(1, count(1), "epochs at one temperature")

    @property
    def slot(self) -> str:
        return "base"

    def schedule(self, epoch: int, run: RunFacts) -> dict[str, float]:
        stage = stage_of_epoch(epoch, self.STEP_EPOCHS, len(self.TEMPERATURES))
        return {"temperature": self.TEMPERATURES[stage]}

    def idle(self, run: RunFacts) -> str:
        reached = set(self.TEMPERATURES[: self._stages(run)])
        return f"TEMPERATURES are all T, {run.temperature}" if reached == {run.temperature} else ""

    def unreached(self, run: RunFacts) -> dict[str, Any]:
        late, stages = self.TEMPERATURES[self._stages(run) :], len(self.TEMPERATURES)
        why = f"with STEP_EPOCHS {self.STEP_EPOCHS} all take {self.STEP_EPOCHS * (stages - 1) + 1}"
        return {"TEMPERATURES": (late, why)} if late else {}

    def _stages(self, run: RunFacts) -> int:
        """How many stages a run begins."""
        return math.ceil(run.epochs / self.STEP_EPOCHS)
