"""Any loss with any policies on given logits, without networks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdistiller_ext import distiller_dict, get_cfg
from mdistiller_ext.distillers import Composition, Logit
from mdistiller_ext.distillers.recipes import Weights
from mdistiller_ext.losses import LOSSES, Pair
from mdistiller_ext.policies import POLICIES, SLOTS, Context
from mdistiller_ext.settings import Settings, leaves


class Result(NamedTuple):
    """Of each sample the loss, (B,), with factor and weights; its gradient by the student's logits,
    (B, C), for the sum over the batch; and what was compared."""

    value: Tensor
    gradient: Tensor
    pair: Pair


def composed(
    loss: str = "KD", policies: Sequence[str] = (), epochs: int = 80, **settings: Any
) -> Logit:
    """LOGIT with settings, as `LP={"MODE": "lump"}`."""
    cfg = get_cfg()
    cfg.SOLVER.EPOCHS = epochs
    node = {"LOSS": loss, "POLICIES": list(policies), **settings}
    for key, value in leaves({"LOGIT": {k: v for k, v in node.items() if v != {}}}):
        cfg.merge_from_list([key, value])
    distiller = distiller_dict["LOGIT"](nn.Identity(), nn.Identity(), cfg)
    assert isinstance(distiller, Logit)
    return distiller


def logits(
    batch: int = 16, classes: int = 10, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's, which take gradients, the teacher's and labels, half of them its top class."""
    generator = torch.Generator().manual_seed(batch)
    student, teacher = scale * torch.randn(2, batch, classes, generator=generator, dtype=dtype)
    target = torch.randint(classes, (batch,), generator=generator)
    target = torch.where(torch.arange(batch) % 2 == 0, teacher.argmax(dim=1), target)
    return student.requires_grad_(), teacher, target


def apply(
    distiller: Logit, batch: tuple[Tensor, Tensor, Tensor], epoch: int = 1, **context: Any
) -> Result:
    now: Mapping[str, float] = distiller.schedule(epoch)
    pair = distiller.pair(*batch, Context(now, **context))
    value = distiller.value(pair)
    (gradient,) = torch.autograd.grad(value.sum(), batch[0], retain_graph=True)
    return Result(value.detach(), gradient, pair)


# Settings with which a loss goes with other policies.
OTHERWISE: dict[str, dict[str, Any]] = {
    "DIST": {"GAMMA": 0.0},
    "LDRLD": {"ALPHA": 0.0, "TOP": 3},
}
AT_ONCE = {"EAT": {"STEP_EPOCHS": 1}, "LP": {"STEP_EPOCHS": 1, "RATIOS": [0.2, 0.5]}}


def modes(part: type[Settings], **settings: Any) -> list[Any]:
    """A part with each of its choices, of words and of switches."""
    choices = {}
    for key, default in part.defaults().items():
        if isinstance(default, bool):
            choices[key] = [False, True]
        elif isinstance(default, str):
            choices[key] = part.rules()[key][1].removeprefix("one of ").split(", ")
    return [
        part(**settings, **dict(zip(choices, values, strict=True)))
        for values in product(*choices.values())
    ]


def compositions(loss: str, complete: bool) -> Iterator[Composition]:
    """Of a loss with up to three policies, three of them in every mode if `complete`."""
    losses = modes(LOSSES[loss])
    if loss in OTHERWISE:
        losses += modes(LOSSES[loss], **OTHERWISE[loss])
    for count in range(4):
        for names in combinations(POLICIES, count):
            each = [modes(POLICIES[name], **AT_ONCE.get(name, {})) for name in names]
            if count == 3 and not complete:
                each = [[POLICIES[name](**AT_ONCE.get(name, {}))] for name in names]
            for one, policies in product(losses, product(*each)):
                order = sorted(policies, key=lambda p: list(SLOTS).index(p.slot))
                yield Composition(Weights(), one, tuple(order))


@dataclass
class Cfg:
    """All that a method reads of a config."""

    LOGIT: Composition
    SOLVER = SimpleNamespace(EPOCHS=2, BATCH_SIZE=20)

    def __getitem__(self, name: str) -> Composition:
        return self.LOGIT


class Made(Logit):
    """Built with such a config."""

    TYPE = "LOGIT"
    RECIPE = SimpleNamespace(read=lambda composed: composed)
