"""NUCLEUS: the teacher's lowest probabilities are pruned, up to a share of their sum."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..losses import Pair
from ..losses.divergence import Temperature, log_softmax
from ..settings import number, one_of, setting
from .base import Context, Policy, RunFacts


@dataclass(frozen=True)
class NUCLEUS(Policy):
    """The teacher's lowest classes are not compared, as long as they have less than EPSILON.

    *Nucleus sampling is Holtzman, Buys, Du, Forbes, Choi: The Curious Case of Neural Text
    Degeneration, ICLR 2020.*

    The smallest set of classes with the label whose sum in `softmax(z_t / b)` is above
    `1 - EPSILON` is kept, of the label's others at least one; b is the base temperature, whoever
    sets it. So the share that is pruned depends on the sample, and grows as the temperature falls,
    as LP's does. `mean_pruned_ratio` in the record of each epoch is what came of it. EPSILON 0
    changes nothing.

    MODE `lump` compares the pruned classes as if they were one, so that their mass still counts:
    the loss is then at most that of all classes, and less by no more than EPSILON times the KL
    among the pruned.
    """

    needs_label: ClassVar = True

    EPSILON: float = setting(0.05, number(0, 1), "what the pruned classes have less than")
    MODE: str = setting("prune", one_of("prune", "lump"), "what becomes of them")

    @property
    def slot(self) -> str:
        return "classes"

    def __call__(self, pair: Pair, context: Context) -> Pair:
        pruned = outside(pair.teacher, pair.target, pair.tau_t, self.EPSILON)
        seen = {"mean_pruned_ratio": pruned.float().mean(dim=1).sum()}
        return replace(pair, pruned=pruned, lump=self.MODE == "lump", seen=pair.seen | seen)

    def idle(self, run: RunFacts) -> str:
        return "" if self.EPSILON else "EPSILON is 0"


def outside(
    logits_teacher: Tensor, target: Tensor, temperature: Temperature, epsilon: float
) -> Tensor:
    """True for the lowest classes whose probabilities together are below `epsilon`.

    Args:
        logits_teacher: shape (B, C). Equal logits are pruned in the order of their classes.
        target: class indices, shape (B,); these and one other class of each sample stay.

    Returns:
        Mask of shape (B, C).
    """
    label = target.unsqueeze(1)
    order = logits_teacher.scatter(1, label, torch.inf).argsort(dim=1, stable=True)
    p = log_softmax(logits_teacher, temperature).exp()
    lowest = p.gather(1, order).cumsum(dim=1) < epsilon
    lowest[:, -2:] = False  # the highest other class, and the label
    return torch.zeros_like(lowest).scatter(1, order, lowest)
