"""What a logit loss compares, and what it declares."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..plugins import check_free
from ..settings import Settings
from .divergence import Temperature, kl_divergence, log_softmax, scalars, target_mask

LOSSES: dict[str, type["Loss"]] = {}


@dataclass(frozen=True)
class Pair:
    """The logits of a batch, and at which temperatures and over which classes they are compared.

    Attributes:
        student, teacher: logits (B, C), in float32 or better.
        target: class indices (B,); of mixed images the share of each class, (B, C).
        tau_s, tau_t: temperatures of the student's and the teacher's softmax, () or (B,).
        tau: the temperature that the loss's factor is made of, () or (B,).
        fixed_student: tau_s is the loss's own; no policy changes it.
        pruned: classes that are not compared, bool (B, C), never the target; or None.
        lump: they are compared as if they were one class, instead of not at all.
        weight: of each sample, (B,), without gradient; or None.
        seen: what is worth logging, as a distiller's `monitor`.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor
    tau_s: Temperature
    tau_t: Temperature
    tau: Temperature
    fixed_student: bool = False
    pruned: Tensor | None = None
    lump: bool = False
    weight: Tensor | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)

    def spread(self, by: Tensor) -> "Pair":
        """With temperatures `by` (B,) times as high."""
        tau_s = self.tau_s if self.fixed_student else self.tau_s * by
        return replace(self, tau_s=tau_s, tau_t=self.tau_t * by, tau=self.tau * by)

    def weighted(self, weight: Tensor) -> "Pair":
        """With a further weight (B,) for each sample."""
        weight = weight.detach()
        return replace(self, weight=weight if self.weight is None else self.weight * weight)

    def settled(self) -> "Pair":
        """With the pruned classes as one class, the last of C + 1, where they are to be lumped.

        Its logit is T logsumexp(z / T), which gives it the sum of their probabilities.
        """
        if self.pruned is None or not self.lump:
            return self
        out = ~self.pruned
        columns = []
        for logits, tau in ((self.student, self.tau_s), (self.teacher, self.tau_t)):
            tau = scalars(tau, logits[:, 0])
            inside = (logits / tau.unsqueeze(1)).masked_fill(out, -torch.inf)
            none = out.all(dim=1)
            # A row that prunes nothing has no such class; its gradient must be 0 and not nan.
            bucket = tau * inside.masked_fill(none.unsqueeze(1), 0.0).logsumexp(dim=1)
            columns.append(torch.cat([logits, bucket.unsqueeze(1)], dim=1))
        pruned = torch.cat([self.pruned, none.unsqueeze(1)], dim=1)
        return replace(self, student=columns[0], teacher=columns[1], pruned=pruned, lump=False)


@dataclass(frozen=True)
class Loss(Settings):
    """One value for each sample of a pair, without factor and weight.

    A subclass is a frozen dataclass of its settings, and is found by its name in LOGIT.LOSS. Its
    docstring is its page in docs/methods.md: formula, source, published settings.

    Attributes:
        OWNS: slots of policies that the loss takes itself, and why: slot -> reason.
        needs_label: whether it looks at the pair's `target`.
    """

    OWNS: ClassVar[dict[str, str]] = {}
    needs_label: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        check_free(cls.__name__, LOSSES.get(cls.__name__), cls)
        LOSSES[cls.__name__] = cls

    @property
    def coupled(self) -> bool:
        """Whether a sample's value depends on the other samples of the batch."""
        return False

    @property
    def unprunable(self) -> str:
        """Why no class may be taken out, or ""."""
        return ""

    def temperatures(self, pair: Pair) -> Pair:
        """The pair at the temperatures of a loss that does not take them as they come."""
        return pair

    def factor(self, pair: Pair, base: float) -> Tensor:
        """What each sample's value is multiplied by, (B,): T^2, so that the size of the gradient
        does not depend on it (Hinton et al., arXiv:1503.02531).

        Args:
            base: the constant temperature of the config, T.
        """
        return scalars(pair.tau, pair.student[:, 0]) ** 2

    def weight(self, pair: Pair) -> Tensor | None:
        """A weight for each sample, (B,), that belongs to the loss."""
        return None

    def seen(self, pair: Pair) -> dict[str, Tensor]:
        """What is worth logging, as a distiller's `monitor`."""
        return {}

    def __call__(self, pair: Pair) -> Tensor:
        raise NotImplementedError


def kept_of(pair: Pair) -> Tensor:
    """The classes that are compared, bool (B, C)."""
    return torch.ones_like(pair.student, dtype=torch.bool) if pair.pruned is None else ~pair.pruned


def others_of(pair: Pair, label: Tensor) -> Tensor:
    """The classes that are compared but for one of each sample, (B,); bool (B, C)."""
    return kept_of(pair) & ~target_mask(label, pair.student)


def kl_of(pair: Pair, classes: Tensor) -> Tensor:
    """KL(teacher || student) over some classes of each sample, bool (B, C); 0 where it has none."""
    some = classes.any(dim=1)
    pruned = ~classes & some.unsqueeze(1)
    loss = kl_divergence(pair.student, pair.teacher, pair.tau_s, pruned, pair.tau_t)
    return loss.where(some, 0.0)


def probabilities(pair: Pair) -> tuple[Tensor, Tensor]:
    """(student's, teacher's) at the pair's temperatures, (B, C); exactly 0 where pruned."""
    return (
        log_softmax(pair.student, pair.tau_s, pair.pruned).exp(),
        log_softmax(pair.teacher, pair.tau_t, pair.pruned).exp(),
    )
