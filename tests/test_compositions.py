"""Every loss with up to three policies: it trains, or is refused with a reason.

In every mode; three policies in their usual one, or all (7,000); both are slow.
"""

import re

import pytest
import torch
from composed import Cfg, Made, compositions
from composed import composed as built
from torch import nn

from mdistiller_ext.distillers import Composition
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.losses import LOSSES
from mdistiller_ext.policies import Context


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


def train(composed: Composition) -> None:
    """Two epochs of one step, between which schedules move; in the second as a captured step is."""
    distiller = Made(Tiny(0), Tiny(1), Cfg(composed)).train()
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


@pytest.mark.parametrize(
    "complete", [pytest.param(flag, marks=pytest.mark.slow) for flag in (False, True)]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_composition_trains_or_is_refused(loss, complete):
    outcomes = {"trained": 0, "refused": 0}
    for composed in compositions(loss, complete):
        if reason := composed.conflict:
            assert len(reason.split()) > 3
            with pytest.raises(ConfigError, match=re.escape(reason)):
                Made(nn.Identity(), nn.Identity(), Cfg(composed))
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
