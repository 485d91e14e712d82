"""LP, logits pruning: the teacher's lowest logits are pruned, more of them in later stages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..losses import Pair
from ..settings import Rule, count, list_of, number, one_of, setting
from .base import Context, Policy, RunFacts, stage_of_epoch


@dataclass(frozen=True)
class LP(Policy):
    """The teacher's lowest logits are not compared: `RATIOS[stage]` of the classes, per sample.

    *The 2024 paper, sections 3.3 and 4.3.*

    Smoothing raises the probability of classes that have nothing to do with the image. The
    `floor(r C + 0.5)` classes of lowest teacher logit, other than the label, are taken out of both
    softmaxes: probability exactly 0, gradient exactly 0. `r = RATIOS[stage]`,
    `stage = min((epoch - 1) // STEP_EPOCHS, len(RATIOS) - 1)`. The cross-entropy keeps all classes.

    The paper: four stages of 20 epochs, best from 0 to 40 % for ResNet-8. It does not give the two
    ratios in between; `[0.0, 0.13, 0.27, 0.4]` is equal spacing, an assumption. RATIOS all 0
    changes nothing.

    Controls: CLASSES `random` takes as many classes, whichever; MODE `lump` compares the pruned
    classes as if they were one, so that their mass still counts; RATIOS that fall prune less later.
    """

    SCHEDULED: ClassVar = ("RATIOS", "STEP_EPOCHS")
    needs_label: ClassVar = True

    RATIOS: list = setting(
        [0.0, 0.13, 0.27, 0.4], list_of(number(0, 1), least=1), "share of the classes, by stage"
    )
    STEP_EPOCHS: int = setting(20, count(1), "epochs at one ratio")
    CLASSES: str = setting("lowest", one_of("lowest", "random"), "which classes are pruned")
    MODE: str = setting("prune", one_of("prune", "lump"), "what becomes of them")

    @property
    def slot(self) -> str:
        return "classes"

    def schedule(self, epoch: int, run: RunFacts) -> dict[str, float]:
        return {"pruned_ratio": epoch_ratio(epoch, self.RATIOS, self.STEP_EPOCHS)}

    def draws(self, classes: int) -> int:
        return classes if self.CLASSES == "random" else 0

    def __call__(self, pair: Pair, context: Context) -> Pair:
        order = pair.teacher if self.CLASSES == "lowest" else context.uniform(pair.teacher)
        number = pruned_count(context.now["pruned_ratio"], order.shape[1])
        pruned = pruning_mask(order, pair.target, number)
        return replace(pair, pruned=pruned, lump=self.MODE == "lump")

    @classmethod
    def rules_beside(cls, classes: int) -> dict[str, Rule]:
        def allowed(ratios: Sequence[float]) -> bool:
            try:
                pruned_count(max(ratios), classes)
            except ValueError:
                return False
            return True

        text = f"ratios at which of {classes} classes the target and one other class must stay"
        return {"RATIOS": (allowed, text)}

    def idle(self, run: RunFacts) -> str:
        if not any(pruned_count(ratio, run.classes) for ratio in self.RATIOS):
            return f"RATIOS {self.RATIOS} prune not one of {run.classes} classes"
        if any(pruned_count(ratio, run.classes) for ratio in self.RATIOS[: self._stages(run)]):
            return ""
        return f"STEP_EPOCHS is {self.STEP_EPOCHS}, SOLVER.EPOCHS {run.epochs}"

    def unreached(self, run: RunFacts) -> dict[str, Any]:
        late = self.RATIOS[self._stages(run) :]
        needed = self.STEP_EPOCHS * (len(self.RATIOS) - 1) + 1
        why = f"with STEP_EPOCHS {self.STEP_EPOCHS} all take {needed}"
        return {"RATIOS": (late, why)} if late else {}

    def _stages(self, run: RunFacts) -> int:
        """How many stages a run begins."""
        return math.ceil(run.epochs / self.STEP_EPOCHS)


def epoch_ratio(epoch: int, ratios: Sequence[float], step_epochs: int) -> float:
    """The pruned share of the classes in an epoch, counted from 1; the last ratio stays.

    Raises:
        ValueError: `epoch` or `step_epochs` is below 1, or there is no ratio.
    """
    return ratios[stage_of_epoch(epoch, step_epochs, len(ratios))]


def pruned_count(ratio: float | Tensor, num_classes: int) -> int | Tensor:
    """The number of classes that a ratio prunes, rounded half up.

    Args:
        ratio: in [0, 1); a float64 tensor of shape () is not checked, and gives a tensor.

    Raises:
        ValueError: no class would be left beside the target.
    """
    if isinstance(ratio, Tensor):
        return (ratio * num_classes + 0.5).floor()
    count = math.floor(ratio * num_classes + 0.5)
    _check_count(count, num_classes, f"a pruning ratio of {ratio}")
    return count


def pruning_mask(logits_teacher: Tensor, target: Tensor, count: int | Tensor) -> Tensor:
    """True for the `count` classes of lowest teacher logit other than the target.

    Args:
        logits_teacher: shape (B, C). Equal logits are pruned in the order of their classes.
        target: class indices, shape (B,).
        count: 0 to C - 2; a tensor of shape () on the same device will do.

    Returns:
        Mask of shape (B, C).

    Raises:
        ValueError: an int `count` leaves no class beside the target, or a shape does not fit.
    """
    if logits_teacher.ndim != 2 or target.shape != logits_teacher.shape[:1]:
        raise ValueError(
            f"logits_teacher and target have shapes {tuple(logits_teacher.shape)} and "
            f"{tuple(target.shape)}, expected (B, C) and (B,)"
        )
    if not isinstance(count, Tensor):
        _check_count(count, logits_teacher.shape[1], "a mask")
    logits = logits_teacher.detach().scatter(1, target.unsqueeze(1), torch.inf)
    # Rank 0 is the lowest; stable, so that the target stays last beside an infinite logit too.
    rank = logits.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < count).scatter(1, target.unsqueeze(1), False)


def _check_count(count: int, num_classes: int, what: str) -> None:
    if not 0 <= count <= num_classes - 2:
        raise ValueError(
            f"{what} takes {count} of {num_classes} classes away, "
            f"expected 0 to {num_classes - 2}: the target and one other class must stay"
        )
