"""What a policy changes in a pair before it is compared, and what it declares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..losses import Pair
from ..plugins import check_free
from ..settings import Rule, Settings, number, setting

POLICIES: dict[str, type["Policy"]] = {}

# What policies own, in the order in which they act: the base before classes that depend on it,
# classes before statistics, statistics before spread. Of each slot but the weight, which is a
# product, there is one owner.
SLOTS = {
    "base": "the base temperature",
    "classes": "what classes are compared",
    "statistic": "the temperature's statistic",
    "spread": "how temperatures spread over the batch",
    "weight": "the weight of each sample",
    "size": "the size of the batch's gradient",
}


class RunFacts(NamedTuple):
    """What is known of a run before it begins.

    Attributes:
        temperature: the config's, T.
        classes, images: of the training set; a distiller does not know them.
    """

    epochs: int
    batch_size: int
    temperature: float
    classes: int = 0
    images: int = 0


def _alone(values: Tensor) -> tuple[Tensor, slice]:
    return values, slice(None)


class Context(NamedTuple):
    """What a training step is given beside its images and labels.

    Attributes:
        now: what `schedule` gives for the epoch: numbers, or tensors of shape () on the device
            where one captured step serves all epochs.
        answers: the teacher's logits of the images, (B, C), if they are known already.
        drawn: uniform random numbers in [0, 1) for each image, (B, draws), the same for a seed and
            an epoch wherever it is trained; the toolkit's own trainer draws none.
        whole: a value (B,) of each sample of this process -> the values of the whole batch, and
            where these are in it.
        held: images (M, 3, H, W) and labels (M,) that nothing is trained on, in the steps in which
            the method asks for them; the toolkit's own trainer has none.
        slope: a pair of this step, as a policy has it -> the gradient of what becomes of its
            distillation loss, factor and weights included, by the logits that the student gave,
            (B, C); summed over samples.
        ahead: how these logits change, (B, C), as the student's weights go along the gradient of
            the cross-entropy of `held`; where there is some.
        logits: the student's logits of the images, (B, C), if they are known already.
    """

    now: Mapping[str, float | Tensor]
    answers: Tensor | None = None
    drawn: Tensor | None = None
    whole: Callable[[Tensor], tuple[Tensor, slice]] = _alone
    held: tuple[Tensor, Tensor] | None = None
    slope: Callable[[Pair], Tensor] | None = None
    ahead: Callable[[], Tensor] | None = None
    logits: Tensor | None = None

    def uniform(self, like: Tensor) -> Tensor:
        """The numbers drawn for this step, as of `like`'s shape."""
        return torch.rand_like(like) if self.drawn is None else self.drawn.view_as(like)


@dataclass(frozen=True)
class Policy(Settings):
    """A change of the classes, temperatures or weights at which logits are compared.

    A subclass is a frozen dataclass of its settings, and is found by its name in LOGIT.POLICIES.
    Its docstring is its page in docs/methods.md.

    Attributes:
        SCHEDULED: settings of which `schedule` shows all that they do.
        needs_label: whether it looks at the pair's `target`.
    """

    SCHEDULED: ClassVar[tuple[str, ...]] = ()
    needs_label: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        check_free(cls.__name__, POLICIES.get(cls.__name__), cls)
        POLICIES[cls.__name__] = cls

    @property
    def slot(self) -> str:
        """What of SLOTS the policy owns."""
        raise NotImplementedError

    @property
    def per_sample(self) -> bool:
        """Whether the loss's factor or weight comes to differ between samples."""
        return False

    @property
    def decayed(self) -> bool:
        """Whether weight decay acts on the parameters of what `build` makes."""
        return True

    @property
    def held_every(self) -> int:
        """In every how manieth step it wants images that are held out, or 0."""
        return 0

    @property
    def vmappable(self) -> bool:
        """Whether torch.vmap can act for several runs: not with a state, nor by a gradient."""
        return True

    def schedule(self, epoch: int, run: RunFacts) -> dict[str, float]:
        """The settings that depend on the epoch, counted from 1, by the names of their logs."""
        return {}

    def draws(self, classes: int) -> int:
        """How many random numbers a step needs for each image."""
        return 0

    def build(self, run: RunFacts) -> Callable[[Pair, Context], Pair]:
        """What acts in a step: the policy, or a module where it has parameters or a state."""
        return self

    def __call__(self, pair: Pair, context: Context) -> Pair:
        return pair

    @classmethod
    def rules_beside(cls, classes: int) -> dict[str, Rule]:
        """What the number of classes allows for settings, by key."""
        return {}

    def idle(self, run: RunFacts) -> str:
        """Why the policy never acts in a run, or ""."""
        return ""

    def unreached(self, run: RunFacts) -> dict[str, Any]:
        """What of its settings a run never comes to: key -> (values, reason)."""
        return {}


@dataclass(frozen=True)
class Bounds(Settings):
    """Of a temperature that is found while training."""

    LOW: float = setting(0.25, number(0, 1, open_low=True), "lowest temperature, as a share of T")
    HIGH: float = setting(2.0, number(1, 100), "highest temperature, likewise")


def with_share(pair: Pair, share: Tensor) -> Pair:
    """At this share (B,) of the base temperature; what comes of it is logged."""
    pair = pair.spread(share)
    assert isinstance(pair.tau, Tensor)
    return replace(pair, seen=pair.seen | {"mean_temperature": pair.tau.detach().sum()})


def stage_of_epoch(epoch: int, step_epochs: int, stages: int) -> int:
    """0 for epochs 1 to `step_epochs`, then one more every `step_epochs`, at most stages - 1.

    Raises:
        ValueError: an argument is below 1; epochs count from 1.
    """
    at_least_one(epoch=epoch, step_epochs=step_epochs, stages=stages)
    return min((epoch - 1) // step_epochs, stages - 1)


def at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, expected at least 1")


def check_spread(spread: float) -> None:
    if not -1 < spread < 1:
        raise ValueError(f"spread is {spread}, expected above -1 and below 1")
