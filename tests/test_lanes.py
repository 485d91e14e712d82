"""Runs that follow each other: what one leaves serves the next, and neither can tell."""

from pathlib import Path

import pytest
import torch
from conftest import CPU, assert_same_run, signal_at

from mdistiller_ext.engine import StopSignals, run, train, train_many
from mdistiller_ext.engine.loop import Meter
from mdistiller_ext.engine.shared import Shared
from mdistiller_ext.engine.trainer import Lane, Trainer
from mdistiller_ext.sections import Parts


@pytest.fixture
def built(monkeypatch):
    """The kinds of the trainers that are made anew."""
    kinds, build = [], Trainer.__init__

    def counted(self, parts, *args):
        kinds.append(parts.networks.TYPE)
        build(self, parts, *args)

    monkeypatch.setattr(Trainer, "__init__", counted)
    return kinds


@pytest.mark.parametrize("steps", [None, 3])
def test_runs_that_follow_each_other_are_the_runs_alone(
    digits_cfg, trained, built, captured, steps
):
    """One of them goes on within its second epoch."""
    options = [
        (method, "SOLVER.EPOCHS", "2", "SOLVER.SEED", seed)
        for method, seeds in (("dkd_dat", "012"), ("kd", "0"))
        for seed in seeds
    ]
    jobs = [(digits_cfg(*words), f"{words[0]}-{words[-1]}") for words in options]
    alone = [trained(*words) for words in options]
    with signal_at(2, 4):
        train(*jobs[2], CPU)
    built.clear()
    if steps:
        captured(steps)
    records = train_many(jobs, CPU, resume=True, together=2)
    # The third follows the first, on the same trainer.
    assert built == ["DKD_DAT", "DKD_DAT", "KD"]
    for record, (_, name), folder in zip(records, jobs, alone, strict=True):
        assert record["status"] == "finished" and record["environments"][-1]["together"] == 2
        assert_same_run(Path("output/digits", name), folder)


def test_what_a_run_leaves_is_as_new(digits_cfg):
    """Whatever it has done to it."""
    lane = Lane(Shared(CPU, StopSignals(), together=2))
    first, second = (digits_cfg("vanilla", "SOLVER.SEED", seed) for seed in "01")
    trainer = lane.prepare(Parts.read(first), None)
    index, view = (key[:128] for key in trainer.data.draw(torch.Generator()))
    trainer.meter.start(1)
    list(trainer.epoch(0.1, index, view, None, None, [64, 64]))
    with torch.no_grad():
        for tensor in (*trainer.distiller.parameters(), *trainer.distiller.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
        for state in trainer.optimizer.state.values():
            state["momentum_buffer"].fill_(torch.nan)
    assert lane.prepare(Parts.read(second), None) is trainer
    new = Trainer(Parts.read(second), lane.shared, None)
    for key, value in new.distiller.state_dict().items():
        assert torch.equal(trainer.distiller.state_dict()[key], value), key
    momenta = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    assert momenta and not any(momentum.any() for momentum in momenta)
    assert torch.equal(trainer.random["torch"], new.random["torch"])


@pytest.mark.parametrize(
    ("options", "alike"),
    [
        (["SOLVER.SEED", "7", "LOG.EVAL_EVERY", "2", "EXPERIMENT.NAME", "other"], True),
        (["SOLVER.LR", "0.1"], False),
        (["SOLVER.EPOCHS", "4"], False),
        (["SOLVER.BATCH_SIZE", "32"], False),
        (["DISTILLER.STUDENT", "resnet14"], False),
    ],
)
def test_a_run_of_another_kind_gets_a_trainer_of_its_own(digits_cfg, options, alike):
    lane = Lane(Shared(CPU, StopSignals(), together=2))
    first = lane.prepare(Parts.read(digits_cfg("vanilla")), None)
    second = digits_cfg("vanilla", *options)
    assert lane.fits(second) is alike
    assert (lane.prepare(Parts.read(second), None) is first) is alike


def test_epochs_of_runs_together_do_not_end_at_once(digits_cfg, monkeypatch):
    happened, evaluate, count = [], run.Run._evaluate, Meter.count

    def counted(self, images):
        happened.append("step")
        count(self, images)

    def evaluated(self):
        happened.append("end")
        return evaluate(self)

    monkeypatch.setattr(Meter, "count", counted)
    monkeypatch.setattr(run.Run, "_evaluate", evaluated)
    options = "SOLVER.EPOCHS", "2", "SOLVER.SEED"
    train_many([(digits_cfg("vanilla", *options, s), s) for s in "012"], CPU)
    assert "".join("|" if it == "end" else "." for it in happened).count("||") == 0
