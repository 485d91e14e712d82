"""Every loss with up to three policies: it trains, or is refused with a reason.

In every mode; three policies by default in their usual one, and -m slow has them all (7,000).
"""

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


class Tiny(nn.Module):
    """A linear network, from the same weights each time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHTS[seed].clone())

    def forward(self, image):
        return image @ self.weight, {}


WEIGHTS = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
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
    distiller = Given(Tiny(0), Tiny(1), Cfg(composed)).train()
    parameters = distiller.get_learnable_parameters()
    drawn = DRAWN[:, : distiller.draws(10)]
    for epoch in (1, 2):
        now = distiller.schedule(epoch)
        if epoch == 2:
            now = {key: torch.tensor(value, dtype=torch.float64) for key, value in now.items()}
        _, losses = distiller(image=IMAGE, target=TARGET, context=Context(now, drawn=drawn))
        gradients = torch.autograd.grad(losses["loss_ce"] + losses["loss_kd"], parameters)
        assert 0 < losses["loss_kd"] < torch.inf
        assert all(0 < gradient.norm() < torch.inf for gradient in gradients)
        assert all(value.isfinite() for value in distiller.monitor.values())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient


@pytest.mark.parametrize("complete", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_composition_trains_or_is_refused(loss, complete):
    outcomes = {"trained": 0, "refused": 0}
    for composed in compositions(loss, complete):
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
        ("DTKD", ["LS"], "LS sets the temperature's statistic, and DTKD takes its own"),
        ("KD", ["EAT", "CTKD"], "EAT and CTKD both set the base temperature"),
        ("MLKD", ["LP"], "LP prunes classes, and MLKD compares products of classes"),
        ("MLKD", ["DAT"], "DAT gives each sample a factor of its own, and MLKD compares samples"),
        ("MLKD", ["EAKD"], "EAKD gives each sample a factor of its own, and MLKD compares samples"),
        ("LDRLD", ["LP"], "LP prunes classes, and LDRLD pairs classes that may be among them"),
    ],
)
def test_what_is_refused(loss, policies, reason):
    with pytest.raises(ConfigError, match=f"^LOGIT: this combination is not allowed: {reason}"):
        built(loss, policies)


@pytest.mark.parametrize(
    ("loss", "policies", "settings"),
    [
        ("DIST", ["DAT"], {"DIST": {"GAMMA": 0.0}}),
        ("DIST", ["LP", "NORM"], {"DIST": {"GAMMA": 0.0}}),
        ("LDRLD", ["LP"], {"LDRLD": {"ALPHA": 0.0}}),
        ("KD", ["EAT", "CTKD"], {"EAT": {"MODE": "gradient"}}),
        ("KD", ["EAKD", "DAT", "LS"], {}),
    ],
)
def test_what_is_not_refused(loss, policies, settings):
    built(loss, policies, **settings)
