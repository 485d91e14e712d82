"""What the first step would meet is refused before it, in one line, and ordinary networks train."""

import json
from dataclasses import dataclass

import pytest
import torch
from conftest import CPU
from torch import nn

from mdistiller_ext import distill
from mdistiller_ext.config import load_cfg
from mdistiller_ext.distillers import distiller_dict, register_method
from mdistiller_ext.distillers.base import Distiller
from mdistiller_ext.engine import World, train
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.losses import LOSSES, Loss
from mdistiller_ext.models.zoo import OWN
from mdistiller_ext.policies import POLICIES, Policy


@pytest.fixture(autouse=True)
def registries():
    """What a test registers goes with it."""
    before = [(registry, dict(registry)) for registry in (LOSSES, POLICIES, OWN, distiller_dict)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


def normed():
    """A batch norm over as many values as there are images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4))


def taught(student, *options, images=65, method="DKD", **more):
    """What `distill` gives of an epoch with so many random images."""
    split = torch.randint(256, (images, 3, 8, 8), dtype=torch.uint8), torch.arange(images) % 4
    words = ["SOLVER.EPOCHS", 1, "SOLVER.LR_DECAY_STAGES", [], "SOLVER.BATCH_SIZE", 16, *options]
    return distill(student, plain(), split, split, method=method, options=words, device=CPU, **more)


@pytest.mark.parametrize("method", ["NONE", "DKD_LP"])
def test_a_single_image_is_refused_beforehand_where_the_network_cannot(workdir, method):
    with pytest.raises(ConfigError) as error:
        taught(normed(), method=method)
    assert str(error.value).startswith(
        f"SOLVER.BATCH_SIZE: 16 leaves a batch of one image of 65, with which {method} does not "
        f"train here: ValueError: 'Expected more than 1 value per channel when training"
    )
    assert str(error.value).endswith("expected another number, as 15") and "\n" not in str(error)
    assert not (workdir / "output/distill/own").exists()
    assert taught(normed(), "SOLVER.BATCH_SIZE", 15, method=method)[0]["status"] == "finished"


def test_a_single_image_trains_where_the_network_can(workdir):
    assert taught(plain())[0]["status"] == "finished"


def test_batches_are_counted_without_what_is_held_out(workdir):
    """Of 81 images 65 stay."""
    options = ["SOLVER.BATCH_SIZE", 32]
    with pytest.raises(ConfigError, match="32 leaves a batch of one image of 65, with which DKD"):
        taught(normed(), *options, "DATASET.HOLDOUT", 0.2, images=81)
    assert taught(normed(), *options, images=81)[0]["status"] == "finished"


def test_a_single_image_held_out_is_refused_where_it_is_reached(workdir):
    """Of 20 images held out the second batch has one; an epoch has four steps."""
    options = ["SOLVER.BATCH_SIZE", 19, "DATASET.HOLDOUT", 0.25, "DKD_HYPERGRADIENT.EVERY"]
    with pytest.raises(ConfigError, match="19 leaves a batch of one of the 20 images held out, wi"):
        taught(normed(), *options, 3, images=84, method="DKD_HYPERGRADIENT")
    record, _ = taught(normed(), *options, 4, images=84, method="DKD_HYPERGRADIENT")
    assert record["status"] == "finished"


def test_a_share_of_one_image_is_refused_of_several_processes(workdir):
    """All of them find the same, so that none waits for another."""
    OWN["normed"] = lambda num_classes: nn.Sequential(
        nn.Flatten(), nn.Linear(192, num_classes), nn.BatchNorm1d(num_classes)
    )
    words = ["DATASET.TYPE", "digits", "DISTILLER.STUDENT", "normed", "SOLVER.BATCH_SIZE", "67"]
    cfg = load_cfg(None, words)  # 8 batches and 3 images, of which one process has a single one
    for rank in (0, 1):
        world = World(rank, 2)
        world.tell = lambda content: content
        with pytest.raises(ConfigError, match="of one image for one of 2 processes of 539, with"):
            train(cfg, f"r{rank}", CPU, world=world)


def scalar(pair):
    return (pair.student - pair.teacher).square().mean()


def by_class(pair):
    return (pair.student - pair.teacher).square()


def detached(pair):
    return by_class(pair).mean(1).detach()


def a_number(pair):
    return scalar(pair).item()


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (scalar, r"values of shape \(\), expected one value a sample, of shape \(4,\)"),
        (by_class, r"values of shape \(4, 4\), expected one value a sample, of shape \(4,\)"),
        (detached, "values without a gradient, expected some that the student's logits"),
        (a_number, r"a float, expected one value a sample, of shape \(4,\)"),
    ],
)
def test_an_own_loss_that_is_none_is_refused_by_its_name(workdir, call, got):
    dataclass(frozen=True)(type("MINE", (Loss,), {"__call__": lambda self, pair: call(pair)}))
    with pytest.raises(ConfigError, match=rf"\Aloss MINE: gives {got}.*\Z") as error:
        taught(plain(), "LOGIT.LOSS", "MINE", method="LOGIT")
    assert "\n" not in str(error.value)


def test_weights_that_would_mix_samples_are_refused(workdir):
    class WIDE(Policy):
        slot = "weight"

        def __call__(self, pair, context):
            return pair.weighted(torch.ones_like(pair.student[:, :1]))

    with pytest.raises(ConfigError, match=r"loss DKD with its factor and weights: gives values"):
        taught(plain(), "LOGIT.POLICIES", ["WIDE"], method="LOGIT")


def test_a_loss_of_an_own_method_without_a_gradient_is_refused(workdir):
    @register_method("MINE")
    class Mine(Distiller):
        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)

        def forward_train(self, *, image, target, context, **kwargs):
            student, teacher = self.logits(image, context)
            hint = (student.argmax(1) - teacher.argmax(1)).float().mean()
            return student, {"loss_ce": nn.functional.cross_entropy(student, target), "hint": hint}

    with pytest.raises(ConfigError, match="MINE: hint is a Tensor without a gradient, expected a"):
        taught(plain(), method="MINE")


def test_the_record_has_the_temperature_that_was_used_and_own_schedules_are_shown(workdir, tool):
    class COOL(Policy):
        slot = "base"

        def schedule(self, epoch, run):
            return {"heat": 6.0 / epoch}

        def __call__(self, pair, context):
            heat = context.now["heat"] / run_temperature
            return pair.spread(torch.full_like(pair.student[:, 0], float(heat)))

    run_temperature = 4.0
    options = ["LOGIT.POLICIES", ["COOL"], "SOLVER.EPOCHS", 2]
    record, folder = taught(plain(), *options, method="LOGIT")
    for number, epoch in enumerate(record["epochs"], 1):
        assert "temperature" not in epoch
        assert epoch["heat"] == 6 / number and epoch["mean_temperature"] == pytest.approx(
            6 / number
        )
    assert json.loads((folder / "record.json").read_text())["epochs"][0]["heat"] == 6
    status, output, _ = tool("show", str(folder))
    lines = dict(
        line.strip().split("  ", 1) for line in output.splitlines() if "  " in line.strip()
    )
    assert status == 0 and lines["run"].strip().startswith("LOGIT (DKD + COOL), ")
    assert lines["temperature found"].split() == ["6", "█▁", "3"] == lines["heat"].split()
    assert "temperature" not in lines
    assert "What the methods schedule or log by themselves" in (folder / "show.html").read_text()
