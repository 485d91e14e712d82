"""Every loss with up to three policies in every mode: it trains, or is refused with a reason."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composed import composed as built
from torch import nn

from mdistiller_ext.distillers import Composition, Logit
from mdistiller_ext.distillers.recipes import Weights
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.losses import LOSSES
from mdistiller_ext.policies import POLICIES, SLOTS, Context
from mdistiller_ext.settings import Settings

# Settings with which a loss goes with other policies.
OTHERWISE: dict[str, dict[str, Any]] = {"DIST": {"GAMMA": 0.0}}
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


def compositions(loss: str) -> Iterator[Composition]:
    """Of a loss, in every mode, with all sets of up to three policies, in every mode."""
    losses = modes(LOSSES[loss])
    if loss in OTHERWISE:
        losses += modes(LOSSES[loss], **OTHERWISE[loss])
    for count in range(4):
        for names in combinations(POLICIES, count):
            each = [modes(POLICIES[name], **AT_ONCE.get(name, {})) for name in names]
            for one, policies in product(losses, product(*each)):
                order = sorted(policies, key=lambda p: list(SLOTS).index(p.slot))
                yield Composition(Weights(), one, tuple(order))


class Tiny(nn.Linear):
    def forward(self, image):
        return super().forward(image), {}


IMAGE = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(20) % 10
DRAWN = torch.rand(20, 40, generator=torch.Generator().manual_seed(1))


@dataclass
class Cfg:
    """What a method reads of a config."""

    LOGIT: Composition
    SOLVER = SimpleNamespace(EPOCHS=2, BATCH_SIZE=20)

    def __getitem__(self, name: str) -> Composition:
        return self.LOGIT


class Given(Logit):
    TYPE = "LOGIT"
    RECIPE = SimpleNamespace(read=lambda composed: composed)


def train(composed: Composition) -> None:
    """Two epochs of one step, between which schedules move; in the second as a captured step is."""
    torch.manual_seed(0)
    distiller = Given(Tiny(6, 10), Tiny(6, 10), Cfg(composed)).train()
    parameters = distiller.get_learnable_parameters()
    drawn = DRAWN[:, : distiller.draws(10)]
    for epoch in (1, 2):
        now = distiller.schedule(epoch)
        if epoch == 2:
            now = {key: torch.tensor(value, dtype=torch.float64) for key, value in now.items()}
        _, losses = distiller(image=IMAGE, target=TARGET, context=Context(now, drawn=drawn))
        loss = torch.stack(list(losses.values()))
        gradients = torch.autograd.grad(loss.sum(), parameters)
        # Finite, and not 0.
        assert all(0 < x.detach().norm() < torch.inf for x in (loss[0], loss[1], *gradients))
        assert all(value.isfinite() for value in distiller.monitor.values())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient


@pytest.mark.parametrize("loss", LOSSES)
def test_every_composition_trains_or_is_refused(loss):
    outcomes = {"trained": 0, "refused": 0}
    for composed in compositions(loss):
        if reason := composed.conflict:
            assert len(reason.split()) > 3
            with pytest.raises(ConfigError, match=re.escape(reason)):
                Given(nn.Identity(), nn.Identity(), Cfg(composed))
            outcomes["refused"] += 1
            continue
        try:
            train(composed)
        except Exception as error:
            raise AssertionError(f"{composed.loss} with {composed.policies}") from error
        outcomes["trained"] += 1
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize(
    ("loss", "policies", "reason"),
    [
        ("KD", ["LS", "NORM"], "LS and NORM both set the temperature's statistic"),
        ("DIST", ["DAT"], "DAT gives each sample a factor of its own, and DIST compares samples"),
        ("DIST", ["NORM"], "NORM gives each sample a factor of its own, and DIST compares"),
        ("DIST", ["LP"], "LP prunes classes, and DIST compares a class over samples that keep"),
        ("TTM", ["LS"], "LS sets the temperature's statistic, and TTM gives the student none"),
        ("WTTM", ["EAT", "NORM"], "NORM sets the temperature's statistic, and WTTM gives"),
    ],
)
def test_what_is_refused(loss, policies, reason):
    with pytest.raises(ConfigError, match=f"^LOGIT: this combination is not allowed: {reason}"):
        built(loss, policies)


@pytest.mark.parametrize("policies", [["DAT"], ["LP", "NORM"]])
def test_what_is_not_refused_otherwise(policies):
    built("DIST", policies, DIST={"GAMMA": 0.0})
