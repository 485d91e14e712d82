"""A temperature that has a state: in the record, in what is saved, and by the optimizer's rules."""

import pytest
import torch
from composed import composed
from conftest import CPU, assert_same_run, signal_at, untrained_teacher

from mdistiller_ext.engine import train
from mdistiller_ext.engine.build import build_optimizer


@pytest.fixture
def found(digits_cfg, workdir):
    def build(method, *options):
        teacher = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
        return digits_cfg("vanilla", "DISTILLER.TYPE", method, *teacher, *options)

    return build


@pytest.mark.parametrize(
    ("method", "options", "key", "first"),
    [
        ("CTKD", ["CTKD.EPOCHS", "1", "SOLVER.LR", "0.5"], "CTKD.theta", 1),
        ("DKD_ENTROPY", [], "ENTROPY.log_share", 0),
        (
            "DKD_HYPERGRADIENT",
            ["DATASET.HOLDOUT", "0.3", "DKD_HYPERGRADIENT.EVERY", "2"],
            "HYPERGRADIENT.log_share",
            0,
        ),
    ],
)
def test_a_run_goes_on_with_the_temperature_that_it_had(found, method, options, key, first):
    cfg = found(method, *options)
    record, alone = train(cfg, "alone", CPU)
    with signal_at(2, 4):
        train(cfg, "resumed", CPU)
    train(cfg, "resumed", CPU, resume=True)
    assert_same_run(alone.parent / "resumed", alone)
    states = [
        torch.load(alone.parent / n / "latest", weights_only=True) for n in ("alone", "resumed")
    ]
    values = [state["model"][f"learned.{key}"] for state in states]
    assert torch.equal(*values) and values[0] != first
    temperatures = [epoch["mean_temperature"] for epoch in record["epochs"]]
    assert len(set(temperatures)) == 3 and all(1 <= t < 21 for t in temperatures)


@pytest.mark.parametrize("decay", [True, False])
def test_weight_decay_is_a_choice(found, decay):
    cfg = found("CTKD", "CTKD.DECAY", str(decay))
    distiller = composed("KD", ["CTKD"], CTKD={"DECAY": decay})
    distiller.student = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(cfg.SOLVER, distiller)
    for parameter in distiller.get_learnable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [p.detach().clone() for p in distiller.get_learnable_parameters()]
    optimizer.step()
    *weights, theta = map(torch.equal, before, distiller.get_learnable_parameters())
    assert not any(weights) and theta != decay
